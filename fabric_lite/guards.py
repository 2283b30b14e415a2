"""Guards against ranks that drift apart: methods and steps whose gradients went around the engine."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fabric_lite.adopt import HOLDER, extension_of
from fabric_lite.errors import StrategyError
from fabric_lite.extension import ModuleExtension, in_backward

__all__ = ["SynchronizationGuard", "check_nothing_waits", "guarded", "own_methods"]

# So often a method is watched on its way through the engine before it is trusted.
_WATCHED_CALLS = 3


class SynchronizationGuard:
    """A pre-hook of ``step`` that raises on gradients that went around the engine, and so stayed on their rank.

    It also frees gathered parameters, which the step would leave behind: torch keeps the root's after a forward without
    a backward, and would run the next forward on the values before the step.

    Args:
        modules: Returns the modules that are set up.
    """

    def __init__(self, modules: Callable[[], list[nn.Module]]) -> None:
        self._modules = modules
        self._seen: dict[int, int] = {}

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for module in self._modules():
            extension: ModuleExtension = extension_of(module)
            for part in extension.sharded:
                part.reshard()
            if extension.waits:
                check_nothing_waits(module, optimizer, "step()")
            if extension.engine is None:
                continue
            seen, self._seen[id(extension)] = self._seen.get(id(extension), 0), extension.entries
            if extension.entries == seen:
                self._check(module, optimizer)

    def _check(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        own = {id(parameter) for parameter in module.parameters()}
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if any(id(p) in own and p.grad is not None and p.grad.any() for p in stepped):
            raise StrategyError(
                f"{type(module).__name__} has gradients, but was not called since the last step: they were not "
                "synchronized between the ranks.",
                given=f"{type(optimizer).__name__}.step() after submodules of it, or a generator method, ran directly",
                fix="call model(...) itself, or model.mark_forward_method(name) for a method that runs submodules",
            )


def check_nothing_waits(module: nn.Module, optimizer: torch.optim.Optimizer, call: str) -> None:
    """Raise if gradients of ``module``'s shards are not there yet, which ``call`` would take for none at all.

    Raises:
        StrategyError: A window of ``no_backward_sync`` ended without a micro-step that synchronizes.
    """
    own = {id(parameter) for parameter in module.parameters()}
    if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise StrategyError(
            f"The gradients of {type(module).__name__} still wait to be synchronized: {call} would find none.",
            given=f"{call} after micro-steps in no_backward_sync(), without one outside it",
            fix="no_backward_sync(model, enabled=False) for the last micro-step of every window, a short one too",
        )


def own_methods(kind: type) -> set[str]:
    """The names of public methods that the user's classes define and nn.Module does not have."""
    return {
        name
        for parent in kind.__mro__
        if not parent.__module__.startswith("torch.distributed.")  # FSDPModule's
        for name, value in parent.__dict__.items()
        if inspect.isfunction(value) and not name.startswith("_") and not hasattr(nn.Module, name)
    }


def guarded(kind: type, name: str) -> Callable[..., Any]:
    """A method that goes through the engine when it is marked, and may not go around it when it is not."""

    @functools.wraps(getattr(kind, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        function: Any = getattr(kind, name)
        extension: ModuleExtension | None = self.__dict__.get(HOLDER)
        if extension is None or extension.is_inside:
            return function(self, *args, **kwargs)
        if name in extension.marked_methods:
            return extension.enter(functools.partial(function, self), args, kwargs)
        is_trusted = extension.watched_calls.get(name, 0) >= _WATCHED_CALLS or extension.compiled is not None
        if extension.engine is None or is_trusted or not torch.is_grad_enabled():
            return function(self, *args, **kwargs)
        return _watched(self, name, function, extension, args, kwargs)

    return method


def _watched(
    module: Any, name: str, function: Callable[..., Any], extension: ModuleExtension, args: Any, kwargs: Any
) -> Any:
    """Run a method; raise when it runs a trainable submodule that the engine does not see."""
    inner = {id(child) for child in _modules_below(module)}

    def check(submodule: nn.Module, _: Any) -> None:
        around = id(submodule) in inner and not extension.is_inside and torch.is_grad_enabled() and not in_backward()
        if around and any(parameter.requires_grad for parameter in submodule.parameters()):
            raise StrategyError(
                f"{type(module).__name__}.{name}() runs {type(submodule).__name__} directly, "
                "so its gradients would not be synchronized between the ranks.",
                given=f"a call of {name}() with gradients on, on a model set up for several ranks",
                fix=f"model.mark_forward_method({name!r}) after setup, or call self(...) in {name}()",
            )

    # For all modules, and so on none of them: hooks on the modules would go with a copy that the method makes.
    handle = nn.modules.module.register_module_forward_pre_hook(check)
    entries = extension.entries
    try:
        result = function(module, *args, **kwargs)
    finally:
        handle.remove()
    if extension.entries > entries:
        extension.watched_calls[name] = extension.watched_calls.get(name, 0) + 1
    return result


def _modules_below(module: nn.Module) -> Iterator[nn.Module]:
    """All submodules, but not those that are set up themselves, nor what is below them."""
    for child in module.children():
        if extension_of(child) is None:
            yield child
            yield from _modules_below(child)
