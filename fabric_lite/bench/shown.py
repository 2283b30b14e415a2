"""The figures of one row as they are shown, whatever shows them."""

from __future__ import annotations

import dataclasses
import math

from fabric_lite.bench.results import Results, Row

__all__ = ["FLAGS", "UNITS", "Interval", "Shown", "about_line", "figure", "one_line"]

# Of throughput: the second where no batch shows how many samples a step has.
UNITS = ("samples/s", "steps/s")
# By the verdict of a comparison, what a reader sees.
FLAGS = {"same": "ok", "not comparable": "not comparable", "differs": "WRONG"}


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def says_something(self) -> bool:
        """Whether it is narrower than the figure itself; that of one or two rounds seldom is, and may be infinite."""
        return max(self.high - self.value, self.value - self.low) <= self.value

    def __str__(self) -> str:
        """The value, and how far the end that is farther away is from it."""
        half = max(self.high - self.value, self.value - self.low)
        if not self.says_something:
            return f"{figure(self.value)} ±?"
        return f"{figure(self.value)} ±{figure(half, digits=2)}"


@dataclasses.dataclass(frozen=True)
class Shown:
    """One row and what was computed from it.

    Args:
        name: That of its combination; for the repeat of the baseline, one that says so.
        row: What was found.
        throughput: In ``throughput_unit``, over all ranks; None where the row failed.
        throughput_unit: One of ``UNITS``.
        step_p50_seconds: The median step.
        step_p95_seconds: The step that 95 % of the others are faster than.
        scaling: Throughput over that of one device times the number of devices; 1 is ideal.
        kept: Throughput over that of ddp on as many devices; above 1 is faster.
        is_best: Whether the verdict recommends it.
    """

    name: str
    row: Row
    throughput: Interval | None = None
    throughput_unit: str = UNITS[0]
    step_p50_seconds: float | None = None
    step_p95_seconds: float | None = None
    scaling: float | None = None
    kept: float | None = None
    is_best: bool = False

    @property
    def flag(self) -> str:
        """``"ok"``, ``"WRONG"`` or ``"not comparable"``; empty where nothing was compared."""
        comparison = self.row.comparison
        return "" if comparison is None or self.row.failure is not None else FLAGS[comparison.verdict]

    @property
    def tokens_per_second(self) -> float | None:
        """None where no batch shows tokens."""
        of_step = self.row.samples_per_step if self.throughput_unit == "samples/s" else 1.0
        if self.throughput is None or self.row.tokens_per_step is None or not of_step:
            return None
        return self.throughput.value / of_step * self.row.tokens_per_step

    def share(self, phase: str) -> float | None:
        """The part of a step that a phase takes, or ``"exposed"`` communication, which is within the phases."""
        whole = sum(self.row.phases.values())
        part = self.row.exposed_communication if phase == "exposed" else self.row.phases.get(phase)
        return None if part is None or not whole else part / whole


def figure(value: float, digits: int = 3) -> str:
    """A number with so many significant digits.

    >>> figure(1234.5), figure(0.01234), figure(3.9999)
    ('1,230', '0.0123', '4.00')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"


def about_line(results: Results) -> str:
    """When, on what and how the figures were taken."""
    about = results.about
    hardware = [about.processor, f"{about.cores} core{'s' * (about.cores != 1)}", *filter(None, [about.accelerator])]
    way = "in turns" if results.in_turns else "one run at a time"
    steps = f"{results.steps} steps a round after {results.warmup} to warm up, {way}"
    return ", ".join([about.date, *hardware, f"Python {about.python}", f"torch {about.torch}", steps])


def one_line(text: str) -> str:
    """Words of a script on one line that can't steer a terminal: what is no visible character is spelled out."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in " ".join(text.split())
    )
