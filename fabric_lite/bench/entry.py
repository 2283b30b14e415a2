"""What is known of one combination while it is measured, and the row that this comes to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from fabric_lite.bench.results import Combination, Communication, Comparison, Memory, Row
from fabric_lite.launch.environment import cores

__all__ = ["Entry", "blocked_seconds", "row_of"]


@dataclasses.dataclass
class Entry:
    """What is known so far of one combination."""

    combination: Combination
    is_repeat: bool = False
    failure: str | None = None
    first: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # the first run's figures, by rank
    rounds: list[list[dict[str, Any]]] = dataclasses.field(default_factory=list)  # of those that are timed
    starts: list[float] = dataclasses.field(default_factory=list)  # seconds of those that start by themselves
    record: Path | None = None
    comparison: Comparison | None = None


def row_of(entry: Entry, idle_seconds: float = 0.0) -> Row:
    """The entry's row, as far as it was measured.

    Args:
        entry: Of the combination.
        idle_seconds: Of a step, what one device waits too, with no other to wait for.
    """
    if not entry.first:
        return Row(entry.combination, failure=entry.failure, is_repeat=entry.is_repeat)
    rounds = entry.rounds or [entry.first]
    slowest = [_slowest(figures) for figures in rounds]
    # In the first round there are the checks, with what they keep in memory.
    usual = [figures for figures in rounds if figures is not entry.first] or rounds
    # With fewer cores than ranks these take turns: not to run is not to wait for a collective.
    shows_waits = 1 < entry.combination.devices <= cores() and all(own["blocked"] is not None for own in slowest)
    return Row(
        entry.combination,
        failure=entry.failure,
        step_seconds=[own["step_seconds"] for own in slowest],
        samples_per_step=_over_shares(rounds, "samples"),
        tokens_per_step=_over_shares(rounds, "tokens"),
        phases={name: median(own["phases"][name] for own in slowest) for name in slowest[0]["phases"]},
        exposed_communication=max(blocked_seconds(rounds) - idle_seconds, 0.0) if shows_waits else None,
        memory=_memory([own for figures in usual for own in figures], [own["probe"] for own in entry.first]),
        communication=_communication(entry.first[0]["probe"]),
        comparison=entry.comparison,
        startup_seconds=median(entry.starts[1:] or entry.starts),
        is_repeat=entry.is_repeat,
    )


def blocked_seconds(rounds: Sequence[Sequence[dict[str, Any]]]) -> float:
    """Of a step, what the slowest rank neither computes nor waits for data: the median of the rounds' means."""
    return median(_slowest(figures)["blocked"] for figures in rounds)


def _over_shares(rounds: Sequence[Sequence[dict[str, Any]]], name: str) -> float | None:
    """The mean over rounds of the sum over ranks, those with the same share of the data once."""
    sums = []
    for figures in rounds:
        shares = {own["data_rank"]: own[name] for own in figures}
        if any(value is None for value in shares.values()):
            return None
        sums.append(sum(shares.values()))
    return mean(sums) or None


def _slowest(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One rank for all steps: which is late changes from step to step, and is made good in the next."""
    return max(figures, key=lambda own: float(sum(own["step_seconds"])))


def _communication(probe: dict[str, Any]) -> Communication | None:
    return Communication(probe["calls"], probe["bytes"]) if probe else None


def _memory(figures: Sequence[dict[str, Any]], probes: Sequence[dict[str, Any]]) -> Memory:
    on_device = [own for own in figures if own["device_allocated"] is not None]
    return Memory(
        resident=max(own["resident"] for own in figures),
        tensors=max((probe["tensors"] for probe in probes if probe), default=None),
        device_allocated=max((own["device_allocated"] for own in on_device), default=None),
        device_reserved=max((own["device_reserved"] for own in on_device), default=None),
    )
