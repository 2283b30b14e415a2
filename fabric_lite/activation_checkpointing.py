"""Activation checkpointing: chosen submodules keep no activations, and run forward again in backward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fabric_lite.errors import FabricTypeError, StrategyError

__all__ = ["CheckpointPolicy", "checkpoint_activations", "release_activations"]

CheckpointPolicy = type[nn.Module] | Collection[type[nn.Module]] | Callable[..., Any]

# What the module's __dict__ held as ``forward`` before; None: nothing, its class's forward is run.
_OWN_FORWARD = "_fabric_lite_checkpointed_forward"


def checkpoint_activations(module: nn.Module, policy: CheckpointPolicy) -> list[str]:
    """Let matching submodules of ``module`` recompute their activations in backward; changed in place.

    Only ``forward`` is recomputed, so hooks of a call (those of ``fully_shard`` too) run once. Names of modules and
    keys of the state dict stay. The state of the random number generators is restored for the second run, so dropout
    is the same. Without gradients nothing is added.

    Args:
        module: The model. It is taken itself only when it matches.
        policy: Classes of modules, ``f(module) -> bool``, or one of torch's wrap policies
            (``f(module=, recurse=, nonwrapped_numel=)``). Of nested matches the outer one is taken.

    Returns:
        The names of the modules, as in ``named_modules``; those that have it already are not among them.

    Raises:
        StrategyError: Nothing matches.
        FabricTypeError: The policy is of none of these kinds.
    """
    matches = _predicate(policy)
    chosen: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        is_inner = any(name == other or other == "" or name.startswith(other + ".") for other in chosen)
        if not is_inner and matches(child):
            chosen[name] = child
    if not chosen:
        raise StrategyError(
            f"activation_checkpointing_policy={_describe(policy)} matches nothing in the model, so no memory would be "
            "saved.",
            given=f"{type(module).__name__} made of {', '.join(sorted({type(m).__name__ for m in module.modules()}))}",
            fix="the class of the model's repeated layers",
        )
    added = {name: child for name, child in chosen.items() if _OWN_FORWARD not in child.__dict__}
    for child in added.values():
        child.__dict__[_OWN_FORWARD] = child.__dict__.get("forward")
        # The module is an argument of one shared function: torch.compile compiles repeated layers once.
        forward = functools.partial(_checkpointed, child)
        child.__dict__["forward"] = functools.update_wrapper(forward, child.forward)
    return list(added)


def release_activations(module: nn.Module) -> None:
    """Take off what :func:`checkpoint_activations` added; an own ``forward`` of an object comes back."""
    for child in module.modules():
        if _OWN_FORWARD in child.__dict__:
            own = child.__dict__.pop(_OWN_FORWARD)
            if getattr(child.__dict__.get("forward"), "func", None) is _checkpointed:  # else the user's, set since
                del child.__dict__["forward"]
                if own is not None:
                    child.__dict__["forward"] = own


def _checkpointed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = module.__dict__[_OWN_FORWARD]
    if forward is None:
        forward = functools.partial(type(module).forward, module)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)


def _predicate(policy: CheckpointPolicy) -> Callable[[nn.Module], bool]:
    """The policy as ``f(module) -> bool``."""
    if isinstance(policy, type):
        return lambda module: isinstance(module, policy)
    if isinstance(policy, Collection):
        classes = tuple(policy)
        if classes and all(isinstance(kind, type) for kind in classes):
            return lambda module: isinstance(module, classes)
    elif callable(policy):
        if "recurse" in inspect.signature(policy).parameters:  # torch's policies, made for FSDP1 and checkpoint_wrapper
            return lambda module: bool(policy(module=module, recurse=False, nonwrapped_numel=_size(module)))
        return lambda module: bool(policy(module))
    raise FabricTypeError(
        "activation_checkpointing_policy must say which modules.",
        given=repr(policy),
        fix="a class or several, a function f(module) -> bool, or ModuleWrapPolicy({...})",
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _describe(policy: CheckpointPolicy) -> str:
    if isinstance(policy, Collection):
        return "{" + ", ".join(sorted(kind.__name__ for kind in policy)) + "}"
    return getattr(policy, "__name__", None) or repr(policy)
