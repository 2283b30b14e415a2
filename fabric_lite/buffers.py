"""Running statistics that follow rank 0's, where no engine broadcasts buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.modules.batchnorm import _NormBase

from fabric_lite.extension import recomputes

__all__ = ["keep_statistics_alike", "keeps_statistics"]


def keep_statistics_alike(module: nn.Module, group: Any, is_synchronizing: Callable[[], bool]) -> Any:
    """Let BatchNorm's running statistics follow rank 0's, so that the model evaluates alike on all ranks.

    They are broadcast after each training forward that synchronizes, one collective per dtype: what DDP does. Constant
    buffers (masks, rotary tables) are not sent.

    Args:
        module: The whole model; each call of it with gradients on is made by every rank of ``group``.
        group: The ranks that follow its first one; None is all.
        is_synchronizing: Whether the step being run synchronizes gradients.

    Returns:
        A handle with ``remove()``; None, and no hook at all, if no submodule keeps running statistics.
    """
    if not any(keeps_statistics(child) for child in module.modules()):
        return None

    def broadcast(root: nn.Module, *_: Any) -> None:
        if root.training and torch.is_grad_enabled() and is_synchronizing() and not recomputes():
            _broadcast(list(_running_statistics(root)), group)

    # A compiled model runs its hooks under the compiler, and this one is a collective.
    return module.register_forward_hook(torch.compiler.disable(broadcast))


def keeps_statistics(module: nn.Module) -> bool:
    """Whether ``module`` is a BatchNorm, or another norm, with running statistics."""
    return isinstance(module, _NormBase) and module.track_running_stats


def _running_statistics(module: nn.Module) -> Iterator[torch.Tensor]:
    """Those that a training forward changes; the statistics of a frozen layer are needed as they are in backward."""
    for child in module.modules():
        if keeps_statistics(child) and child.training:
            yield from child.buffers(recurse=False)


def _broadcast(buffers: list[torch.Tensor], group: Any) -> None:
    for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
        # Data, since autograd keeps the statistics for backward (and reads none of them there): it would see a change.
        alike = [buffer.data for buffer in buffers if buffer.dtype == dtype]
        flat = _flatten_dense_tensors(alike)
        dist.broadcast(flat, group=group, group_src=0)
        for buffer, received in zip(alike, _unflatten_dense_tensors(flat, alike), strict=True):
            buffer.copy_(received)
