"""One copy of what is to be written, in memory that is kept from save to save, so that training can go on."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fabric_lite.checkpoint.layout import Shard, ShardPlan, is_sharded
from fabric_lite.checkpoint.packing import packed
from fabric_lite.collectives import rank
from fabric_lite.trees import map_leaves

__all__ = ["Staged", "Staging"]

_Kind = tuple[torch.dtype, torch.Size, tuple[int, ...], bool]

_NUMBERS = (int, float)
_KEPT_SAVES = 4  # memory that none of so many saves has used is given back


class Staged:
    """Copies of content and shards, on the CPU, that may still be being filled.

    Args:
        content: Plain data that nobody changes any more, but for its tensors and bytearrays; None on the ranks that
            write none.
        copies: Of these, by ``id``.
        plan: With the copies of the shards; what is not written here is empty.
        events: After which all is filled.
    """

    def __init__(self, content: Any, copies: dict[int, Any], plan: ShardPlan, events: list[torch.cuda.Event]) -> None:
        self.plan = plan
        self._content, self._copies, self._events = content, copies, events

    def take(self) -> Any:
        """Wait until all is filled, and return the content with the copies in it, once: the tensors are let go of."""
        for event in self._events:
            event.synchronize()
        content, copies = self._content, self._copies
        self._content, self._copies = None, {}
        # A sharded tensor stands for its place.
        return map_leaves(lambda leaf: copies.get(id(leaf), leaf), content)


class Staging:
    """The memory of staged tensors; one save at a time uses it.

    Each copy is kept with its storage by dtype, shape and strides: tensors are made slowly. Of CUDA tensors it is
    pinned, and the copies are only queued: what the training loop queues behind them, the next step say, can't overtake
    them.

    ``allocations`` counts the copies that were made, of strided tensors.
    """

    def __init__(self) -> None:
        self.allocations = 0
        self._saves = 0
        # By layout and whether they are pinned: free copies, each with the number of the save that used it last.
        self._free: dict[_Kind, list[tuple[int, torch.Tensor]]] = {}
        self._taken: list[tuple[_Kind, torch.Tensor]] = []
        self._originals: list[torch.Tensor] = []  # of the taken ones, until these are filled

    def stage(self, content: Any, plan: ShardPlan) -> Staged:
        """Copy what this rank writes of plain data and of the sharded tensors in it.

        What was staged before is overwritten. Tensors that shared memory go on sharing it.
        """
        self._start()
        number = rank()
        copies = self._copies(content) if number == 0 else {}
        own = set(plan.written_by(number))
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        shards = {
            place: Shard(shard.shape, shard.dtype, self._copy(shard.local) if place in own else nothing)
            for place, shard in plan.tensors.items()
        }
        events = self._fill()
        self._drop_unused()
        plan = dataclasses.replace(plan, tensors=shards)
        return Staged(content if number == 0 else None, copies, plan, events)

    def _copies(self, content: Any) -> dict[int, Any]:
        """By ``id``, copies of what can change in plain data: all else in it was made new, or cannot be changed."""
        found: list[Any] = []
        _find_changeable(content, found)
        tensors = [leaf for leaf in found if type(leaf) is not bytearray and not is_sharded(leaf)]
        copies: dict[int, Any] = dict(packed(tensors, self._copy))
        return copies | {id(leaf): bytearray(leaf) for leaf in found if type(leaf) is bytearray}

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where the copy of ``tensor`` will be once all are filled."""
        is_pinned = tensor.device.type == "cuda"
        # Without elements in between, strides mean something only in the dims of size 1; a file shows them.
        stride = tensor.stride() if tensor.is_contiguous() else torch.empty(tensor.shape, device="meta").stride()
        kind = tensor.dtype, tensor.shape, stride, is_pinned
        free = self._free.get(kind)
        copy = free.pop()[1] if free else self._made(*kind)
        self._taken.append((kind, copy))
        self._originals.append(tensor)
        return copy

    def _fill(self) -> list[torch.cuda.Event]:
        """Copy all, in one call what is pinned and in one what is not; the events after which it is there.

        A call for each takes as long as a small copy, and the training waits.
        """
        originals, self._originals = self._originals, []
        pairs: dict[bool, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for ((*_, is_pinned), copy), original in zip(self._taken, originals, strict=True):
            copies, of = pairs.setdefault(is_pinned, ([], []))
            copies.append(copy)
            of.append(original)
        for is_pinned, (copies, of) in pairs.items():
            torch._foreach_copy_(copies, of, non_blocking=is_pinned)
        return [_event(device) for device in {tensor.device for tensor in pairs[True][1]}] if True in pairs else []

    def _made(self, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...], is_pinned: bool) -> torch.Tensor:
        nbytes = shape.numel() * dtype.itemsize
        storage = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=is_pinned).untyped_storage()
        self.allocations += 1
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, stride)

    def _start(self) -> None:
        for kind, copy in self._taken:
            self._free.setdefault(kind, []).append((self._saves, copy))
        self._taken, self._originals = [], []
        self._saves += 1

    def _drop_unused(self) -> None:
        oldest = self._saves - _KEPT_SAVES
        kept = {key: [entry for entry in free if entry[0] > oldest] for key, free in self._free.items()}
        self._free = {key: free for key, free in kept.items() if free}


def _event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _find_changeable(value: Any, found: list[Any]) -> None:
    """Append the tensors and bytearrays of plain data to ``found``; no places, since the training waits."""
    if isinstance(value, (torch.Tensor, bytearray)):
        found.append(value)
    elif isinstance(value, dict):
        for item in value.values():
            _find_changeable(item, found)
    elif isinstance(value, (list, tuple)):
        for item in value:
            if type(item) not in _NUMBERS:
                _find_changeable(item, found)
