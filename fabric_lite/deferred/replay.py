"""Running the log on real memory, of which no more is held than one point of the log needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from fabric_lite.deferred.log import Entry, Piece

__all__ = ["Replay", "Step", "plan"]


@dataclasses.dataclass(frozen=True)
class Step:
    """An entry to run, and what to do after it."""

    index: int
    entry: Entry
    finished: frozenset[int]  # wanted storages that are not written any more
    freed: frozenset[int]  # storages whose values nobody needs any more


def plan(entries: Sequence[Entry], wanted: Iterable[int], *, draws_from: int) -> list[Step]:
    """Choose the entries that the storages ``wanted`` depend on, in order.

    Read backwards, a storage is needed from a use of its values back to the entry that overwrites it whole; before
    that, its memory is free. From the entry ``draws_from`` on, random draws whose results nobody needs are made too, on
    memory that is freed at once, so that the draws after them come out right.
    """
    live: set[int] = set()
    unfinished = set(wanted)
    steps = []
    for index in range(len(entries) - 1, -1, -1):
        if index < draws_from and not live and not unfinished:
            break
        entry = entries[index]
        needed = not entry.writes.isdisjoint(live) or not entry.writes.isdisjoint(unfinished)
        if not needed and (entry.draw is None or index < draws_from):
            continue
        finished = entry.writes & unfinished
        steps.append(Step(index, entry, frozenset(finished), frozenset(entry.touched - live)))
        unfinished -= finished
        if needed:
            # What was there before a write to a part is still needed.
            live |= entry.writes
            live -= entry.overwrites
        live |= entry.inputs
    return steps[::-1]


class Replay:
    """Runs steps on ``device``.

    Args:
        storages: The meta storages, for their sizes.
        device: Where the values are made.
    """

    def __init__(self, storages: Mapping[int, torch.UntypedStorage], device: torch.device) -> None:
        self.peak_bytes = 0  # the most that was held at a time
        self._storages = storages
        self._device = device
        self._real: dict[int, torch.UntypedStorage] = {}

    def tensor(self, piece: Piece) -> torch.Tensor:
        """The real tensor of a piece; memory that nobody wrote yet is not initialized."""
        if piece.storage not in self._real:
            size = self._storages[piece.storage].nbytes()
            self._real[piece.storage] = torch.UntypedStorage(size, device=self._device)
        return piece.within(self._real[piece.storage])

    def run(self, steps: Iterable[Step], receive: Callable[[int], None]) -> None:
        """Run all steps; ``receive`` gets each wanted storage as soon as its last write is done."""
        previous = torch.get_default_dtype()
        try:
            with torch.no_grad():
                for step in steps:
                    self._run(step.entry)
                    self.peak_bytes = max(self.peak_bytes, sum(held.nbytes() for held in self._real.values()))
                    for key in step.finished:
                        receive(key)
                    for key in step.freed:
                        self._real.pop(key, None)
        finally:
            torch.set_default_dtype(previous)

    def _run(self, entry: Entry) -> None:
        # Operations such as the division of whole numbers take their result's dtype from it.
        if torch.get_default_dtype() != entry.default_dtype:
            torch.set_default_dtype(entry.default_dtype)
        if entry.draw is not None:
            entry.draw.stream.before(entry.draw)
        outputs = entry.run(self.tensor)
        for position, piece in entry.created:
            output = outputs[position]
            if (tuple(output.stride()), output.storage_offset(), output.dtype) != (
                piece.stride,
                piece.offset,
                piece.dtype,
            ):
                # A kernel that lays its result out in another way than its meta twin.
                self.tensor(piece).copy_(output)
            else:
                self._real[piece.storage] = output.untyped_storage()
