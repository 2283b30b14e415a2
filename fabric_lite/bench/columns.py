"""What a table of results has in its columns; the terminal, Markdown and the page show the same ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from fabric_lite.bench.results import Memory
from fabric_lite.bench.shown import FLAGS, UNITS, Interval, Shown, figure

__all__ = ["Column", "columns", "memory_scale", "notes"]

SPEED, SHARE, COST, CORRECTNESS = "speed", "share of a step", "cost", "correctness"
MEMORY = {
    "resident": "RSS",
    "tensors": "tensors",
    "device_allocated": "allocated",
    "device_reserved": "reserved",
}


@dataclasses.dataclass(frozen=True)
class Column:
    """One column.

    Args:
        heading: What is in it.
        unit: In which unit; may be empty.
        group: Columns of one group stand in one table.
        number: Of a row that ran, what the column is sorted by; None leaves the cell empty.
        text: How that number is written.
    """

    heading: str
    unit: str
    group: str
    number: Callable[[Shown], float | None]
    text: Callable[[float], str] = figure

    def cell(self, shown: Shown) -> str:
        number = None if shown.row.failure is not None else self.number(shown)
        return "" if number is None else self.text(number)


@dataclasses.dataclass(frozen=True)
class _Throughput(Column):
    """Throughput is written with its interval."""

    def cell(self, shown: Shown) -> str:
        return str(_throughput(shown, self.heading) or "")


def columns(shown: Sequence[Shown]) -> list[Column]:
    """The columns in which any row has a value; bytes are in the unit that suits the largest."""
    size, size_unit = memory_scale(shown)
    sent, sent_unit = _scale(_sum_of_bytes(one) for one in shown)
    every = [
        *(
            _Throughput(unit, "± 95 %", SPEED, lambda one, unit=unit: _value(_throughput(one, unit)))  # type: ignore[misc]
            for unit in UNITS
        ),
        Column("tokens/s", "", SPEED, lambda one: one.tokens_per_second),
        Column("p50", "ms", SPEED, lambda one: _times(one.step_p50_seconds, 1e3)),
        Column("p95", "ms", SPEED, lambda one: _times(one.step_p95_seconds, 1e3)),
        *(_share(phase) for phase in _PHASES),
        *(_memory(heading, field, size, size_unit) for field, heading in MEMORY.items()),
        Column("calls", "a step", COST, _calls, lambda calls: f"{calls:,.0f}"),
        Column("traffic", sent_unit, COST, lambda one: _times(_sum_of_bytes(one), 1 / sent)),
        Column("start", "s", COST, lambda one: one.row.startup_seconds),
        Column("scaling", "%", COST, lambda one: _times(one.scaling, 100)),
        Column("of ddp", "%", COST, lambda one: _times(one.kept, 100)),
        *(_difference(field) for field in ("loss", "gradient")),
        Column("check", "", CORRECTNESS, _check, lambda place: list(FLAGS.values())[int(place)]),
    ]
    return [column for column in every if any(column.cell(one) for one in shown)]


def notes(shown: Iterable[Shown]) -> list[str]:
    """Of each row that is not known to be right, its name, flag and reason."""
    return [
        f"{one.name}: {one.flag}{': ' * bool(one.row.comparison.reason)}{one.row.comparison.reason}"
        for one in shown
        if one.row.comparison is not None and one.flag not in ("", "ok")
    ]


def memory_scale(shown: Iterable[Shown]) -> tuple[float, str]:
    """How many bytes the unit of memory has that suits the largest figure, and its name."""
    memories = [one.row.memory for one in shown if one.row.memory is not None]
    return _scale(getattr(memory, field.name) for memory in memories for field in dataclasses.fields(Memory))


_PHASES = ("data", "forward", "backward", "exposed", "optimizer", "save")


def _share(phase: str) -> Column:
    # A phase that no step has, as without saving, is left out rather than shown as 0.
    return Column(phase, "%", SHARE, lambda one: _times(one.share(phase) or None, 100), lambda share: f"{share:.1f}")


def _memory(heading: str, field: str, size: float, unit: str) -> Column:
    return Column(heading, unit, COST, lambda one: _times(getattr(one.row.memory, field, None), 1 / size))


def _throughput(shown: Shown, unit: str) -> Interval | None:
    return shown.throughput if shown.throughput_unit == unit and shown.row.failure is None else None


def _value(interval: Interval | None) -> float | None:
    return None if interval is None else interval.value


def _calls(shown: Shown) -> float | None:
    return None if shown.row.communication is None else sum(shown.row.communication.calls.values())


def _sum_of_bytes(shown: Shown) -> float | None:
    return None if shown.row.communication is None else sum(shown.row.communication.bytes.values())


def _check(shown: Shown) -> float | None:
    return list(FLAGS.values()).index(shown.flag) if shown.flag else None


def _difference(field: str) -> Column:
    return Column(
        field,
        "diff.",
        CORRECTNESS,
        lambda one: getattr(one.row.comparison, field, None),
        lambda value: f"{value:.1e}" if value else "0",
    )


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _scale(sizes: Iterable[float | None]) -> tuple[float, str]:
    largest = max((size for size in sizes if size is not None), default=0)
    if largest >= 10 * 2**30:
        return 2.0**30, "GiB"
    return (2.0**20, "MiB") if largest >= 2**20 else (2.0**10, "KiB")
