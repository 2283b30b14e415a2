"""A sharded tensor's whole content, block after block on rank 0, without a whole tensor anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from fabric_lite.checkpoint.boxes import Box, common
from fabric_lite.checkpoint.part_writing import STAGING_BYTES, bytes_of, row_major_boxes
from fabric_lite.collectives import rank

__all__ = ["Gathering"]


class Gathering:
    """Brings whole DTensors to rank 0, one after the other, through two buffers of ``STAGING_BYTES`` at most.

    ``full_tensor()`` would hold each several times on every rank, and in what the allocator keeps.
    """

    def __init__(self) -> None:
        self._whole = torch.empty(0, dtype=torch.uint8)
        self._travelling: dict[torch.device, torch.Tensor] = {}

    def blocks(self, tensor: Any, writers: Mapping[Box, int]) -> Iterator[memoryview]:
        """Yield the bytes of a whole DTensor in row-major order, on rank 0; every rank iterates to the end.

        Args:
            tensor: A DTensor of a ``ShardPlan``: each rank has one box of it.
            writers: Its boxes, each with one rank that has it, as in the plan.
        """
        local, dtype = tensor.to_local().detach(), tensor.dtype
        order = sorted(writers.items())
        for block in row_major_boxes(tuple(tensor.shape), STAGING_BYTES // dtype.itemsize):
            whole = self._whole_block(dtype, block[1]) if rank() == 0 else None
            for box, writer in order:
                shared = common(block, box)
                if shared is None or rank() not in (0, writer):
                    continue
                mine = local[_slices(shared, box)] if rank() == writer else None
                # Pieces travel on the tensor's own device: the ranks have a backend for that.
                values = mine if writer == 0 else _moved(mine, shared[1], dtype, self._buffer(local.device), writer)
                if whole is not None and values is not None:
                    whole[_slices(shared, block)].copy_(values)
            if whole is not None:
                yield bytes_of(whole)

    def _whole_block(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        if not len(self._whole):
            self._whole = torch.empty(STAGING_BYTES, dtype=torch.uint8)
        return _viewed(self._whole, dtype, shape)

    def _buffer(self, device: torch.device) -> torch.Tensor:
        if device not in self._travelling:
            self._travelling[device] = torch.empty(STAGING_BYTES, dtype=torch.uint8, device=device)
        return self._travelling[device]


def _moved(
    mine: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, travelling: torch.Tensor, writer: int
) -> torch.Tensor:
    """The values of ``shape`` on rank 0, sent by rank ``writer``; as bytes, since backends don't know all dtypes."""
    buffer = _viewed(travelling, dtype, shape)
    raw = travelling[: buffer.numel() * dtype.itemsize]
    if mine is None:
        dist.recv(raw, writer)
    else:
        buffer.copy_(mine)
        dist.send(raw, 0)
    return buffer


def _viewed(buffer: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return buffer[: count * dtype.itemsize].view(dtype).view(shape)


def _slices(box: Box, around: Box) -> tuple[slice, ...]:
    """Where a box is in one that contains it."""
    starts = [begin - first for begin, first in zip(box[0], around[0], strict=True)]
    return tuple(slice(start, start + size) for start, size in zip(starts, box[1], strict=True))
