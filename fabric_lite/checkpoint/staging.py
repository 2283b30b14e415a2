"""One copy of what is to be written, in memory that is kept from save to save, so that training can go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fabric_lite.checkpoint.layout import Shard, ShardPlan, is_sharded
from fabric_lite.checkpoint.packing import packed
from fabric_lite.checkpoint.plain import Place, tensors_in
from fabric_lite.collectives import rank
from fabric_lite.trees import map_leaves

__all__ = ["Staged", "Staging"]

_Kind = tuple[torch.dtype, torch.Size, tuple[int, ...], bool]

_KEPT_SAVES = 4  # memory that none of so many saves has used is given back


@dataclasses.dataclass(frozen=True)
class Staged:
    """Copies of content and shards, on the CPU, and a function that waits until they are filled.

    The content is None on the ranks that write none; in the plan what is not written here is empty.
    """

    content: Any
    plan: ShardPlan
    wait: Callable[[], None]


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
        self._devices: set[torch.device] = set()

    def stage(self, content: Any, plan: ShardPlan) -> Staged:
        """Copy what this rank writes of plain data and of the sharded tensors in it.

        What was staged before is overwritten. Tensors that shared memory go on sharing it.
        """
        self._start()
        staged = self._content(content) if rank() == 0 else None
        own = set(plan.written_by(rank()))
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        shards = {
            place: Shard(shard.shape, shard.dtype, self._copy(shard.local) if place in own else nothing)
            for place, shard in plan.tensors.items()
        }
        self._drop_unused()
        return Staged(staged, dataclasses.replace(plan, tensors=shards), self._when_filled())

    def _content(self, content: Any) -> Any:
        copies = packed([tensor for _, tensor in tensors_in(content, Place()) if not is_sharded(tensor)], self._copy)

        def copied(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return copies.get(id(leaf), leaf)  # a sharded one stands for its place
            return bytearray(leaf) if type(leaf) is bytearray else leaf

        # All other plain data was made new, or cannot be changed.
        return map_leaves(copied, content)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        is_pinned = tensor.device.type == "cuda"
        # Without elements in between, strides mean something only in the dims of size 1; a file shows them.
        stride = tensor.stride() if tensor.is_contiguous() else torch.empty(tensor.shape, device="meta").stride()
        kind = tensor.dtype, tensor.shape, stride, is_pinned
        free = self._free.get(kind)
        copy = free.pop()[1] if free else self._made(*kind)
        self._taken.append((kind, copy))
        copy.copy_(tensor, non_blocking=is_pinned)
        if is_pinned:
            self._devices.add(tensor.device)
        return copy

    def _made(self, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...], is_pinned: bool) -> torch.Tensor:
        nbytes = shape.numel() * dtype.itemsize
        storage = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=is_pinned).untyped_storage()
        self.allocations += 1
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, stride)

    def _start(self) -> None:
        for kind, copy in self._taken:
            self._free.setdefault(kind, []).append((self._saves, copy))
        self._taken, self._devices = [], set()
        self._saves += 1

    def _drop_unused(self) -> None:
        oldest = self._saves - _KEPT_SAVES
        kept = {key: [entry for entry in free if entry[0] > oldest] for key, free in self._free.items()}
        self._free = {key: free for key, free in kept.items() if free}

    def _when_filled(self) -> Callable[[], None]:
        events = []
        for device in self._devices:
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(device))
            events.append(event)

        def wait() -> None:
            for event in events:
                event.synchronize()

        return wait
