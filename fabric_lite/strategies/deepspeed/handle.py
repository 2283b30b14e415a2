"""What stands for one model, its optimizer and their engine; found again by any parameter."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_lite.errors import StrategyError
from fabric_lite.strategies.deepspeed.optimizers import Trained, follow_options

__all__ = ["Handle", "handle_of", "handles_of"]

_ATTRIBUTE = "_fabric_lite_zero"


def handle_of(parameter: torch.Tensor) -> Handle | None:
    """The handle of the engine that lays ``parameter`` out; None if none does."""
    found: Handle | None = getattr(parameter, "__dict__", {}).get(_ATTRIBUTE)
    return found


def handles_of(objects: Iterable[Any]) -> list[Handle]:
    """The handles of the engines of these modules and optimizers, each once and in order; other objects have none."""
    found: dict[int, Handle] = {}
    for item in objects:
        parameters: Iterable[torch.Tensor] = ()
        if isinstance(item, nn.Module):
            parameters = item.parameters()
        elif isinstance(item, Optimizer):
            parameters = [parameter for group in item.param_groups for parameter in group["params"]]
        for parameter in parameters:
            handle = handle_of(parameter)
            if handle is not None:
                found.setdefault(id(handle), handle)
    return list(found.values())


@dataclasses.dataclass(eq=False)
class Handle:
    """One engine, and where a step stands.

    Args:
        engine: DeepSpeed's.
        shell: What the engine calls for the module; its ``forward`` goes through the engine.
        partitions: The parts of parameters, gradients and optimizer state on this rank.
        module: The user's.
        optimizer: The user's.
        inner: DeepSpeed's copy of it, over the parts.
        trained: What it trained at setup.
        mesh: All ranks, on one axis.
        parameters: Those that are divided.
    """

    engine: Any
    shell: nn.Module
    partitions: Any
    module: weakref.ref[nn.Module]
    optimizer: weakref.ref[Optimizer]
    inner: Optimizer
    trained: Trained
    mesh: Any
    parameters: Sequence[nn.Parameter]
    # Blocks of no_backward_sync that are open; whether any backward has run, and gradients are final, since the step.
    windows: int = 0
    has_gradients: bool = False
    is_settled: bool = False

    def __post_init__(self) -> None:
        for parameter in self.parameters:
            setattr(parameter, _ATTRIBUTE, self)

    def before_backward(self) -> None:
        """Called in each backward through the engine's outputs, once.

        Raises:
            StrategyError: It would add to gradients that are reduced and clipped already.
        """
        if self.is_settled:
            raise StrategyError(
                "Gradients would be added to gradients that are clipped already.",
                given="fabric.clip_gradients(), then another backward before optimizer.step()",
                fix="clip once, after the last backward of the window; zero_grad() gives a window up",
            )
        # Not of a model that is frozen for a while, as the judge in a game of two.
        self.has_gradients |= any(parameter.requires_grad for parameter in self.parameters)

    def settle(self) -> None:
        """Reduce what waits, so that this rank's parts of the gradients are final; every rank calls."""
        if self.has_gradients and not self.is_settled:
            self.engine.settle()
            self.is_settled = True

    def gradients(self) -> list[torch.Tensor]:
        """This rank's parts of the gradients, each the ``grad`` of a stand-in that is sharded; every rank calls.

        What is done to them in place is done to those of the step.
        """
        self.settle()
        if not self.is_settled:
            return []
        return [self._stand_in(gradient) for gradient in self.partitions.gradients()]

    def _stand_in(self, gradient: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import DTensor, Shard

        part = DTensor.from_local(gradient.detach().view(-1), self.mesh, [Shard(0)], run_check=False)
        stand_in = part.detach()
        stand_in.grad = part
        return stand_in

    def step(self) -> None:
        """Step, as the user's optimizer says now; every rank calls. Nothing without a backward since the last one."""
        if not self.has_gradients:
            return
        optimizer = self.optimizer()
        assert optimizer is not None
        follow_options(self.inner, optimizer, self.trained)
        self.settle()
        try:
            was_taken = self.engine.take_step()
        finally:
            self.forget()
        if not was_taken:
            warnings.warn(
                "DeepSpeed skipped this step, since the norm of its gradients is not finite; with "
                "fabric.clip_gradients(model, optimizer, max_norm=...) it would have been an error",
                stacklevel=2,
            )

    def forget(self) -> None:
        """Drop all gradients."""
        self.partitions.forget()
        self.has_gradients = self.is_settled = False

    def recover(self) -> None:
        """Before a forward from outside: put right what an exception in an earlier one left."""
        self.engine.recover()

    def close(self) -> None:
        """Take DeepSpeed off the module, as far as this goes without the other ranks."""
        for parameter in self.parameters:
            parameter.__dict__.pop(_ATTRIBUTE, None)
        self.engine.let_go()
