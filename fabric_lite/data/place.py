"""A place in the data as a person reads it."""

from __future__ import annotations

import dataclasses

__all__ = ["Place"]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a loader goes on, and what going on there costs; ``str`` of it is a line for the user.

    Args:
        epoch: Counted from 0.
        batch: Batches of the epoch that each rank has been given, at whatever world size that was.
        seen: Samples of the epoch that all ranks together have seen; batches, where ``unit`` says so.
        unit: ``"samples"``, or ``"batches"`` of a batch sampler, an ``IterableDataset`` or another iterable.
        repeated: Items of the rest of the epoch that are seen once more than if the run had not been stopped: padding
            at another world size.
        skipped: Items that are never seen and would have been: at another world size, with ``drop_last``.
        old_world_size: The ranks that the place was counted on, if they were others than those of now.
    """

    epoch: int
    batch: int
    seen: int
    unit: str = "samples"
    repeated: int = 0
    skipped: int = 0
    old_world_size: int | None = None

    def __str__(self) -> str:
        old = self.old_world_size
        on = "" if old is None else f" on {old} rank{'s' * (old > 1)}"
        return (
            f"epoch {self.epoch}, batch {self.batch}{on}; {self.repeated} {self.unit} repeated, {self.skipped} skipped"
        )
