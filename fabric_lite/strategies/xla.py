"""One process that drives XLA devices: a TPU's, or for tests the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_lite.errors import FabricValueError
from fabric_lite.strategies.base import Engine, Placement, Strategy
from fabric_lite.trees import leaves

__all__ = ["XLAStrategy"]


@dataclasses.dataclass(frozen=True)
class XLAStrategy(Strategy):
    """A TPU by torch-xla; ``accelerator="tpu"`` takes it by itself.

    It needs torch-xla 2.9, the last one, which fits torch 2.9 alone: an environment of its own. What a step does is
    collected and compiled; it runs after ``optimizer.step()``, or when a value is looked at.

    Args:
        spmd: Whether this process drives all devices of the machine: parameters are on each of them, and each batch is
            split between them, along the first dim of the tensors that ``forward`` is given. Else it drives one.
    """

    spmd: bool = False

    @property
    def uses_several_processes(self) -> bool:
        return False

    @property
    def device_type(self) -> str | None:
        return "xla"

    def start(self) -> None:
        if self.spmd:
            import torch_xla.runtime as runtime

            runtime.use_spmd()

    def after_step(self, optimizer: Optimizer) -> None:
        import torch_xla

        torch_xla.sync()

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], run: Callable[..., Any], placement: Placement
    ) -> Engine:
        if not self.spmd:
            return Engine()
        split = _Split()
        return Engine(handles=(module.register_forward_pre_hook(split, with_kwargs=True),))


class _Split:
    """Before forward: splits its inputs between the devices, and lets XLA work out the rest."""

    def __init__(self) -> None:
        import numpy as np
        import torch_xla.distributed.spmd as spmd
        import torch_xla.runtime as runtime

        self._count = runtime.global_runtime_device_count()
        self._mesh = spmd.Mesh(np.arange(self._count), (self._count,), ("data",))
        self._mark = spmd.mark_sharding

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        for leaf in leaves((args, kwargs)):
            if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
                continue
            if leaf.size(0) % self._count:
                raise FabricValueError(
                    "A batch cannot be split evenly between the devices.",
                    given=f"an input of shape {tuple(leaf.shape)}, {self._count} devices",
                    fix=f"a batch size that is a multiple of {self._count}, and drop_last=True",
                )
            self._mark(leaf, self._mesh, ("data", *(None,) * (leaf.dim() - 1)))
