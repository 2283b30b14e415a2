"""Modules whose engine is made of their own forward hooks (``fully_shard``): compiling, methods, evaluation.

Torch's hooks stand in the way of each call, and its compiler does not look into them. So a compiled model is compiled
inside of them: block by block, which compiles repeated blocks once.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fabric_lite.adopt import HOLDER
from fabric_lite.errors import StrategyError
from fabric_lite.extension import ModuleExtension, in_backward
from fabric_lite.trees import map_leaves

__all__ = [
    "call_from_outside",
    "check_not_shared",
    "compile_inside",
    "explained",
    "move_back",
    "move_compiled_call",
    "options_of",
    "return_no_views",
    "sharded_parts",
]


def sharded_parts(module: nn.Module) -> list[Any]:
    """``module`` and its submodules on which ``fully_shard`` was called, outer ones first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not loaded: nothing can be sharded
    return [] if fsdp is None else [part for part in module.modules() if isinstance(part, fsdp.FSDPModule)]


def call_from_outside(
    extension: ModuleExtension, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run ``target``, which runs the hooks, in the run's precision; after an evaluation nothing stays gathered."""
    if torch.compiler.is_compiling() or in_backward():
        return extension.enter(functools.partial(extension.inside, target), (args, kwargs), {})
    if not extension.is_prepared:
        _prepare(extension)
    output = extension.enter(functools.partial(extension.inside, target), (args, kwargs), {})
    if not torch.is_grad_enabled():
        # Torch keeps the root's parameters for the backward to come: memory here, and after a step they are stale.
        for part in extension.sharded:
            part.reshard()
    return output


def _prepare(extension: ModuleExtension) -> None:
    """Before the first call of a sharded model from outside."""
    states = [part._get_fsdp_state() for part in extension.sharded]
    if states and states[0]._is_root is None:
        # A block, or a model set up by itself, that ran before took itself for the root; torch would refuse the whole.
        for state in states[1:]:
            state._is_root = None
    if torch.is_inference_mode_enabled():
        # Torch gathers into the same tensors ever after, and training may not write to those of inference.
        with torch.inference_mode(False):
            for part in extension.sharded:
                part.unshard()
                part.reshard()
    extension.is_prepared = True


def check_not_shared(module: nn.Module) -> None:
    """Raise if a part of ``module`` is sharded as a part of another model.

    Raises:
        StrategyError: Then its parameters are gathered by a forward of that model alone.
    """
    inside = {child for part in sharded_parts(module) for child in part.modules()}
    for name, child in module.named_modules():
        if child not in inside and child.__dict__.get("_is_fsdp_managed_module"):  # torch's mark for its compiler
            raise StrategyError(
                f"{type(child).__name__} is sharded as a part of another model, whose forward alone gathers it.",
                given=f"{name or 'the module itself'} in {type(module).__name__}",
                fix="set up the shared part by itself first, then the models that hold it",
            )


def move_compiled_call(module: nn.Module, extension: ModuleExtension) -> None:
    """Where a compiled module has sharded blocks below it, compile those in its place.

    What was there stands in ``extension.moved``, until :func:`move_back`.

    Raises:
        StrategyError: This torch does not show what the module was compiled with.
    """
    for child in list(module.modules()):
        compiled = child.__dict__.get("_compiled_call_impl")
        if compiled is not None and len(sharded_parts(child)) > (child in extension.sharded):
            _set_compiled_call(child, None, extension)
            options = options_of(compiled)
            if options is not None:
                compile_inside(child, options, extension)


def compile_inside(module: nn.Module, options: Callable[..., Any], extension: ModuleExtension) -> None:
    """Compile the innermost sharded blocks of ``module``, or ``module`` where it has none, inside their hooks.

    Blocks that the user has compiled stay as they are.

    Args:
        module: A sharded module.
        options: Turns a function into a compiled one.
        extension: Remembers what was there.
    """
    blocks = [part for part in sharded_parts(module) if part is not module]
    for block in blocks or [module]:
        is_innermost = not blocks or len(sharded_parts(block)) == 1
        # OptimizedModule: torch.compile(block) by the user.
        if is_innermost and block._compiled_call_impl is None and "_orig_mod" not in block._modules:
            _set_compiled_call(block, options(block._call_impl), extension)


def move_back(extension: ModuleExtension) -> None:
    """Undo :func:`move_compiled_call` and :func:`compile_inside`."""
    while extension.moved:
        module, compiled = extension.moved.pop()
        module.__dict__["_compiled_call_impl"] = compiled


def _set_compiled_call(module: nn.Module, compiled: Callable[..., Any] | None, extension: ModuleExtension) -> None:
    extension.moved.append((module, module.__dict__.get("_compiled_call_impl")))
    # In the object, as Module.compile does; a class attribute says that there is none.
    module.__dict__["_compiled_call_impl"] = compiled


def options_of(compiled: Any) -> Callable[..., Any] | None:
    """What ``torch.compile(...)`` without a function returned on the way to ``compiled``; None: ``disable=True``."""
    if not hasattr(compiled, "_torchdynamo_orig_callable"):
        return None
    cells = dict(zip(compiled.__code__.co_freevars, compiled.__closure__ or (), strict=True))
    if "self" not in cells:
        raise StrategyError(
            "This torch does not show how the model was compiled, so its sharded blocks cannot be compiled alike.",
            given=f"torch {torch.__version__}, model.compile() before setup",
            fix="model.compile() after setup, or block.compile() for each block before it",
        )
    options: Callable[..., Any] = cells["self"].cell_contents
    return options


def explained(kind: type, name: str) -> Callable[..., Any]:
    """A method of a sharded model: when it is marked it gathers the root's parameters, else it says what it lacks."""

    @functools.wraps(getattr(kind, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        function: Any = getattr(kind, name)
        extension: ModuleExtension | None = self.__dict__.get(HOLDER)
        if extension is None:
            return function(self, *args, **kwargs)
        if name in extension.forward_methods:
            if extension.is_inside:
                return map_leaves(_without_view, function(self, *args, **kwargs))
            return call_from_outside(extension, extension.forward_methods[name], args, kwargs)
        try:
            return function(self, *args, **kwargs)
        except RuntimeError as error:
            if extension.is_inside or "got mixed torch.Tensor and DTensor" not in str(error):
                raise
            raise StrategyError(
                f"{kind.__name__}.{name}() uses parameters that are in shards: only forward gathers them.",
                given=f"a call of {name}() on a model whose parameters are sharded over the ranks",
                fix=f"model.mark_forward_method({name!r}) after setup, or call self(...) in {name}()",
            ) from error

    return method


def return_no_views(parts: Sequence[nn.Module]) -> list[Any]:
    """Let sharded modules return tensors that are no views; returns the hooks' handles.

    ``nn.Linear`` of a 3-dim input returns a view, and so do most models. The hook by which torch gathers parameters in
    backward is lost when the user changes a view in place (``logits /= temperature``), so torch warns at every call.
    """
    hook = torch.compiler.disable(_return_no_view)
    return [part.register_forward_hook(hook, prepend=True) for part in parts]  # before torch's own


def _return_no_view(_: nn.Module, __: Any, output: Any) -> Any:
    return _without_view(output) if isinstance(output, torch.Tensor) else map_leaves(_without_view, output)


def _without_view(leaf: Any) -> Any:
    return _Alias.apply(leaf) if isinstance(leaf, torch.Tensor) and leaf.requires_grad and leaf._is_view() else leaf


class _Alias(torch.autograd.Function):
    """The same memory and version counter, so that autograd still sees changes in place, but no view to autograd."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient
