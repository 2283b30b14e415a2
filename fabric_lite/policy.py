"""A policy: which modules of a model an option is about, said by classes, by a function, or by a policy of torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeAlias, TypeGuard

from torch import nn

from fabric_lite.errors import FabricTypeError

__all__ = ["Policy", "check_policy", "classes_of", "description_of", "is_torchs", "predicate_of", "size_of"]

Policy: TypeAlias = Collection[type[nn.Module]] | type[nn.Module] | Callable[..., bool]


def check_policy(policy: Any, option: str) -> None:
    """Raise FabricTypeError unless ``policy`` is None, classes of modules (or none at all), or a function.

    Args:
        policy: What the user gave.
        option: Its name in the error.
    """
    if policy is None or (callable(policy) and not isinstance(policy, type)):
        return
    classes = [policy] if isinstance(policy, type) else policy
    is_classes = isinstance(classes, Collection) and not isinstance(classes, str)
    if not is_classes or not all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in classes):
        raise FabricTypeError(
            f"{option} must be classes of modules or a function.",
            given=f"{option}={policy!r:.80}",
            fix=f"{option}={{Block}}, {option}=lambda module: ..., or leave it out",
        )


def classes_of(policy: Policy) -> tuple[type[nn.Module], ...] | None:
    """Return the classes that a policy lists; an empty tuple is about no module. None: it is a function."""
    if isinstance(policy, type):
        return (policy,)
    return None if callable(policy) else tuple(policy)


def is_torchs(policy: Policy) -> TypeGuard[Callable[..., bool]]:
    """Whether it is one of torch's policies, ``f(module=, recurse=, nonwrapped_numel=)``, made for FSDP1."""
    if isinstance(policy, type) or not callable(policy):
        return False
    return "recurse" in inspect.signature(policy).parameters


def predicate_of(policy: Policy) -> Callable[[nn.Module], bool]:
    """Return ``f(module) -> bool`` for one module by itself; subclasses of a listed class match too.

    One of torch's policies is asked about all parameters of the module, as if nothing inside it were taken.
    """
    classes = classes_of(policy)
    if classes is not None:
        return lambda module: isinstance(module, classes)
    ask: Any = policy
    if is_torchs(policy):
        return lambda module: bool(ask(module=module, recurse=False, nonwrapped_numel=size_of(module)))
    return lambda module: bool(ask(module))


def size_of(module: nn.Module) -> int:
    """The number of elements of the module's parameters, those of the modules in it too."""
    return sum(parameter.numel() for parameter in module.parameters())


def description_of(policy: Policy) -> str:
    """The policy as errors show it: ``{Block, Layer}``, or the function's name."""
    classes = classes_of(policy)
    if classes is not None:
        return "{" + ", ".join(sorted(kind.__name__ for kind in classes)) + "}"
    return getattr(policy, "__name__", None) or repr(policy)
