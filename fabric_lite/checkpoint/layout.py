"""Sharded tensors (DTensors): which rank has which part of them."""

from __future__ import annotations

import dataclasses
import math
import sys
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from fabric_lite.checkpoint.boxes import Box
from fabric_lite.collectives import gather_objects, rank
from fabric_lite.errors import CheckpointError

__all__ = ["AgreedPlan", "Held", "Shard", "ShardPlan", "held", "is_sharded", "local_box", "shard_plan"]


def is_sharded(value: Any) -> bool:
    """Whether ``value`` is a DTensor; asks without importing torch.distributed.tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_box(tensor: Any) -> Box:
    """Offset and shape of the box of the whole tensor that a DTensor holds on this rank; nothing is communicated.

    The shape has a 0 where the rank holds nothing. No placement may be partial.
    """
    # Private, and the only function that knows uneven shards and the strided ones of FSDP over tensor parallel.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset), tuple(shape)


class Shard(NamedTuple):
    """What this rank holds of a sharded tensor.

    Args:
        shape: The whole tensor's.
        dtype: Of the whole and of the part.
        local: The box on this rank, without gradient; it may be empty.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    local: torch.Tensor


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """How the sharded tensors of all ranks make up the whole ones; but for the data the same on every rank.

    Args:
        tensors: This rank's shards by their places, in order.
        same_as: Place to place: a tensor that is the memory of an earlier one (tied weights).
        writers: For every other place its boxes, as offset and shape, each with one rank that has it.
    """

    tensors: dict[str, Shard]
    same_as: dict[str, str]
    writers: dict[str, dict[Box, int]]

    def written_by(self, number: int) -> list[str]:
        """The places of the tensors of which this rank writes or sends a box."""
        return [place for place, writers in self.writers.items() if number in writers.values()]


def _as_boxes(tensor: Any) -> Any:
    """Return a DTensor of which every rank holds one box: ``tensor`` itself, or else a copy that is whole everywhere.

    Every rank of its mesh calls it, since sums that were not made yet (Partial) are made.
    """
    from torch.distributed.tensor import Replicate

    if _is_a_box(tensor):
        return tensor
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


class _Share(NamedTuple):
    """What one rank holds of a tensor: the box, None where it is empty; the first place with this memory."""

    box: Box | None
    same_as: str


class Held(NamedTuple):
    """What one rank says of its DTensors, in the order of their places.

    Args:
        described: Place, shape, dtype and placements of each: alike on all ranks.
        shares: What it has of each; None where some have to be laid out anew first.
    """

    described: list[tuple[str, tuple[int, ...], str, str]]
    shares: list[_Share] | None


class AgreedPlan:
    """A plan that was made of what all ranks held. It holds good as long as each of them holds what it held.

    Args:
        plan: As it was made.
        sharded: This rank's DTensors by their places, of which it was made.
    """

    def __init__(self, plan: ShardPlan, sharded: Mapping[str, Any]) -> None:
        self._same_as, self._writers = plan.same_as, plan.writers
        self._held = held(sharded)
        self._see(plan.tensors, sharded)

    @torch.no_grad()
    def now(self, sharded: Mapping[str, Any]) -> ShardPlan | None:
        """The plan of this rank's DTensors as they are now; None if they are laid out otherwise than they were.

        Those that are the same objects in the same memory are not described anew: the training waits.
        """
        if self._held.shares is None:
            return None
        shards = {place: _shard(sharded[place]) for place in sorted(sharded)}
        are_the_same = shards.keys() == self._seen.keys() and all(
            self._seen[place].is_still(sharded[place], shard.local) for place, shard in shards.items()
        )
        if not are_the_same:
            if held(sharded) != self._held:
                return None
            self._see(shards, sharded)
        return ShardPlan(shards, self._same_as, self._writers)

    def _see(self, shards: Mapping[str, Shard], sharded: Mapping[str, Any]) -> None:
        self._seen = {place: _Seen.of(sharded[place], shard.local) for place, shard in shards.items()}


class _Seen(NamedTuple):
    """By what a DTensor and its part on this rank are known again."""

    tensor: weakref.ref[Any]
    address: int
    placements: Any

    @staticmethod
    def of(tensor: Any, local: torch.Tensor) -> _Seen:
        return _Seen(weakref.ref(tensor), local.data_ptr(), tensor.placements)

    def is_still(self, tensor: Any, local: torch.Tensor) -> bool:
        is_laid_out_alike = self.placements is tensor.placements and self.address == local.data_ptr()
        return is_laid_out_alike and self.tensor() is tensor


@torch.no_grad()
def held(sharded: Mapping[str, Any]) -> Held:
    """What this rank has to say of its DTensors, by their places; nothing is communicated."""
    layouts = _Layouts()
    own = {place: layouts.of(sharded[place]) for place in sorted(sharded)}
    described = [(place, *layout.description) for place, layout in own.items()]
    return Held(described, _shares(sharded, own) if all(layout.is_a_box for layout in own.values()) else None)


@torch.no_grad()
def shard_plan(sharded: Mapping[str, Any], by_rank: list[Held]) -> ShardPlan:
    """Say who has which part of which tensor. Every rank calls it.

    A tensor whose parts are no boxes, or are sums that were not made yet, is a copy in the plan, whole on every rank.

    Args:
        sharded: This rank's DTensors by their places.
        by_rank: What each rank :func:`held`.

    Raises:
        CheckpointError: The ranks hold different DTensors.
    """
    # Compared before any of them is redistributed: a rank that does not hold it would be waited for in vain.
    mine = by_rank[rank()].described
    if any(other.described != mine for other in by_rank):
        raise CheckpointError(
            "The ranks hold different sharded tensors, so they can't be put together.",
            given=f"{len(mine)} on rank {rank()}",
            fix="save the same objects on every rank, after the same steps",
        )
    tensors = {place: sharded[place] for place in sorted(sharded)}
    shares = [other.shares for other in by_rank]
    if any(share is None for share in shares):
        tensors = {place: _as_boxes(tensor) for place, tensor in tensors.items()}
        layouts = _Layouts()
        shares = gather_objects(_shares(tensors, {place: layouts.of(tensor) for place, tensor in tensors.items()}))
    plan = ShardPlan({place: _shard(tensor) for place, tensor in tensors.items()}, {}, {})
    for index, place in enumerate(tensors):
        held_of_it = [share[index] for share in shares if share is not None]
        # A rank that holds nothing of a tensor can't tell whose memory it is.
        owners = {share.same_as for share in held_of_it if share.box is not None}
        if len(owners) == 1 and owners != {place}:
            plan.same_as[place] = owners.pop()
            continue
        writers = plan.writers[place] = {}
        for number, share in enumerate(held_of_it):
            if share.box is not None:
                writers.setdefault(share.box, number)
    return plan


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What is to be known of a DTensor's layout: shape, dtype and placements in words, alike on all ranks; the box."""

    description: tuple[tuple[int, ...], str, str]
    is_a_box: bool
    box: Box | None


class _Layouts:
    """The layouts of DTensors, each found out once: most of many tensors are laid out alike, and the training waits."""

    def __init__(self) -> None:
        self._layouts: dict[Any, _Layout] = {}

    def of(self, tensor: Any) -> _Layout:
        key = tensor.shape, tensor.dtype, tensor.placements, id(tensor.device_mesh)
        layout = self._layouts.get(key)
        if layout is None:
            description = tuple(tensor.shape), str(tensor.dtype), str(tensor.placements)
            is_a_box = _is_a_box(tensor)
            layout = _Layout(description, is_a_box, local_box(tensor) if is_a_box else None)
            self._layouts[key] = layout
        return layout


def _shard(tensor: Any) -> Shard:
    local = tensor.to_local()
    return Shard(tuple(tensor.shape), tensor.dtype, local.detach() if local.requires_grad else local)


def _share(tensor: Any, place: str, first: dict[Any, str], layout: _Layout) -> _Share:
    local = tensor.to_local()
    if local.numel() == 0:
        return _Share(None, place)
    identity = local.data_ptr(), local.shape, local.stride(), id(layout)
    return _Share(layout.box, first.setdefault(identity, place))


def _shares(tensors: Mapping[str, Any], layouts: Mapping[str, _Layout]) -> list[_Share]:
    first: dict[Any, str] = {}
    return [_share(tensors[place], place, first, layout) for place, layout in layouts.items()]


def _is_a_box(tensor: Any) -> bool:
    """Whether each rank holds one box of a DTensor."""
    return all(
        placement.is_replicate() or _cuts_a_box(tensor, axis) for axis, placement in enumerate(tensor.placements)
    )


def _cuts_a_box(tensor: Any, axis: int) -> bool:
    """Whether a rank's part along this axis of the mesh is in one piece."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    placement = tensor.placements[axis]
    if not isinstance(placement, _StridedShard):
        return isinstance(placement, Shard)
    # Cut first by the later axes, as FSDP over tensor parallel does it: those put its strips side by side again.
    later = range(axis + 1, len(tensor.placements))
    cuts = [tensor.device_mesh.size(other) for other in later if tensor.placements[other].is_shard(placement.dim)]
    return math.prod(cuts) == placement.split_factor
