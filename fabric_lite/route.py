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
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from fabric_lite.adopt import HOLDER, check_extendable, extend, extension_of, release, user_class
from fabric_lite.errors import FabricRuntimeError, FabricTypeError, StrategyError
from fabric_lite.precision import Precision
from fabric_lite.trees import map_leaves

__all__ = ["ModuleExtension", "SynchronisationGuard", "check_module", "extend_module", "release_module"]

# So often a method is watched on its way through the engine before it is trusted.
_WATCHED_CALLS = 3


@dataclasses.dataclass(eq=False)
class ModuleExtension:
    """All that ``setup`` adds to a module.

    Args:
        owner: The Fabric that set the module up.
        device_type: Device type of autocast.
        precision: What ``forward`` runs in.
        engine: Its ``forward`` is called instead of the module's where gradients are on; None: the module is enough.
        hooked: Whether the engine is made of the module's own forward hooks (``fully_shard``), so that a call of
            ``model.forward(x)`` by hand must go through ``__call__``.
        handles: Hooks that are removed on release.
    """

    owner: Any
    device_type: str
    precision: Precision
    engine: nn.Module | None = None
    hooked: bool = False
    handles: list[Any] = dataclasses.field(default_factory=list)
    # Plain attributes, since a threading.local breaks torch.compile: whether the engine is calling back, what it is to
    # run, and the thread in which it does.
    is_inside: bool = False
    target: Callable[..., Any] | None = None
    thread: int = 0
    compiled: Callable[..., Any] | None = None
    marked_methods: set[str] = dataclasses.field(default_factory=set)
    watched_calls: dict[str, int] = dataclasses.field(default_factory=dict)
    entries: int = 0
    frozen: list[nn.Parameter] = dataclasses.field(default_factory=list)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the engine calls back."""
        assert self.target is not None
        return self.target(*args, **kwargs)

    def enter(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run ``target`` in the run's precision, through the engine where gradients are to be synchronised."""
        precision = self.precision
        if precision.compute_dtype is not None:
            with torch.autocast(self.device_type, precision.compute_dtype):
                output = self._through_engine(target, args, kwargs)
        else:
            if precision.param_dtype is not None:
                args, kwargs = map_leaves(self._cast_input, args), map_leaves(self._cast_input, kwargs)
            output = self._through_engine(target, args, kwargs)
        if precision.output_dtype is not None:
            return (
                self._cast_output(output) if isinstance(output, torch.Tensor) else map_leaves(self._cast_output, output)
            )
        return output

    def inside(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run ``target`` with the mark set: what it calls of this module goes straight to the user's ``forward``."""
        if not torch.compiler.is_compiling():
            self.thread = threading.get_ident()
        self.is_inside = True
        try:
            return target(*args, **kwargs)
        finally:
            self.is_inside = False

    def check_thread(self) -> None:
        """Raise when the mark was set by another thread."""
        if not torch.compiler.is_compiling() and self.thread != threading.get_ident():
            raise FabricRuntimeError(
                "One set-up model was called from two threads at once.",
                given="a call from a second thread while the engine runs the first",
                fix="call it from one thread, or set up one copy per thread",
            )

    def _through_engine(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # Without gradients nothing is communicated: rank 0 may evaluate alone. Inside backward (recomputation by
        # activation checkpointing) the engine has had its forward already.
        engine = self.engine
        if engine is None or not torch.is_grad_enabled() or _recomputes():
            return target(*args, **kwargs)
        if not torch.compiler.is_compiling():  # a counter would compile each call anew
            self.entries += 1
            self._check_frozen()
        self.target = target
        try:
            # Not engine(...): the hooks of a call are the user's module's, and they run once, outside.
            return self.inside(engine.forward, args, kwargs)
        finally:
            self.target = None

    def _check_frozen(self) -> None:
        if any(parameter.requires_grad for parameter in self.frozen):
            raise StrategyError(
                "Parameters were unfrozen after setup, so their gradients would not be synchronised.",
                given=f"{sum(parameter.requires_grad for parameter in self.frozen)} that were frozen at setup",
                fix="unfreeze before setup, or fabric.release(model) and fabric.setup(model) again",
            )

    def _cast_input(self, leaf: Any) -> Any:
        """Float tensors in the dtype of the parameters (pure precisions)."""
        return (
            leaf.to(self.precision.param_dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf
        )

    def _cast_output(self, leaf: Any) -> Any:
        """Half-precision outputs in ``output_dtype``; what the user made float64 stays float64."""
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.itemsize < 4:
            return leaf.to(self.precision.output_dtype)
        return leaf


class SynchronisationGuard:
    """A pre-hook of ``step`` that raises on gradients that went around the engine, and so stayed on their rank.

    Args:
        modules: Returns the modules that are set up.
    """

    def __init__(self, modules: Callable[[], list[nn.Module]]) -> None:
        self._modules = modules
        self._seen: dict[int, int] = {}

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for module in self._modules():
            extension: ModuleExtension = extension_of(module)
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
                "synchronised between the ranks.",
                given=f"{type(optimizer).__name__}.step() after submodules of it, or a generator method, ran directly",
                fix="call model(...) itself, or model.mark_forward_method(name) for a method that runs submodules",
            )


def check_module(module: nn.Module) -> None:
    """Raise unless ``module`` can be extended; nothing is changed.

    Raises:
        FabricTypeError: A scripted module, a lazy one that is not materialised yet, or a class that takes no extension.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise FabricTypeError(
            "A scripted module cannot be extended in place.",
            given=f"{type(module).__name__} of {getattr(module, 'original_name', '?')}",
            fix="set up the plain module before torch.jit.script, or use torch.compile",
        )
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.lazy.LazyModuleMixin) and child.has_uninitialized_params():  # type: ignore[misc]
            raise FabricTypeError(
                f"{type(child).__name__} is a lazy module whose parameters have no shape yet.",
                given=f"{name or 'the module itself'} in {type(module).__name__}",
                fix="run one forward pass before setup",
            )
    check_extendable(module, _quiet_members)


def extend_module(module: nn.Module, extension: ModuleExtension) -> None:
    """Extend ``module`` in place.

    On one device in ``32-true`` the class is extended, but defines no ``forward``: nothing runs between the user and
    torch.
    """
    if extension.engine is None and not extension.hooked and not extension.precision.changes_forward:
        extend(module, _quiet_members, extension)
    elif (original := compiled_from(module)) is not None:
        # The engine stands around the compiled module; calls of the module inside are routed like any other.
        extend(module, _compiled_module_members, extension)
        extend(original, _routed_members, extension)
    else:
        compiled = module.__dict__.get("_compiled_call_impl")
        extend(module, _hooked_members if extension.hooked else _routed_members, extension)
        if compiled is not None:
            _route_compiled_call(module, extension, compiled)


def release_module(module: nn.Module) -> None:
    """Give back the plain module; a compiled call stays compiled."""
    original = compiled_from(module)
    extension: ModuleExtension = release(module)
    if original is not None and extension_of(original) is extension:
        release(original)
    if extension.compiled is not None:
        module.__dict__["_compiled_call_impl"] = extension.compiled
    for handle in extension.handles:
        handle.remove()
    # The engine holds the module and the module its engine: cut, so that memory goes without the collector.
    extension.engine = extension.target = extension.compiled = None


def compiled_from(module: Any) -> nn.Module | None:
    """The module behind the one that ``torch.compile(module)`` returned; None for any other module."""
    children = module.__dict__.get("_modules", {})
    return children["_orig_mod"] if "_orig_mod" in children else None  # noqa: SIM401 - no dict in scripted modules


class ForwardRoute:
    """A data descriptor: ``forward`` is the route, also after the user assigns another ``forward`` to the object.

    A late ``model.forward = f`` on a plain class would hide the route, and skip gradient synchronisation silently.

    Args:
        kind: The user's class; its ``forward`` is looked up at each call, since programs exchange it.
        reach: How a call from outside goes on: ``reach(module, extension, target, args, kwargs)``.
    """

    def __init__(self, kind: type, reach: Callable[..., Any]) -> None:
        self.kind = kind

        @functools.wraps(getattr(kind, "forward"))  # noqa: B009 - typed as a plain class
        def route(self: Any, *args: Any, **kwargs: Any) -> Any:
            user_forward: Any = kind.forward  # type: ignore[attr-defined]
            extension = self.__dict__.get(HOLDER)
            target = self.__dict__.get("forward")
            if target is None:
                # No bound method: torch.compile would rebuild it as self.forward, which is this route.
                target = functools.partial(user_forward, self)
            if extension is None:  # made by self.__class__(...), so not set up
                return target(*args, **kwargs)
            if extension.is_inside:
                extension.check_thread()
                return target(*args, **kwargs)
            return reach(self, extension, target, args, kwargs)

        self.route = route

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self.kind.forward  # type: ignore[attr-defined]
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
    def reach(_: Any, extension: ModuleExtension, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return extension.enter(target, args, kwargs)

    methods = {name: _guarded(kind, name) for name in _own_methods(kind)}
    return {**_quiet_members(kind), **methods, "forward": ForwardRoute(kind, reach), "compile": _compile}


def _compiled_module_members(kind: type) -> dict[str, Any]:
    # An OptimizedModule keeps its compiled call as a ``forward`` of its own, which the route finds and runs.
    def reach(_: Any, extension: ModuleExtension, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return extension.enter(functools.partial(extension.inside, target), (args, kwargs), {})

    return {**_quiet_members(kind), "forward": ForwardRoute(kind, reach)}


def _hooked_members(kind: type) -> dict[str, Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        extension = self.__dict__.get(HOLDER)
        plain_call = functools.partial(kind.__call__, self)
        if extension is None or extension.is_inside:
            return plain_call(*args, **kwargs)
        return extension.enter(functools.partial(extension.inside, plain_call), (args, kwargs), {})

    def reach(module: Any, _: ModuleExtension, __: Any, args: Any, kwargs: Any) -> Any:
        return module(*args, **kwargs)

    copies = {"__deepcopy__": _refuse_copy, "__reduce_ex__": _refuse_copy}
    return {**_quiet_members(kind), **copies, "__call__": call, "forward": ForwardRoute(kind, reach)}


def _refuse_copy(self: Any, _: Any) -> Any:
    """A copy would hold this rank's shards, and hooks that no rank shares."""
    raise StrategyError(
        f"A {type(self).__name__} that is sharded over the ranks cannot be copied or pickled.",
        given="copy.deepcopy, pickle or torch.save(model)",
        fix="fabric.save(path, {'model': model}), or get_model_state_dict of torch.distributed.checkpoint.state_dict",
    )


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
        if extension.is_inside:
            return compiled(*args, **kwargs)
        return extension.enter(functools.partial(extension.inside, compiled), (args, kwargs), {})

    # nn.Module.__call__ runs this instead of its own way through the hooks; those are inside the compiled call.
    module.__dict__["_compiled_call_impl"] = call


def _own_methods(kind: type) -> set[str]:
    """The names of public methods that the user's classes define and nn.Module does not have."""
    return {
        name
        for parent in kind.__mro__
        for name, value in parent.__dict__.items()
        if inspect.isfunction(value) and not name.startswith("_") and not hasattr(nn.Module, name)
    }


def _guarded(kind: type, name: str) -> Callable[..., Any]:
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
        around = id(submodule) in inner and not extension.is_inside and torch.is_grad_enabled() and not _in_backward()
        if around and any(parameter.requires_grad for parameter in submodule.parameters()):
            raise StrategyError(
                f"{type(module).__name__}.{name}() runs {type(submodule).__name__} directly, "
                "so its gradients would not be synchronised between the ranks.",
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


def _mark_forward_method(self: Any, method: Any) -> None:
    """Let a method other than ``forward`` go through the strategy and precision, like ``forward``.

    Args:
        method: A method of the model's class, or its name.

    Raises:
        FabricTypeError: The class has no such method.
    """
    name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    kind = user_class(type(self))
    if not inspect.isfunction(getattr(kind, name, None)) or name in self.__dict__:
        raise FabricTypeError(
            f"{kind.__name__} has no method {name!r} to mark.",
            given=f"mark_forward_method({method!r})",
            fix="a method that the model's class defines, or its name",
        )
    extension: ModuleExtension = self.__dict__[HOLDER]
    if extension.hooked:
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(self, name)
    elif "forward" in type(self).__dict__ and name not in type(self).__dict__:
        setattr(type(self), name, _guarded(kind, name))  # a private one, or one that nn.Module has as well
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
