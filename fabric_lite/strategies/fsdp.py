"""Sharded data parallelism: every rank holds a part of each parameter (``fully_shard``, FSDP2)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_lite.strategies.base import Engine, Placement, Strategy

__all__ = ["FSDPStrategy"]


@dataclasses.dataclass(frozen=True)
class FSDPStrategy(Strategy):
    """``fully_shard`` of the whole model, and of every child that is given a class in ``auto_wrap_policy``.

    Args:
        auto_wrap_policy: Classes of the blocks that are sharded, gathered and freed one by one.
        reshard_after_forward: Whether parameters are freed after forward and gathered again for backward.
    """

    auto_wrap_policy: frozenset[type[nn.Module]] = frozenset()
    reshard_after_forward: bool = True

    @property
    def is_sharded(self) -> bool:
        return True

    def mesh_axes(self, world_size: int, local_world_size: int) -> Mapping[str, int]:
        return {"shard": world_size}

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], run: Callable[..., Any], placement: Placement
    ) -> Engine:
        from torch.distributed.fsdp import fully_shard

        blocks = [child for child in module.modules() if type(child) in self.auto_wrap_policy and child is not module]
        for block in [*blocks, module]:
            fully_shard(block, mesh=placement.mesh, reshard_after_forward=self.reshard_after_forward)
        return Engine(hooked=True)

    @contextlib.contextmanager
    def no_sync(self, module: Any, engine: nn.Module | None) -> Iterator[None]:
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)

    def clip_grad_norm(
        self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> torch.Tensor:
        norm: Any = super().clip_grad_norm(parameters, max_norm, norm_type, error_if_nonfinite)
        return norm.full_tensor()
