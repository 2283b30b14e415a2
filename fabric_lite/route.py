"""The way of a forward call: user's call -> precision -> engine -> the user's own ``forward``.

The engine (``DistributedDataParallel``, say) stands beside the module and calls it back, so every reference that the
user holds, old or new, trains correctly: ``model(x)``, ``model.forward(x)``, ``model.training_step(batch)``.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fabric_lite.adopt import HOLDER, check_extendable, extend, extension_of, release, user_class
from fabric_lite.errors import FabricTypeError, StrategyError
from fabric_lite.extension import ModuleExtension
from fabric_lite.guards import guarded, own_methods
from fabric_lite.hooked import (
    call_from_outside,
    check_not_shared,
    compile_inside,
    explained,
    move_back,
    move_compiled_call,
    return_no_views,
    sharded_parts,
)

__all__ = ["check_module", "extend_module", "release_module"]


def check_module(module: nn.Module) -> None:
    """Raise unless ``module`` can be extended; nothing is changed.

    Raises:
        FabricTypeError: A scripted module, a lazy one that is not materialized yet, or a class that takes no extension.
        StrategyError: A part of it is sharded as a part of another model.
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
    check_not_shared(module)
    check_extendable(module, _quiet_members)


def extend_module(module: nn.Module, extension: ModuleExtension) -> None:
    """Extend ``module`` in place.

    On one device in ``32-true`` the class is extended, but defines no ``forward``: nothing runs between the user and
    torch.
    """
    if extension.engine is None and not extension.hooked and not extension.precision.changes_forward:
        extend(module, _quiet_members, extension)
    elif extension.hooked:
        _extend_hooked(module, extension)
    elif (original := compiled_from(module)) is not None:
        # The engine stands around the compiled module; calls of the module inside are routed like any other.
        extend(module, _compiled_module_members, extension)
        extend(original, _routed_members, extension)
    else:
        compiled = module.__dict__.get("_compiled_call_impl")
        extend(module, _routed_members if extension.is_copyable else _uncopied_members, extension)
        if compiled is not None:
            _route_compiled_call(module, extension, compiled)


def _extend_hooked(module: Any, extension: ModuleExtension) -> None:
    """Extend a module that is sharded itself, or whose original is."""
    original = compiled_from(module)
    extension.sharded = sharded_parts(module)
    extension.handles += return_no_views(extension.sharded)
    if original is None or module in extension.sharded:
        extend(module, _hooked_members, extension)
        move_compiled_call(module, extension)
    else:
        extend(module, _shell_members, extension)
        extend(original, _hooked_members, extension)
        compile_inside(original, module.dynamo_ctx, extension)


def release_module(module: nn.Module) -> None:
    """Give back the plain module; a compiled call stays compiled."""
    original = compiled_from(module)
    extension: ModuleExtension = release(module)
    if original is not None and extension_of(original) is extension:
        release(original)
    if extension.compiled is not None:
        module.__dict__["_compiled_call_impl"] = extension.compiled
    move_back(extension)
    for handle in extension.handles:
        handle.remove()
    # The engine holds the module and the module its engine: cut, so that memory goes without the collector.
    extension.engine = extension.target = extension.compiled = extension.reset = None
    extension.sharded.clear()
    extension.forward_methods.clear()


def compiled_from(module: Any) -> nn.Module | None:
    """The module behind the one that ``torch.compile(module)`` returned; None for any other module."""
    children = module.__dict__.get("_modules", {})
    return children["_orig_mod"] if "_orig_mod" in children else None  # noqa: SIM401 - no dict in scripted modules


class ForwardRoute:
    """A data descriptor: ``forward`` is the route, also after the user assigns another ``forward`` to the object.

    A late ``model.forward = f`` on a plain class would hide the route, and skip gradient synchronization silently.

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

    methods = {name: guarded(kind, name) for name in own_methods(kind)}
    return {**_quiet_members(kind), **methods, "forward": ForwardRoute(kind, reach), "compile": _compile}


def _uncopied_members(kind: type) -> dict[str, Any]:
    return {**_routed_members(kind), **_NO_COPIES}


def _compiled_module_members(kind: type) -> dict[str, Any]:
    # An OptimizedModule keeps its compiled call as a ``forward`` of its own, which the route finds and runs.
    def reach(_: Any, extension: ModuleExtension, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return extension.enter(functools.partial(extension.inside, target), (args, kwargs), {})

    return {**_quiet_members(kind), "forward": ForwardRoute(kind, reach)}


def _shell_members(kind: type) -> dict[str, Any]:
    # An OptimizedModule around a sharded module, which is compiled inside its hooks and has the whole way of a call.
    def reach(module: Any, _: ModuleExtension, __: Any, args: Any, kwargs: Any) -> Any:
        return module.__dict__["_modules"]["_orig_mod"](*args, **kwargs)

    return {**_quiet_members(kind), **_NO_COPIES, "forward": ForwardRoute(kind, reach)}


def _hooked_members(kind: type) -> dict[str, Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        extension: ModuleExtension | None = self.__dict__.get(HOLDER)
        if extension is None or extension.is_inside:
            return kind.__call__(self, *args, **kwargs)
        return call_from_outside(extension, functools.partial(kind.__call__, self), args, kwargs)

    def reach(module: Any, _: ModuleExtension, __: Any, args: Any, kwargs: Any) -> Any:
        return module(*args, **kwargs)

    return {
        **_quiet_members(kind),
        **{name: explained(kind, name) for name in own_methods(kind)},
        **_NO_COPIES,
        "__call__": call,
        "compile": _compile_hooked,
        "forward": ForwardRoute(kind, reach),
    }


def _refuse_copy(self: Any, _: Any) -> Any:
    """A copy would hold this rank's shards, and hooks that no rank shares."""
    raise StrategyError(
        f"A {type(self).__name__} that is laid out over the ranks cannot be copied or pickled.",
        given="copy.deepcopy, pickle or torch.save(model)",
        fix="fabric.save(path, {'model': model}), or get_model_state_dict of torch.distributed.checkpoint.state_dict",
    )


_NO_COPIES = {"__deepcopy__": _refuse_copy, "__reduce_ex__": _refuse_copy}


def _compile(self: Any, *args: Any, **kwargs: Any) -> None:
    """Compile this module's forward; the compiled call stands inside the engine."""
    if HOLDER not in self.__dict__:
        super(type(self), self).compile(*args, **kwargs)
        return
    self.__dict__["_compiled_call_impl"] = None
    _route_compiled_call(self, self.__dict__[HOLDER], torch.compile(self._call_impl, *args, **kwargs))


def _compile_hooked(self: Any, *args: Any, **kwargs: Any) -> None:
    """Compile the sharded blocks, or this module's forward where it has none; the hooks stand around."""
    extension: ModuleExtension | None = self.__dict__.get(HOLDER)
    if extension is not None:
        move_back(extension)
    nn.Module.compile(self, *args, **kwargs)
    if extension is not None:
        move_compiled_call(self, extension)


def _route_compiled_call(module: nn.Module, extension: ModuleExtension, compiled: Callable[..., Any]) -> None:
    extension.compiled = compiled

    def call(*args: Any, **kwargs: Any) -> Any:
        if extension.is_inside:
            return compiled(*args, **kwargs)
        return extension.enter(functools.partial(extension.inside, compiled), (args, kwargs), {})

    # nn.Module.__call__ runs this instead of its own way through the hooks; those are inside the compiled call.
    module.__dict__["_compiled_call_impl"] = call


def _mark_forward_method(self: Any, method: Any) -> None:
    """Let a method other than ``forward`` go through the strategy and precision, like ``forward``.

    Args:
        method: A method of the model's class, or its name.

    Raises:
        FabricTypeError: The class has no such method.
    """
    name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    if compiled_from(self) is not None:
        self, method = compiled_from(self), name
    kind = user_class(type(self))
    if not inspect.isfunction(getattr(kind, name, None)) or name in self.__dict__:
        raise FabricTypeError(
            f"{kind.__name__} has no method {name!r} to mark.",
            given=f"mark_forward_method({method!r})",
            fix="a method that the model's class defines, or its name",
        )
    extension: ModuleExtension = self.__dict__[HOLDER]
    extended = type(self)
    if "forward" in extended.__dict__ and name not in extended.__dict__:
        # A private one, or one that nn.Module has as well.
        setattr(extended, name, explained(kind, name) if extension.hooked else guarded(kind, name))
    if extension.hooked:
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(self, name)
        # Torch puts it into the object; there it would hide the way through the run's precision.
        extension.forward_methods[name] = self.__dict__.pop(name)
    extension.marked_methods.add(name)
