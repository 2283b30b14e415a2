"""The order of the data as arithmetic: which items of an epoch which rank gets at which step.

An *item* is what a sampler yields: a sample index, or a whole batch of a ``batch_sampler``. The items of an epoch
are dealt out like cards: item ``i`` goes to rank ``i % world_size``, as in torch's ``DistributedSampler``. A *step*
takes ``batch_size`` items for every rank, so what has been seen after a step is a prefix of the epoch, whatever
the world size was. That makes a position one number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from fabric_lite.errors import FabricValueError

__all__ = ["Plan", "Position"]


@dataclasses.dataclass(frozen=True)
class Position:
    """A place in the data.

    Args:
        epoch: Counted from 0; each new iterator takes the next one.
        seen: Items of the epoch that all ranks together have seen.
        draw: The random state from which the user's sampler drew this epoch's order, where it drew by itself.
        is_loaded: Whether the place was loaded, so that the iterator that starts here goes on for an earlier one.
        is_begun: Whether an iterator of the epoch had been made, so that all that one draws was drawn.
        batch: Batches of the epoch that each rank has been given.
        noise: What the random numbers of the epoch's batches are counted from in worker processes, where it was drawn.
        stream: The state that an ``IterableDataset`` keeps of itself on this rank.
    """

    epoch: int = 0
    seen: int = 0
    draw: dict[str, Any] | None = None
    is_loaded: bool = False
    is_begun: bool = False
    batch: int = 0
    noise: int | None = None
    stream: Any = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the items ``start`` to ``total`` of an epoch are dealt out.

    Args:
        total: Items in the epoch.
        start: Items that have been seen before.
        world_size: Ranks among which the items are dealt out.
        batch_size: Items per rank and step.
        drop_last: Whether a step without ``batch_size`` items for every rank is left out.
        pad: Whether items are repeated, from the first on, until every rank has as many as any other (as
            ``DistributedSampler`` does). If not, each item occurs once, and the last steps are evened out so that
            every rank has equally many steps and the sizes of a step's batches differ by at most one. With a
            ``batch_size`` of 1 that needs one batch of 2 on some ranks.

    Raises:
        FabricValueError: Without ``pad``, there are fewer items than ranks.
    """

    total: int
    start: int = 0
    world_size: int = 1
    batch_size: int = 1
    drop_last: bool = False
    pad: bool = True

    def __post_init__(self) -> None:
        if not self.pad and not self.drop_last and 0 < self.size < self.world_size:
            raise FabricValueError(
                "Without padding, some ranks would have no batch at all.",
                given=f"pad=False with {self.size} samples left for {self.world_size} ranks",
                fix="pad=True, or fewer ranks",
            )

    @property
    def size(self) -> int:
        """Items that are left to see."""
        return max(0, self.total - self.start)

    @property
    def width(self) -> int:
        """Items that a full step takes from all ranks together."""
        return self.world_size * self.batch_size

    @property
    def steps(self) -> int:
        """Batches per rank, the same number on every rank."""
        if self.drop_last:
            return self._padded_size // self.width
        steps = -(-self._padded_size // self.width)
        # A remainder smaller than the world cannot give every rank a sample. The step before lends some, unless
        # its batches have but one: then it takes the remainder in.
        lonely = 0 < self._padded_size % self.width < self.world_size
        return steps - 1 if lonely and self.batch_size == 1 else steps

    def edge(self, step: int) -> int:
        """The item at which ``step`` begins; for ``step == steps`` the end. Beyond ``total`` lies padding."""
        if step >= self.steps:
            return self._end
        return min(self.start + step * self.width, self._end - self.world_size)

    def seen_after(self, steps: int) -> int:
        """Items of the epoch that have been seen after ``steps`` steps."""
        return min(self.edge(steps), self.total)

    @property
    def repeated(self) -> int:
        """Items that are seen twice, for padding."""
        return max(0, self.edge(self.steps) - self.total)

    @property
    def skipped(self) -> int:
        """Items that nobody sees, since no full step is left for them."""
        return max(0, self.total - max(self.start, self.edge(self.steps)))

    def shares(self, rank: int, first: int = 0) -> Iterator[range]:
        """Yield the items that ``rank`` gets at each step; an item ``i >= total`` stands for ``i % total``."""
        regular = max(first, self.steps - 2)  # only the last two steps can be of another width
        width, world_size = self.width, self.world_size
        for edge in range(self.start + first * width, self.start + regular * width, width):
            yield range(edge + rank, edge + width, world_size)
        for step in range(regular, self.steps):
            yield range(self.edge(step) + rank, self.edge(step + 1), world_size)

    def count(self, rank: int) -> int:
        """Items that ``rank`` gets in all steps."""
        full = max(0, self.steps - 2)
        return full * self.batch_size + sum(map(len, self.shares(rank, full)))

    @property
    def _end(self) -> int:
        return self.start + (self.steps * self.width if self.drop_last else self._padded_size)

    @property
    def _padded_size(self) -> int:
        return -(-self.size // self.world_size) * self.world_size if self.pad else self.size
