"""From what was measured to what is shown of it."""

from __future__ import annotations

from fabric_lite.bench import statistics
from fabric_lite.bench.results import Results, Row
from fabric_lite.bench.shown import Interval, Shown
from fabric_lite.bench.verdict import Verdict

__all__ = ["shown_rows"]


def shown_rows(results: Results, verdict: Verdict) -> list[Shown]:
    """The rows as tables and plots show them, the repeat of the baseline under a name of its own."""
    return [_shown(row, results, verdict) for row in results.rows]


def _shown(row: Row, results: Results, verdict: Verdict) -> Shown:
    name = row.combination.name + (" (again)" if row.is_repeat else "")
    if row.failure is not None or not row.step_seconds:
        return Shown(name, row)
    speed = statistics.throughput(row)
    median, late = statistics.step_time(row)
    several = row.combination.devices > 1 and not row.is_repeat
    scaling = statistics.scaling_efficiency(row, results.rows) if several else None
    kept = statistics.kept_efficiency(row, results.rows) if several else None
    return Shown(
        name,
        row,
        throughput=Interval(speed.value, speed.low, speed.high),
        throughput_unit="steps/s" if row.samples_per_step is None else "samples/s",
        step_p50_seconds=median,
        step_p95_seconds=late,
        scaling=None if scaling is None else scaling.value,
        kept=None if kept is None else kept.value,
        is_best=not row.is_repeat and row.combination.name == next(iter(verdict.winners), None),
    )
