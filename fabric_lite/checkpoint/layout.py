"""Sharded tensors (DTensors) made full for the file, and full tensors laid out as the run's tensors are."""

from __future__ import annotations

import sys
from typing import Any

import torch

from fabric_lite.collectives import broadcast_object, gather_objects, rank
from fabric_lite.errors import CheckpointError

__all__ = ["full_tensors", "is_sharded", "laid_out_like", "local_box"]


def is_sharded(value: Any) -> bool:
    """Whether ``value`` is a DTensor; asks without importing torch.distributed.tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_box(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and shape of the box of the whole tensor that a DTensor holds on this rank; nothing is communicated.

    The shape has a 0 where the rank holds nothing. No placement may be partial.
    """
    # Private, and the only function that knows uneven shards and the strided ones of FSDP over tensor parallel.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset), tuple(shape)


def full_tensors(sharded: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    """Return each DTensor in full, on the CPU, on rank 0; None on the other ranks.

    Every rank calls it. One tensor at a time is made full, in an order that all ranks share. Tensors that are the
    same memory on rank 0 (tied weights) stay the same.

    Raises:
        CheckpointError: The ranks hold different DTensors.
    """
    places = sorted(sharded)
    if any(other != places for other in gather_objects(places)):
        raise CheckpointError(
            "The ranks hold different sharded tensors, so they can't be put together.",
            given=f"{len(places)} on rank {rank()}",
            fix="save the same objects on every rank, after the same steps",
        )
    if not places:
        return {}
    same_as = broadcast_object(_aliases(sharded, places))
    full: dict[str, torch.Tensor | None] = {}
    for place in places:
        if place in same_as:
            full[place] = full[same_as[place]]
            continue
        whole = sharded[place].full_tensor()
        full[place] = whole.cpu() if rank() == 0 else None
    return full


def _aliases(sharded: dict[str, Any], places: list[str]) -> dict[str, str]:
    """The places whose tensor is that of an earlier place, by this rank's memory."""
    first: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    for place in places:
        tensor = sharded[place]
        local = tensor.to_local()
        if local.numel() == 0:
            continue
        identity = (local.data_ptr(), local.dtype, local.shape, local.stride(), tensor.shape, tensor.placements)
        if identity in first:
            aliases[place] = first[identity]
        first.setdefault(identity, place)
    return aliases


def laid_out_like(full: torch.Tensor, current: Any) -> torch.Tensor:
    """Return ``full`` with the placements of the DTensor ``current``, or as it is for any other ``current``.

    Nothing is communicated: every rank has the whole tensor and keeps its part.
    """
    if not is_sharded(current):
        return full
    from torch.distributed.tensor import Replicate, distribute_tensor

    fits = full.shape == current.shape
    placements = current.placements if fits else [Replicate()] * current.device_mesh.ndim
    return distribute_tensor(full, current.device_mesh, placements, src_data_rank=None)
