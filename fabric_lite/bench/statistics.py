"""Which combination is faster, how sure that is, and how many rounds it takes to know.

What counts is the variation between rounds. The steps of a round share one process and one state of the machine, so
they are not independent: a hundred of them say little more than ten. Each round of a row therefore becomes one figure,
and two rows are compared by the ratios of rounds that stand side by side, which a drifting machine leaves alone. That
figure is the mean of all steps. To leave out late ones would take half of the rounds, but they are what training pays:
saves, and above all ranks that wait for another, which with two ranks on two cores made 10 % of a round.

Ratios are judged by Student's t on their logarithms, after rounds that lie far from the others were left out (now and
then a round is a third slower because of something else on the machine). A test of signs or ranks takes no view of the
noise, but cannot do here: with 9 rounds one disturbed round of the wrong sign leaves it at p = 0.04 at best.

Replayed 500 times and more over 2 % of noise in the ratio of a round, with 9 rounds (``LEVEL`` is 1 %): two that are
alike are told apart in 0.4 % of the cases, or 3 % without the floor that the baseline's repeat gives, since leaving out
rounds makes the rest look a little too quiet. A difference of 5 % is found in 99 %, with 7 rounds in 94 %: hence 9. If
every twentieth pair of rounds has one that is 30 % slower, and every hundredth step takes twice as long, it is found in
57 %: that takes some 20 rounds, which :func:`rounds_needed` asks for, and then finds it in 95 %.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy

from fabric_lite.bench import student
from fabric_lite.bench.results import Row

__all__ = [
    "DEFAULT_ROUNDS",
    "LEVEL",
    "PILOT_ROUNDS",
    "Estimate",
    "Noise",
    "Ratio",
    "compare",
    "compare_apart",
    "compare_with_all",
    "kept_efficiency",
    "noise_of",
    "ranked",
    "rounds_needed",
    "scaling_efficiency",
    "smallest_difference",
    "step_time",
    "throughput",
]

DEFAULT_ROUNDS = 9
PILOT_ROUNDS = 5
LEVEL = 0.01
# Of all comparisons with a winner together.
_FAMILY_LEVEL = 0.05
_POWER = 0.95
_DISTURBED = 4.0
# Clocks and schedulers alone leave this much; it also keeps rounds that happen to be equal from being believed.
_LEAST_SPREAD = 0.001
_MOST_ROUNDS = 99
_SPARE_ROUNDS = 2


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and its interval: ``(0, inf)`` where one round alone says nothing about the noise."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Noise:
    """What two runs of one thing differ by.

    Args:
        spread: Standard deviation of the logarithm of their ratio from round to round: 0.02 is 2 %.
        rounds: How many rounds it was taken from.
        ratio: Of the two, over all rounds; None where they are too few.
    """

    spread: float
    rounds: int
    ratio: Ratio | None = None


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One throughput over another.

    Args:
        value: Above 1: the first is faster.
        low: Of the interval of 99 % (``1 - LEVEL``).
        high: Of the interval of 99 %.
        p_value: The chance of so large a difference between two that are alike; corrected for their number where
            several were compared.
        rounds: How many were used.
        disturbed: How many were left out, since they lie far from the others.
    """

    value: float
    low: float
    high: float
    p_value: float
    rounds: int
    disturbed: int = 0

    @property
    def is_told_apart(self) -> bool:
        """Whether the difference is more than noise."""
        return self.p_value <= LEVEL


def throughput(row: Row) -> Estimate:
    """Samples per second with an interval of 95 %; steps per second where the samples are not known.

    Of all steps, the slow ones too: what a save in every tenth step costs, the training pays. The interval is for the
    figure by itself and has the machine's drift in it: :func:`compare` is much finer.
    """
    work = row.samples_per_step or 1.0
    center = _Center.of([math.log(work / statistics.fmean(steps)) for steps in row.step_seconds if steps])
    half = center.half_width(0.05)
    return Estimate(math.exp(center.mean), math.exp(center.mean - half), _exp(center.mean + half))


def step_time(row: Row) -> tuple[float, float]:
    """Seconds of a step at the median and at the 95th percentile, over all rounds."""
    middle, late = numpy.percentile([seconds for steps in row.step_seconds for seconds in steps], [50, 95])
    return float(middle), float(late)


def noise_of(rows: Sequence[Row], baseline: str) -> Noise | None:
    """What the baseline and its repeat show; None where either did not run, or ran for one round only."""
    pairs = [_named(rows, baseline, is_repeat) for is_repeat in (False, True)]
    if pairs[0] is None or pairs[1] is None:
        return None
    center = _Center.of(_log_ratios(pairs[0], pairs[1]))
    if center.rounds < 2:
        return None
    return Noise(center.spread, center.rounds, _ratio(center))


def compare(row: Row, other: Row, noise: Noise | None) -> Ratio:
    """The throughput of ``row`` over that of ``other``, from rounds that stand side by side.

    Where the samples of either are not known these are steps per second, which say something only about combinations
    of the same devices and batch size.

    Args:
        row: The one that is above 1 if it is faster.
        other: What it is divided by.
        noise: Of :func:`noise_of`. This pair's own noise counts as no smaller: of few rounds some look quiet by luck.
    """
    return _ratio(_Center.of(_log_ratios(row, other), 0.0 if noise is None else noise.spread))


def compare_with_all(row: Row, others: Sequence[Row], noise: Noise | None) -> list[Ratio]:
    """:func:`compare` with each of the others, corrected for their number.

    By Holm's method (Scandinavian Journal of Statistics 6, 1979) for 5 % over all of them, with no comparison allowed
    more than ``LEVEL``; so up to five need no correction. The intervals stay those of one comparison.
    """
    ratios = [compare(row, other, noise) for other in others]
    corrected, so_far = list(ratios), 0.0
    for place, index in enumerate(sorted(range(len(ratios)), key=lambda index: ratios[index].p_value)):
        factor = max(1.0, LEVEL * (len(ratios) - place) / _FAMILY_LEVEL)
        so_far = min(1.0, max(so_far, factor * ratios[index].p_value))
        corrected[index] = dataclasses.replace(ratios[index], p_value=so_far)
    return corrected


def compare_apart(row: Row, other: Row, noise: Noise | None, other_noise: Noise | None) -> Ratio:
    """As :func:`compare` for rows whose rounds do not stand side by side, such as those of another day.

    Welch's test (Biometrika 34, 1947), with the degrees of freedom rounded down. What a machine changes from one day to
    another is in neither row's rounds, so it is not in the interval.
    """
    in_samples = row.samples_per_step is not None and other.samples_per_step is not None
    sides = [
        _Center.of([rate for rate in _log_rates(side, in_samples) if rate is not None], floor)
        for side, floor in ((row, _of_one(noise)), (other, _of_one(other_noise)))
    ]
    errors = [side.spread**2 / side.rounds for side in sides]
    difference = sides[0].mean - sides[1].mean
    rounds, disturbed = min(side.rounds for side in sides), sum(side.disturbed for side in sides)
    if rounds < 2:
        return Ratio(math.exp(difference), 0.0, math.inf, 1.0, rounds, disturbed)
    degrees = sum(errors) ** 2 / sum(error**2 / (side.rounds - 1) for error, side in zip(errors, sides, strict=True))
    return _interval(difference, math.sqrt(sum(errors)), int(degrees), rounds, disturbed)


def ranked(rows: Sequence[Row]) -> list[Row]:
    """The rows that ran, fastest first.

    What all rows of a round have in common, the machine's state, is taken off first (its median over the rows).
    """
    ran = [row for row in rows if row.failure is None and any(row.step_seconds)]
    in_samples = all(row.samples_per_step is not None for row in ran)
    rates = [_log_rates(row, in_samples) for row in ran]
    levels = [
        statistics.median([rate for rate in beside if rate is not None] or [0.0])
        for beside in zip(*(line + [None] * (max(map(len, rates)) - len(line)) for line in rates), strict=True)
    ]
    speeds = [
        _Center.of([rate - level for rate, level in zip(line, levels, strict=False) if rate is not None]).mean
        for line in rates
    ]
    return [ran[index] for index in sorted(range(len(ran)), key=lambda index: -speeds[index])]


def rounds_needed(rows: Sequence[Row], baseline: str, *, difference: float = 0.05) -> int:
    """How many rounds, those of the pilot included, find such a difference in 95 of 100 cases.

    Ask after ``PILOT_ROUNDS``, and again after as many as that says, until it asks for no more: rounds that look quiet
    by luck cost some of the finds otherwise (``benchmarks/trust.py`` shows them). It looks at the noise alone,
    not at who leads: an internal pilot (Wittes and Brittain, Statistics in Medicine 9, 1990), which hardly raises the
    error rate. To test after every round and stop at the first difference would find one between equals several times
    as often.

    The noise is the median over all pairs with the baseline, so that one disturbed pair does not double the work, at
    the upper end of its one-sided interval of 80 %, since five rounds are few (taken as if the pairs had nothing in
    common, though all have the baseline: it is a little too low, for which the spare rounds are there as well). Two
    rounds more are for those that will be disturbed: in simulations with two pairs, the difference is then found in 95
    to 100 % over noise of 1 to 3 % and up to a tenth of disturbed pairs; without them, in 86 to 99 %.

    Args:
        rows: With the rounds so far.
        baseline: Its name.
        difference: In throughput: 0.05 is 5 %.
    """
    first = _named(rows, baseline, False)
    others = [row for row in rows if row is not first and row.failure is None]
    centers = [] if first is None else [_Center.of(_log_ratios(first, other)) for other in others]
    centers = [center for center in centers if center.rounds > 1]
    if not centers:
        return DEFAULT_ROUNDS
    degrees = sum(center.rounds - 1 for center in centers)
    middle = statistics.median(center.spread for center in centers)
    spread = middle * math.sqrt(degrees / _chi_square(0.2, degrees))
    counts = range(PILOT_ROUNDS, _MOST_ROUNDS - _SPARE_ROUNDS)
    found = (count + _SPARE_ROUNDS for count in counts if smallest_difference(spread, count) <= difference)
    return next(found, _MOST_ROUNDS)


def smallest_difference(spread: float, rounds: int) -> float:
    """The difference in throughput that :func:`compare` finds in 95 of 100 cases: 0.05 is 5 %.

    From the usual approximation that the quantiles for error and for power add up.
    """
    if rounds < 2:
        return math.inf
    quantiles = student.quantile(LEVEL, rounds - 1) + student.quantile(2 * (1 - _POWER), rounds - 1)
    return math.expm1(quantiles * spread / math.sqrt(rounds))


def scaling_efficiency(row: Row, rows: Sequence[Row], noise: Noise | None = None) -> Estimate | None:
    """Throughput over that of so many single devices; None where no single one of that precision and batch size ran.

    The single device is that of the same strategy, else any of the precision: what one device does needs no strategy.
    """
    single = [
        other
        for other in _alike(row, rows)
        if other.combination.devices == 1 and other.combination.batch_size == row.combination.batch_size
    ]
    single.sort(key=lambda other: other.combination.strategy != row.combination.strategy)
    # Without samples a step of several devices cannot be set against one of a single device.
    if not single or row.samples_per_step is None or single[0].samples_per_step is None:
        return None
    return _estimate(compare(row, single[0], noise), row.combination.devices)


def kept_efficiency(row: Row, rows: Sequence[Row], noise: Noise | None = None) -> Estimate | None:
    """Throughput over that of ``ddp`` with the same precision, devices and batch size; None where that did not run."""
    wanted = dataclasses.replace(row.combination, strategy="ddp")
    plain = next((other for other in _alike(row, rows) if other.combination == wanted), None)
    return None if plain is None else _estimate(compare(row, plain, noise), 1)


@dataclasses.dataclass(frozen=True)
class _Center:
    """Mean and standard deviation of logarithms by round, without the rounds that were disturbed."""

    mean: float
    spread: float
    rounds: int
    disturbed: int

    @staticmethod
    def of(values: Sequence[float], floor: float = 0.0) -> _Center:
        """What lies further from the median than four deviations is left out; fewer than half of the values can be.

        The deviation is the median absolute one, as a standard deviation; few values make it too small by about
        ``n / (n - 0.8)`` (Croux and Rousseeuw, Computational Statistics 1, 1992). Four keeps the errors near ``LEVEL``.
        """
        if not values:
            return _Center(0.0, math.inf, 0, 0)
        middle = statistics.median(values)
        count = len(values)
        deviation = 1.4826 * statistics.median(abs(value - middle) for value in values) * count / (count - 0.8)
        limit = _DISTURBED * max(deviation, floor, _LEAST_SPREAD)
        kept = [value for value in values if abs(value - middle) <= limit]
        spread = statistics.stdev(kept) if len(kept) > 1 else math.inf
        return _Center(statistics.fmean(kept), max(spread, floor, _LEAST_SPREAD), len(kept), count - len(kept))

    def half_width(self, chance: float) -> float:
        """Half of the interval that misses with this chance."""
        if self.rounds < 2:
            return math.inf
        return student.quantile(chance, self.rounds - 1) * self.spread / math.sqrt(self.rounds)


def _ratio(center: _Center) -> Ratio:
    if center.rounds < 2:
        return Ratio(math.exp(center.mean), 0.0, math.inf, 1.0, center.rounds, center.disturbed)
    error = center.spread / math.sqrt(center.rounds)
    return _interval(center.mean, error, center.rounds - 1, center.rounds, center.disturbed)


def _interval(mean: float, error: float, degrees: int, rounds: int, disturbed: int) -> Ratio:
    half = student.quantile(LEVEL, degrees) * error
    chance = student.p_value(mean / error, degrees)
    return Ratio(math.exp(mean), math.exp(mean - half), _exp(mean + half), max(chance, 0.0), rounds, disturbed)


def _exp(value: float) -> float:
    """Infinite where no float holds it: two rounds alone can leave such an interval."""
    return math.exp(value) if value < 700 else math.inf


def _estimate(ratio: Ratio, parts: int) -> Estimate:
    return Estimate(ratio.value / parts, ratio.low / parts, ratio.high / parts)


def _log_rates(row: Row, in_samples: bool) -> list[float | None]:
    """By round, the logarithm of samples or steps per second; None for a round without steps."""
    work = row.samples_per_step if in_samples and row.samples_per_step is not None else 1.0
    return [math.log(work / statistics.fmean(steps)) if steps else None for steps in row.step_seconds]


def _log_ratios(row: Row, other: Row) -> list[float]:
    in_samples = row.samples_per_step is not None and other.samples_per_step is not None
    beside = zip(_log_rates(row, in_samples), _log_rates(other, in_samples), strict=False)  # a round may have been cut
    return [mine - theirs for mine, theirs in beside if mine is not None and theirs is not None]


def _named(rows: Sequence[Row], name: str, is_repeat: bool) -> Row | None:
    found = (row for row in rows if row.combination.name == name and row.is_repeat == is_repeat)
    return next((row for row in found if row.failure is None), None)


def _alike(row: Row, rows: Sequence[Row]) -> list[Row]:
    """Those of the same precision that ran and compute the right thing."""
    return [
        other
        for other in rows
        if other.failure is None
        and not other.is_repeat
        and not other.is_wrong
        and other.combination.precision == row.combination.precision
    ]


def _of_one(noise: Noise | None) -> float:
    """The noise of one side alone: a ratio has that of two."""
    return 0.0 if noise is None else noise.spread / math.sqrt(2)


def _chi_square(chance: float, degrees: int) -> float:
    """What chi-square stays below with this chance, by Wilson and Hilferty (PNAS 17, 1931)."""
    part = 2 / (9 * degrees)
    return degrees * (1 - part + statistics.NormalDist().inv_cdf(chance) * math.sqrt(part)) ** 3
