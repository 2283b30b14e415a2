"""The way of a forward call: user's call -> precision -> engine -> the user's own ``forward``.

The engine (``DistributedDataParallel``, say) stands beside the module and calls it back, so every reference that the
user holds, old or new, trains correctly: ``model(x)``, ``model.forward(x)``, ``model.training_step(batch)``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from fabric_lite.adopt import HOLDER, extend, release
from fabric_lite.errors import FabricRuntimeError, FabricTypeError, StrategyError
from fabric_lite.precision import Precision
from fabric_lite.trees import leaves, map_leaves

__all__ = ["ModuleExtension", "extend_module", "release_module"]


@dataclasses.dataclass(eq=False)
class ModuleExtension:
    """All that ``setup`` adds to a module.

    Args:
        owner: The Fabric that set the module up.
        device_type: Device type of autocast.
        precision: What ``forward`` runs in.
        engine: Called instead of the module where gradients are on; None where the module itself is enough.
        hooked: Whether the engine is made of the module's own forward hooks (``fully_shard``), so that a call of
            ``model.forward(x)`` by hand must go through ``__call__``.
        output_hook: Registered on every output that requires grad.
    """

    owner: Any
    device_type: str
    precision: Precision
    engine: nn.Module | None = None
    hooked: bool = False
    output_hook: Callable[[torch.Tensor], None] | None = None
    # What the engine is to run, while it runs; one plain attribute, since a threading.local breaks torch.compile.
    inside: Callable[..., Any] | None = None
    thread: int = 0
    compiled: Callable[..., Any] | None = None
    marked_methods: set[str] = dataclasses.field(default_factory=set)
    verified_methods: set[str] = dataclasses.field(default_factory=set)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the engine calls back."""
        assert self.inside is not None
        return self.inside(*args, **kwargs)

    def enter(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run ``target`` in the run's precision, through the engine where gradients are to be synchronised."""
        precision = self.precision
        if precision.compute_dtype is not None:
            with torch.autocast(self.device_type, precision.compute_dtype):
                output = self.through_engine(target, args, kwargs)
        else:
            if precision.param_dtype is not None:
                args, kwargs = map_leaves(self.cast_input, args), map_leaves(self.cast_input, kwargs)
            output = self.through_engine(target, args, kwargs)
        if precision.output_dtype is not None:
            output = (
                self.cast_output(output) if isinstance(output, torch.Tensor) else map_leaves(self.cast_output, output)
            )
        if self.output_hook is not None and torch.is_grad_enabled():
            for leaf in leaves(output):
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                    leaf.register_hook(self.output_hook)
        return output

    def through_engine(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # Without gradients nothing is communicated: rank 0 may evaluate alone. Inside backward (recomputation by
        # activation checkpointing) the engine has had its forward already.
        engine = self.engine
        if engine is None or not torch.is_grad_enabled() or _recomputes():
            return target(*args, **kwargs)
        self.enter_thread()
        self.inside = target
        try:
            # Not engine(...): the hooks of a call are the user's module's, and they run once, outside.
            return engine.forward(*args, **kwargs)
        finally:
            self.inside = None

    def enter_thread(self) -> None:
        if not torch.compiler.is_compiling():
            self.thread = threading.get_ident()

    def check_thread(self) -> None:
        if not torch.compiler.is_compiling() and self.thread != threading.get_ident():
            raise FabricRuntimeError(
                "One set-up model was called from two threads at once.",
                fix="call it from one thread, or set up one copy per thread",
            )

    def cast_input(self, leaf: Any) -> Any:
        """Float tensors in the dtype of the parameters (pure precisions)."""
        return (
            leaf.to(self.precision.param_dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf
        )

    def cast_output(self, leaf: Any) -> Any:
        """Half-precision outputs in ``output_dtype``; what the user made float64 stays float64."""
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.itemsize < 4:
            return leaf.to(self.precision.output_dtype)
        return leaf


def extend_module(module: nn.Module, extension: ModuleExtension) -> None:
    """Extend ``module`` in place.

    On one device in ``32-true`` the class is extended, but defines no ``forward``: nothing runs between the user and
    torch.

    Raises:
        FabricTypeError: A lazy module that is not materialised yet, or a class that cannot be extended.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise FabricTypeError(
            "A scripted module cannot be extended in place.",
            given=f"{type(module).__name__} of {getattr(module, 'original_name', '?')}",
            fix="set up the plain module before torch.jit.script, or use torch.compile",
        )
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        raise FabricTypeError(
            f"{type(module).__name__} is a lazy module whose parameters have no shape yet.",
            fix="run one forward pass before setup",
        )
    if extension.engine is None and not extension.hooked and not extension.precision.changes_forward:
        extend(module, _quiet_members, extension)
        return
    compiled = module.__dict__.get("_compiled_call_impl")
    if "_orig_mod" in module.__dict__["_modules"]:  # made by torch.compile(model)
        # The engine stands around the compiled module; calls of the module inside are routed like any other.
        extend(module, _compiled_module_members, extension)
        extend(module._orig_mod, _routed_members, extension)
        return
    extend(module, _hooked_members if extension.hooked else _routed_members, extension)
    if compiled is not None:
        _route_compiled_call(module, extension, compiled)


def release_module(module: nn.Module) -> None:
    """Give back the plain module; a compiled call stays compiled."""
    inner = module.__dict__.get("_modules", {}).get("_orig_mod")
    extension: ModuleExtension = release(module)
    if inner is not None and HOLDER in inner.__dict__:
        release(inner)
    if extension.compiled is not None:
        module.__dict__["_compiled_call_impl"] = extension.compiled
    # The engine holds the module and the module its engine: cut, so that memory goes without the collector.
    extension.engine = extension.inside = extension.compiled = None


class ForwardRoute:
    """A data descriptor: ``forward`` is the route, also after the user assigns another ``forward`` to the object.

    A late ``model.forward = f`` on a plain class would hide the route, and skip gradient synchronisation silently.
    """

    def __init__(self, kind: type, attribute: str = "forward") -> None:
        self.user_forward = user_forward = getattr(kind, attribute)

        @functools.wraps(user_forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            extension = self.__dict__.get(HOLDER)
            target = self.__dict__.get("forward")
            if extension is None or extension.inside is not None:
                # Not set up itself (made by self.__class__(...)), or the engine calls back.
                if extension is not None:
                    extension.check_thread()
                return user_forward(self, *args, **kwargs) if target is None else target(*args, **kwargs)
            if target is None:
                # No bound method: torch.compile would rebuild it as self.forward, which is this route.
                target = functools.partial(user_forward, self)
            return extension.enter(target, args, kwargs)

        self.route = forward

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self.user_forward
        if torch.compiler.is_compiling():
            # A bound method would be rebuilt as module.forward, which comes here again.
            return functools.partial(self.route, module)
        return types.MethodType(self.route, module)

    def __set__(self, module: Any, value: Any) -> None:
        module.__dict__["forward"] = value

    def __delete__(self, module: Any) -> None:
        if module.__dict__.pop("forward", None) is None:
            raise AttributeError("forward")


class ItselfAsModule:
    """``model.module`` is the model, where the user's model has no ``module`` of its own."""

    def __get__(self, module: Any, owner: Any = None) -> Any:
        return self if module is None else module.__dict__["_modules"].get("module", module)


def _quiet_members(kind: type) -> dict[str, Any]:
    members: dict[str, Any] = {"mark_forward_method": _mark_forward_method}
    if not hasattr(kind, "module"):
        members["module"] = ItselfAsModule()
    return members


def _routed_members(kind: type) -> dict[str, Any]:
    methods = {name: _guarded(name, function) for name, function in _own_methods(kind)}
    return {**_quiet_members(kind), **methods, "forward": ForwardRoute(kind), "compile": _compile}


def _hooked_members(kind: type) -> dict[str, Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        extension = self.__dict__.get(HOLDER)
        if extension is None or extension.inside is not None:
            return kind.__call__(self, *args, **kwargs)
        extension.enter_thread()
        extension.inside = kind.__call__
        try:
            return extension.enter(functools.partial(kind.__call__, self), args, kwargs)
        finally:
            extension.inside = None

    route = ForwardRoute(kind)

    @functools.wraps(route.user_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        extension = self.__dict__.get(HOLDER)
        if extension is not None and extension.inside is None:
            return self(*args, **kwargs)
        target = self.__dict__.get("forward")
        return route.user_forward(self, *args, **kwargs) if target is None else target(*args, **kwargs)

    route.route = forward
    copies = {"__deepcopy__": _refuse_copy, "__reduce_ex__": _refuse_copy}
    return {**_quiet_members(kind), **copies, "__call__": call, "forward": route}


def _refuse_copy(self: Any, _: Any) -> Any:
    """A copy would hold this rank's shards, and hooks that no rank shares."""
    raise StrategyError(
        f"A {type(self).__name__} that is sharded over the ranks cannot be copied or pickled.",
        fix="fabric.save(path, {'model': model}), or get_model_state_dict of torch.distributed.checkpoint.state_dict",
    )


def _compiled_module_members(kind: type) -> dict[str, Any]:
    # An OptimizedModule keeps its compiled call as a ``forward`` of its own, which the route finds and runs.
    return {**_quiet_members(kind), "forward": ForwardRoute(kind)}


def _compile(self: Any, *args: Any, **kwargs: Any) -> None:
    """Compile this module's forward; the compiled call stands inside the engine."""
    if HOLDER not in self.__dict__:
        super(type(self), self).compile(*args, **kwargs)
        return
    self.__dict__["_compiled_call_impl"] = None
    _route_compiled_call(self, self.__dict__[HOLDER], torch.compile(self._call_impl, *args, **kwargs))


def _route_compiled_call(module: nn.Module, extension: ModuleExtension, compiled: Callable[..., Any]) -> None:
    extension.compiled = compiled

    def call(*args: Any, **kwargs: Any) -> Any:
        if extension.inside is not None:
            return compiled(*args, **kwargs)
        return extension.enter(compiled, args, kwargs)

    # nn.Module.__call__ runs this instead of its own way through the hooks; those are inside the compiled call.
    module.__dict__["_compiled_call_impl"] = call


def _own_methods(kind: type) -> list[tuple[str, Callable[..., Any]]]:
    """The public methods that the user's classes define and nn.Module does not have."""
    found = {
        name: value
        for parent in reversed(kind.__mro__)
        for name, value in parent.__dict__.items()
        if inspect.isfunction(value) and not name.startswith("_") and not hasattr(nn.Module, name)
    }
    return list(found.items())


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A method that goes through the engine when it is marked, and may not go around it when it is not."""

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        extension = self.__dict__.get(HOLDER)
        if extension is None or extension.inside is not None:
            return function(self, *args, **kwargs)
        if name in extension.marked_methods:
            return extension.enter(types.MethodType(function, self), args, kwargs)
        if extension.engine is None or name in extension.verified_methods or not torch.is_grad_enabled():
            return function(self, *args, **kwargs)
        return _watched(self, name, function, extension, args, kwargs)

    return method


def _watched(
    module: Any, name: str, function: Callable[..., Any], extension: ModuleExtension, args: Any, kwargs: Any
) -> Any:
    """The first call of a method: raises when it runs a trainable submodule that the engine does not see."""

    def check(submodule: nn.Module, _: Any) -> None:
        around = extension.inside is None and torch.is_grad_enabled() and not _in_backward()
        if around and any(parameter.requires_grad for parameter in submodule.parameters()):
            raise StrategyError(
                f"{type(module).__name__}.{name}() runs {type(submodule).__name__} directly, "
                "so its gradients would not be synchronised between the ranks.",
                given=f"a call of {name}() with gradients on, on a model set up for several ranks",
                fix=f"model.mark_forward_method({name!r}) after setup, or call self(...) in {name}()",
            )

    inner = [child for child in module.modules() if child is not module and HOLDER not in child.__dict__]
    handles = [child.register_forward_pre_hook(check) for child in inner]
    try:
        result = function(module, *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    extension.verified_methods.add(name)
    return result


def _mark_forward_method(self: Any, method: Any) -> None:
    """Let a method other than ``forward`` go through the strategy and precision, like ``forward``.

    Args:
        method: The method or its name.
    """
    name = method if isinstance(method, str) else method.__name__
    if not callable(getattr(self, name, None)):
        raise FabricTypeError(
            f"{type(self).__name__} has no method {name!r} to mark.", fix="the name of one of the model's methods"
        )
    extension: ModuleExtension = self.__dict__[HOLDER]
    if extension.hooked:
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(self, name)
    extension.marked_methods.add(name)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _recomputes() -> bool:
    """Whether this forward is a recomputation inside backward, whose first run went through the engine.

    Not so under torch's reentrant checkpoint: there the first run had no gradients, and this is the one that counts.
    """
    if torch.compiler.is_compiling() or not _in_backward():
        return False
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.backward.__code__:
            return False
        frame = frame.f_back
    return True
