"""What ``setup`` adds to a module, and how a call goes through it: precision, engine, the user's own ``forward``."""

from __future__ import annotations

import dataclasses
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from fabric_lite.errors import FabricRuntimeError, StrategyError
from fabric_lite.precision import Precision
from fabric_lite.trees import map_leaves

__all__ = ["ModuleExtension", "in_backward", "recomputes"]


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
        reset: Called before each forward from outside, see ``Engine``.
        handles: Hooks that are removed on release.
        gathers: Whether forwards without gradients go through the engine too, which alone has whole parameters.
        is_copyable: Whether a copy or a pickle of the module is a plain one.
    """

    owner: Any
    device_type: str
    precision: Precision
    engine: nn.Module | None = None
    hooked: bool = False
    reset: Callable[[], None] | None = None
    handles: list[Any] = dataclasses.field(default_factory=list)
    gathers: bool = False
    is_copyable: bool = True
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
    # What sharding has exchanged: the parameters before, held weakly, and their names.
    former: Sequence[tuple[weakref.ref[torch.Tensor], str]] = ()
    # Under hooks: the sharded parts, outer ones first, and whether they have been made ready for a first call; marked
    # methods with torch's hooks around them; and where compiled calls were changed until release, what was there.
    sharded: list[Any] = dataclasses.field(default_factory=list)
    is_prepared: bool = False
    forward_methods: dict[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    moved: list[tuple[nn.Module, Callable[..., Any] | None]] = dataclasses.field(default_factory=list)
    # Contexts of the run's precision that nobody is in, by whether autocast keeps what it has cast in a cache.
    autocasts: dict[bool, list[torch.autocast]] = dataclasses.field(default_factory=lambda: {True: [], False: []})
    # How many blocks of no_backward_sync are open, and whether gradients of shards wait for a backward outside of one.
    windows: int = 0
    waits: bool = False

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the engine calls back."""
        assert self.target is not None
        return self.target(*args, **kwargs)

    def enter(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run ``target`` in the run's precision, through the engine where gradients are to be synchronized."""
        if self.reset is not None and not torch.compiler.is_compiling() and not in_backward():
            self.reset()
        if self.waits and not self.windows and torch.is_grad_enabled():
            self.waits = False
        precision = self.precision
        run = self._through_engine if precision.context is None else self._in_context
        if precision.compute_dtype is not None:
            # A context takes longer to be made than to be entered. One that is under way, as in a model that calls
            # itself, is not entered again; one that an exception has left is not used again.
            free = None if torch.compiler.is_compiling() else self.autocasts[torch.is_autocast_cache_enabled()]
            context = free.pop() if free else torch.autocast(self.device_type, precision.compute_dtype)
            with context:
                output = run(target, args, kwargs)
            if free is not None:
                free.append(context)
        else:
            if precision.param_dtype is not None:
                args, kwargs = map_leaves(self._cast_input, args), map_leaves(self._cast_input, kwargs)
            output = run(target, args, kwargs)
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

    def _in_context(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        assert self.precision.context is not None
        with self.precision.context():
            return self._through_engine(target, args, kwargs)

    def _through_engine(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # Without gradients nothing is communicated: rank 0 may evaluate alone. Inside backward (recomputation by
        # activation checkpointing) the engine has had its forward already.
        engine = self.engine
        if engine is None or not (torch.is_grad_enabled() or self.gathers):
            return target(*args, **kwargs)
        if not torch.compiler.is_compiling():
            if in_backward() and recomputes():
                return target(*args, **kwargs)
            self.entries += 1  # in a compiled call, a counter would compile it anew each time
            if self.frozen:
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
                "Parameters were unfrozen after setup, so their gradients would not be synchronized.",
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


def in_backward() -> bool:
    """Whether this thread is inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


def recomputes() -> bool:
    """Whether this forward is a recomputation inside backward, whose first run went through the engine.

    Not so under torch's reentrant checkpoint: there the first run had no gradients, and this is the one that counts.
    """
    if torch.compiler.is_compiling() or not in_backward():
        return False
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.backward.__code__:
            return False
        frame = frame.f_back
    return True
