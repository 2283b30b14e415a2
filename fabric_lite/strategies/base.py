"""What a strategy is: a layout over a ``DeviceMesh`` with a few verbs, each with a default."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_lite.clipping import clip_grad_norm, clip_grad_value
from fabric_lite.errors import StrategyError
from fabric_lite.precision import Precision

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Engine", "Placement", "Strategy"]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where and in what a model runs: what a strategy is handed.

    Args:
        device: This rank's device.
        precision: The run's dtypes.
        world_size: The number of ranks.
        mesh: All ranks, with the axes that :meth:`Strategy.mesh_axes` asked for; None where it asked for none.
        data_rank: Which share of the data this rank gets.
        data_world_size: Into how many shares the data is dealt; ranks of one tensor-parallel group get the same share.
    """

    device: torch.device
    precision: Precision
    world_size: int = 1
    mesh: DeviceMesh | None = None
    data_rank: int = 0
    data_world_size: int = 1


@dataclasses.dataclass(frozen=True)
class Engine:
    """What a strategy made of a module.

    Args:
        module: Its ``forward`` is called instead of the user's where gradients are on, and must call the ``run`` that
            ``wrap`` was given. None where the user's module itself is called.
        hooked: Whether the work is done by forward hooks on the user's module (as ``fully_shard`` does).
        reset: Called before a forward from outside; makes hooks usable again that an exception has interrupted.
        handles: Hooks that are removed when the module is released.
        gathers: Whether parameters are whole in ``module`` alone, so that forwards without gradients go there too, and
            every rank makes them.
        is_copyable: Whether a copy or a pickle of the user's module would be a plain module of its own.
    """

    module: nn.Module | None = None
    hooked: bool = False
    reset: Callable[[], None] | None = None
    handles: tuple[Any, ...] = ()
    gathers: bool = False
    is_copyable: bool = True


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Base of all strategies: one device, nothing to do. Subclasses are frozen dataclasses of options.

    Each verb has a default, so a strategy writes down only what it changes. Every rank calls every verb.

    Args:
        precision: The run's precision, or its name, as an alternative to ``Fabric(precision=)``, which fills it in
            otherwise.
    """

    precision: Precision | str | None = dataclasses.field(default=None, kw_only=True, compare=False)

    def with_precision(self, precision: Precision) -> Strategy:
        """Return the same strategy in that precision."""
        other = copy.copy(self)
        object.__setattr__(other, "precision", precision)  # also for a subclass with an __init__ of its own
        return other

    @property
    def uses_several_processes(self) -> bool:
        """Whether more than one rank can take part."""
        return True

    @property
    def device_type(self) -> str | None:
        """The only kind of device that it is for, by torch's name; None: any kind."""
        return None

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are spread over the ranks.

        Then ``init_module(empty_init=True)`` makes modules on the meta device, ``wrap`` is given them so, their values
        are filled in after it, and checkpoints are folders unless ``state_dict_type`` says otherwise.
        """
        return False

    @property
    def hides_gradients(self) -> bool:
        """Whether gradients wait where ``parameter.grad`` does not show them; ``zero_grad()`` then asks for
        :meth:`forget_unsynchronized`."""
        return self.is_sharded

    @property
    def state_dict_type(self) -> str:
        """What ``Fabric.save`` writes by default: "full", one file, or "sharded", a folder written by all ranks."""
        return "sharded" if self.is_sharded else "full"

    @property
    def data_axes(self) -> tuple[str, ...] | None:
        """The axes of the mesh along which ranks get different data; None: all ranks do."""
        return None

    def mesh_axes(self, world_size: int, local_world_size: int) -> Mapping[str, int]:
        """Return the mesh's axes, name to size, whose product is ``world_size``; empty: no mesh is needed.

        Args:
            world_size: The number of ranks.
            local_world_size: How many of them are on this node.
        """
        return {}

    def start(self) -> None:
        """Called once, before anything is put on a device."""

    def materialize(self, module: nn.Module, placement: Placement, fill: Callable[[torch.device], None] | None) -> None:
        """Give a module that was made on the meta device its memory and its values.

        Args:
            module: Laid out by :meth:`wrap` before, where the strategy is sharded.
            placement: Device, precision and mesh.
            fill: Gives it the values of an ordinary construction, on a device. None: it was not made in
                ``fabric.init_module()``, so nobody knows its values.

        Raises:
            StrategyError: ``fill`` is None, and the module has parameters or buffers on the meta device.
        """
        if fill is not None:
            fill(placement.device)
            return
        on_meta = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
        if on_meta:
            raise StrategyError(
                f"{type(module).__name__} has no values yet: it was made on the meta device.",
                given=f"{len(on_meta)} such tensors, the first is {on_meta[0]}",
                fix="make it in fabric.init_module(), with empty_init=True if its weights are loaded after setup by "
                "fabric.load_raw() or fabric.load()",
            )

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], run: Callable[..., Any], placement: Placement
    ) -> Engine:
        """Lay ``module``, already on its device and in its dtype, out over the ranks.

        Args:
            module: The user's module; it may be changed in place.
            optimizers: Those given to ``setup`` with it, for an engine that steps by itself; Fabric re-points their
                parameters afterward.
            run: What an engine beside the module calls in its own ``forward``, with the same arguments.
            placement: Device, precision and mesh.
        """
        return Engine()

    def unwrap(self, module: nn.Module) -> None:
        """Take off what :meth:`wrap` put on ``module`` itself, where that can be; Fabric drops the engine."""

    def no_sync(self, module: nn.Module, engine: nn.Module | None) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which gradients stay on their rank."""
        return contextlib.nullcontext()

    def backward(self, tensor: torch.Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Run backward from ``tensor``; ``module`` is what the user gave as ``fabric.backward(model=)``."""
        tensor.backward(*args, **kwargs)

    @property
    def owns_step(self) -> bool:
        """Whether ``optimizer.step()`` is to do nothing but call :meth:`step`."""
        return False

    def step(self, optimizer: Optimizer) -> None:
        """Step, where an engine owns the step; gradients and state are as the engine left them."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after each step of an optimizer; one that does not override it costs no step anything."""

    def clip_grad_norm(
        self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> torch.Tensor:
        """Scale gradients so that their norm over all ranks is at most ``max_norm``.

        Returns:
            The norm before, a plain 0-dim tensor, equal on all ranks.
        """
        return clip_grad_norm(parameters, max_norm, norm_type, error_if_nonfinite)

    def clip_grad_value(self, parameters: Iterable[torch.Tensor], clip_value: float) -> None:
        """Bring every element of the gradients into ``[-clip_value, clip_value]``."""
        clip_grad_value(parameters, clip_value)

    def holding_state(self, objects: Sequence[Any], changes: bool) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which modules and optimizers hold their state themselves, in tensors or DTensors.

        Around every save and load, for an engine that keeps values or optimizer state elsewhere.

        Args:
            objects: Those that are saved or loaded, in one order on all ranks; of them some are set up.
            changes: Whether what they hold at the end of the block is their state from then on, unless it raises.
        """
        return contextlib.nullcontext()

    def forget_unsynchronized(self, module: nn.Module, parameters: Container[int] | None = None) -> None:
        """Forget gradients that wait to be synchronized and that ``parameter.grad`` does not show.

        Args:
            module: Set up under this strategy.
            parameters: The ``id`` of each parameter it is about; None is all.
        """
