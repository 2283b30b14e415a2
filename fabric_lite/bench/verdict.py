"""What the figures mean, in sentences: which combination wins, how sure that is, what limits it, what to try next."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from fabric_lite.bench import statistics
from fabric_lite.bench.limits import Limit, limit_of
from fabric_lite.bench.results import About, Results, Row
from fabric_lite.bench.shown import figure

__all__ = ["Verdict", "fail_below", "judge"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the results come to.

    Args:
        winners: Names, fastest first: the fastest of those that compute the right thing, and all that cannot be told
            apart from it. Empty if there is none.
        wrong: Names of combinations that ran, and compute something else.
        limit: What the first winner spends its time on; None where nothing was measured of that.
        command: The command line that runs the script so; None without a winner.
        sentences: All of it in words.
    """

    winners: Sequence[str]
    wrong: Sequence[str]
    limit: Limit | None
    command: str | None
    sentences: Sequence[str]

    def __str__(self) -> str:
        return "\n".join(self.sentences)


def judge(results: Results, *, memory_limit: int | None = None) -> Verdict:
    """Return what the results come to.

    Args:
        results: Of the benchmark.
        memory_limit: Bytes of one accelerator, or on a CPU of the machine; None where they are not known.
    """
    rows = [row for row in results.rows if not row.is_repeat]
    failed = [row for row in rows if row.failure is not None]
    ran = statistics.ranked(rows)
    wrong = [row for row in ran if row.is_wrong]
    right = [row for row in ran if not row.is_wrong]
    names = [row.combination.name for row in wrong]
    if not right:
        return Verdict(
            [], names, None, None, [*_said_of_none(ran), *map(_said_of_wrong, wrong), *_said_of_failed(failed)]
        )
    noise = statistics.noise_of(results.rows, results.baseline)
    first, others = right[0], right[1:]
    ratios = statistics.compare_with_all(first, others, noise)
    equals = [(row, ratio) for row, ratio in zip(others, ratios, strict=True) if not ratio.is_told_apart]
    limit = limit_of(first, rows, memory_limit)
    command = first.combination.command(results.script)
    sentences = [
        _said_of_first(first, results, noise),
        *_said_of_equals(first, equals, noise),
        *_said_of_efficiency(first, rows, noise),
        *_said_of_noise(noise, results),
        *_said_of_units(ran),
        *_said_of_mathematics(first),
        *(_said_of_wrong(row, first) for row in wrong),
        *_said_of_failed(failed),
        *([] if limit is None else limit.sentences),
        _said_of_command(first, command),
    ]
    return Verdict(
        [first.combination.name, *(row.combination.name for row, _ in equals)], names, limit, command, sentences
    )


def fail_below(results: Results, stored: Results, threshold: float) -> tuple[list[str], bool]:
    """Compare with a stored result, for continuous integration: sentences, and whether it fails.

    It fails where the whole interval of a ratio lies below the threshold, so that noise alone does not; where a
    combination of the stored result no longer runs, or computes something else; and where the two have no combination
    in common, since then nothing was checked.

    Args:
        results: Of now.
        stored: Of then.
        threshold: Of throughput now over then: 0.98.
    """
    sentences = [*_said_of_machines(results.about, stored.about), *_said_of_turns(results, stored)]
    before = {row.combination: row for row in stored.rows if row.failure is None and not row.is_repeat}
    now = {row.combination: row for row in results.rows if not row.is_repeat}
    noises = [statistics.noise_of(either.rows, either.baseline) for either in (results, stored)]
    fails = not before.keys() & now.keys()
    if fails:
        sentences.append("Fails: no combination of now is in the stored result, so nothing was checked.")
    for combination, row in now.items():
        if combination not in before:
            sentences.append(f"{combination.name} has no figures in the stored result.")
        elif row.failure is not None:
            sentences.append(f"Fails: {combination.name} ran in the stored result, and now does not: {row.failure}")
            fails = True
        elif row.is_wrong and not before[combination].is_wrong:
            sentences.append(f"Fails: {_said_of_wrong(row)} {_said_of_then(before[combination])}")
            fails = True
        else:
            ratio = statistics.compare_apart(row, before[combination], noises[0], noises[1])
            is_below = ratio.high < threshold
            fails = fails or is_below
            sentences.append(
                f"{'Fails: ' * is_below}{combination.name} has {_of_ratio(ratio)} times the stored throughput; "
                f"{_place_of(ratio, threshold)}."
            )
    sentences += [f"{combination.name} was not run now." for combination in before if combination not in now]
    return sentences, fails


def _said_of_none(ran: Sequence[Row]) -> list[str]:
    if not ran:
        return ["No combination ran."]
    return [f"No winner: {_counted(len(ran), 'combination')} ran, and none computes what one process would."]


def _said_of_failed(failed: Sequence[Row]) -> list[str]:
    """One sentence a cause, the first cause first."""
    causes: dict[str, list[str]] = collections.defaultdict(list)
    for row in failed:
        causes[row.failure or ""].append(row.combination.name)
    return [f"Failed: {'; '.join(names)}. Cause: {cause}" for cause, names in causes.items()]


def _said_of_first(row: Row, results: Results, noise: statistics.Noise | None) -> str:
    speed = statistics.throughput(row)
    unit = "steps/s" if row.samples_per_step is None else "samples/s"
    figures = f"{figure(speed.value, 4)} {unit}"
    if _says_something(speed):
        figures += f" (95 %: {figure(speed.low, 4)} to {figure(speed.high, 4)})"
    fastest = f"{row.combination.name} is the fastest{' in the only round' * (len(row.step_seconds) == 1)}"
    baseline = next((r for r in results.rows if r.combination.name == results.baseline and r.failure is None), None)
    if baseline is None or baseline is row:
        return f"{fastest}: {figures}{'; it is the baseline' * (baseline is row)}."
    ratio = statistics.compare(row, baseline, noise)
    return (
        f"{fastest}: {figures}, {_of_ratio(ratio)} times the baseline, {results.baseline}"
        f"{', which is wrong' * baseline.is_wrong}."
    )


def _said_of_equals(
    first: Row, equals: Sequence[tuple[Row, statistics.Ratio]], noise: statistics.Noise | None
) -> list[str]:
    """One sentence for each, and one for all that ran beside the first for one round only."""
    known = "" if noise is None else f" ({_percent(noise.spread)} a round)"
    sentences = [
        f"{first.combination.name} and {row.combination.name} cannot be told apart at this noise{known}: "
        f"their ratio is {_of_ratio(ratio)}."
        for row, ratio in equals
        if ratio.rounds > 1
    ]
    once = [(row, ratio) for row, ratio in equals if ratio.rounds < 2]
    return [*sentences, *([_said_of_one_round(once)] if once else [])]


def _said_of_one_round(once: Sequence[tuple[Row, statistics.Ratio]]) -> str:
    values = [ratio.value for _, ratio in once]
    if len(once) == 1:
        seen = f"{values[0]:.3g} times the throughput of {once[0][0].combination.name}"
    else:
        seen = f"{min(values):.3g} to {max(values):.3g} times the throughput of the {len(once)} others"
    return (
        f"One round tells nothing apart: that it had {seen} may be noise. "
        f"Try: --rounds {statistics.DEFAULT_ROUNDS}, and a larger --budget if that has ended it."
    )


def _said_of_efficiency(row: Row, rows: Sequence[Row], noise: statistics.Noise | None) -> list[str]:
    efficiency = statistics.scaling_efficiency(row, rows, noise)
    if efficiency is None or row.combination.devices == 1:
        return []
    return [f"It keeps {efficiency.value:.0%} of the throughput of {row.combination.devices} single devices."]


def _said_of_noise(noise: statistics.Noise | None, results: Results) -> list[str]:
    if noise is None:
        return ["The noise of this machine is not known, since the baseline and its repeat did not run for two rounds."]
    least = statistics.smallest_difference(noise.spread, noise.rounds)
    found = f"find differences from {_percent(least)} on" if least < 1 else "are too few to find any difference"
    sentences = [
        f"Noise: the baseline and its repeat differ by {_percent(noise.spread)} from round to round, so these "
        f"{noise.rounds} rounds {found}."
    ]
    if noise.ratio is not None and noise.ratio.is_told_apart:
        sentences.append(
            f"Beware: {results.baseline} and its repeat were told apart, though they are one thing: their ratio is "
            f"{_of_ratio(noise.ratio)}. Something else ran on this machine, or it is the 1 case of 100. Differences of "
            "this size are not to be trusted."
        )
    return sentences


def _said_of_units(ran: Sequence[Row]) -> list[str]:
    sizes = {(row.combination.devices, row.combination.batch_size) for row in ran}
    if len(sizes) == 1 or all(row.samples_per_step is not None for row in ran):
        return []
    return ["Beware: no batch shows how many samples it has, so these are steps/s, however many samples a step has."]


def _said_of_mathematics(first: Row) -> list[str]:
    comparison = first.comparison
    if comparison is None or comparison.verdict == "same":
        return []
    return [f"Whether {first.combination.name} computes what one process would is not known: {comparison.reason}"]


def _said_of_wrong(row: Row, first: Row | None = None) -> str:
    comparison = row.comparison
    assert comparison is not None  # it has the verdict "differs"
    ratio = None if first is None else statistics.compare(row, first, None).value
    if ratio is not None and ratio > 1 and first is not None:
        return (
            f"Fast but wrong: {row.combination.name} has {ratio:.3g} times the throughput of {first.combination.name}, "
            f"but does not compute what one process would: {comparison.reason}."
        )
    return f"Wrong: {row.combination.name} does not compute what one process would: {comparison.reason}."


def _said_of_then(row: Row) -> str:
    is_known = row.comparison is not None and row.comparison.verdict == "same"
    return "It did in the stored result." if is_known else "The stored result does not say whether it did."


def _said_of_command(row: Row, command: str) -> str:
    batch = row.combination.batch_size
    return f"Run it: {command}" + ("" if batch is None else f"  (with batch_size={batch} in the script's loaders)")


def _said_of_machines(now: About, stored: About) -> list[str]:
    fields: Mapping[str, str] = {
        "processor": "processor",
        "cores": "number of cores",
        "accelerator": "accelerator",
        "torch": "torch",
        "python": "Python",
    }
    return [
        f"The stored result is of another {words} ({getattr(stored, field)}; now {getattr(now, field)}), "
        "so its ratios are not of the code alone."
        for field, words in fields.items()
        if getattr(now, field) != getattr(stored, field)
    ]


def _said_of_turns(now: Results, stored: Results) -> list[str]:
    if now.in_turns == stored.in_turns:
        return []
    ways = [("in turns" if either.in_turns else "one run at a time") for either in (stored, now)]
    return [f"The stored result was taken {ways[0]} and this one {ways[1]}, so its ratios are not of the code alone."]


def _of_ratio(ratio: statistics.Ratio) -> str:
    if not _says_something(ratio):
        return f"{ratio.value:.3f} (too few rounds for an interval)"
    left_out = f", {_counted(ratio.disturbed, 'disturbed round')} left out" if ratio.disturbed else ""
    return f"{ratio.value:.3f} (99 %: {ratio.low:.3f} to {ratio.high:.3f}{left_out})"


def _says_something(figure: statistics.Ratio | statistics.Estimate) -> bool:
    """Whether its interval is narrower than an order of magnitude, which that of two rounds seldom is."""
    return figure.low > 0 and figure.high / figure.low < 10


def _place_of(ratio: statistics.Ratio, threshold: float) -> str:
    if ratio.high < threshold:
        return f"all of that is below {threshold:g}"
    if ratio.low >= threshold:
        return f"none of that is below {threshold:g}"
    return f"it cannot be told whether that is below {threshold:g}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"
