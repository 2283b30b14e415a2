"""A sharded tensor's whole content, block after block on rank 0, without a whole tensor anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from fabric_lite.checkpoint.boxes import Box, common
from fabric_lite.checkpoint.layout import Shard, ShardPlan
from fabric_lite.checkpoint.part_writing import STAGING_BYTES, bytes_of, row_major_boxes
from fabric_lite.checkpoint.together import Together, lost_ranks_explained
from fabric_lite.collectives import rank

__all__ = ["Gathering"]


class Gathering:
    """Brings whole sharded tensors to rank 0, one after the other, through two buffers of ``STAGING_BYTES`` at most.

    ``full_tensor()`` would hold each several times on every rank, and in what the allocator keeps. All memory is taken
    here, before the first piece travels: a rank that got none later would leave the others waiting for it.

    Args:
        plan: Of the tensors to bring; its ``local`` tensors of one rank are sent from their devices.
        together: Whose group the pieces travel through.
    """

    def __init__(self, plan: ShardPlan, together: Together) -> None:
        self._group = together.group
        shards = [plan.tensors[place] for place in plan.writers]
        largest = max((math.prod(shard.shape) * shard.dtype.itemsize for shard in shards), default=0)
        size = min(largest, STAGING_BYTES)
        self._whole = torch.empty(size if rank() == 0 else 0, dtype=torch.uint8, device="cpu")
        devices = {shard.local.device for shard in shards}
        self._traveling = {device: torch.empty(size, dtype=torch.uint8, device=device) for device in devices}

    def blocks(self, shard: Shard, writers: Mapping[Box, int]) -> Iterator[memoryview]:
        """Yield the bytes of a whole tensor in row-major order, on rank 0; every rank iterates to the end.

        Args:
            shard: What this rank has of it.
            writers: Its boxes, each with one rank that has it, as in the plan.
        """
        local, dtype = shard.local, shard.dtype
        order = sorted(writers.items())
        for block in row_major_boxes(shard.shape, STAGING_BYTES // dtype.itemsize):
            whole = _viewed(self._whole, dtype, block[1]) if rank() == 0 else None
            for box, writer in order:
                shared = common(block, box)
                if shared is None or rank() not in (0, writer):
                    continue
                mine = local[_slices(shared, box)] if rank() == writer else None
                # Pieces travel on the tensor's own device: the ranks have a backend for that.
                traveling = self._traveling[local.device]
                values = mine if writer == 0 else self._moved(mine, shared[1], dtype, traveling, writer)
                if whole is not None and values is not None:
                    whole[_slices(shared, block)].copy_(values)
            if whole is not None:
                yield bytes_of(whole)

    def _moved(
        self,
        mine: torch.Tensor | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        traveling: torch.Tensor,
        writer: int,
    ) -> torch.Tensor:
        """The values of ``shape`` on rank 0, from rank ``writer``; as bytes, since backends don't know all dtypes."""
        values = _viewed(traveling, dtype, shape)
        raw = traveling[: values.numel() * dtype.itemsize]
        if mine is not None:
            values.copy_(mine)
        with lost_ranks_explained("save()"):
            if mine is None:
                dist.recv(raw, writer, group=self._group)
            else:
                dist.send(raw, 0, group=self._group)
        return values


def _viewed(buffer: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return buffer[: count * dtype.itemsize].view(dtype).view(shape)


def _slices(box: Box, around: Box) -> tuple[slice, ...]:
    """Where a box is in one that contains it."""
    starts = [begin - first for begin, first in zip(box[0], around[0], strict=True)]
    return tuple(slice(start, start + size) for start, size in zip(starts, box[1], strict=True))
