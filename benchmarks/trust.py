"""Whether what ``fabric-bench`` says is true: of two that are alike, of one that is 5 % slower, and of the winner.

    OMP_NUM_THREADS=1 python benchmarks/trust.py                    # about 90 minutes, for a quiet machine
    OMP_NUM_THREADS=1 python benchmarks/trust.py --keep-recordings  # 15 minutes: with the recordings in results/
    OMP_NUM_THREADS=1 python benchmarks/trust.py --replay-only      # seconds: these recordings alone
    OMP_NUM_THREADS=1 python benchmarks/trust.py --quick

Real benchmarks with the default budget; and long recordings, in which such benchmarks are replayed: from some round on,
over as many rounds as a benchmark would have asked for, but half of the recording at most. A hundred of them are in one
recording, so they overlap and are far fewer independent cases; the winners are looked for in a recording each. What is
best is what other rounds say than those that the benchmark had: those of a recording that was taken apart from a real
one, and those of the recording that a replayed one left. Where two are so close that a recording cannot say whether one
of them has 98 % of the other's speed, it is made longer, six times as long at most. The intervals are about 95 %: from
round to round as if these had nothing in common, and looked at after each part.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import parser, show, write

from fabric_lite import bench
from fabric_lite.bench.benchmark import DEFAULTS
from fabric_lite.bench.results import Results, Row
from fabric_lite.bench.schedule import LOOKS, Schedule
from fabric_lite.bench.statistics import noise_of
from fabric_lite.bench.verdict import judge

HERE = Path(__file__).parent
RECORDINGS = HERE / "results" / "trust_recordings.json"
REAL_PLANTED, REPLAYS, PLANTED_ROUNDS = 5, 100, 120
# Of the models whose winner is looked for: those that are benchmarked, and those whose benchmark is replayed.
REAL_SEEDS, REPLAYED_SEEDS = range(1, 5), range(5, 21)
CLOSE_ENOUGH = 0.98
# A recording has as many parts as it takes to say of each combination whether it is close enough to the best; at most
# so many, after which some still cannot say it.
PART_SECONDS, MOST_PARTS = 100.0, 6
PLANTED: dict[str, Any] = {"devices": [1], "strategies": ["ddp"], "batch_sizes": [1, 2, 3], "precisions": ["32-true"]}
SEEDED: dict[str, Any] = {"devices": [1, 2], "strategies": ["ddp", "fsdp"], "precisions": ["32-true"]}


@dataclasses.dataclass(frozen=True)
class Recording:
    """A long benchmark, and how long one of its rounds took, in seconds."""

    results: Results
    round_seconds: float

    @property
    def rounds(self) -> int:
        return min(len(row.step_seconds) for row in self.results.rows)

    @property
    def is_decided(self) -> bool:
        """Whether it says of all combinations, with 95 % intervals, that they are close enough to the best or not."""
        best = best_of(self.results)
        kept = [kept_by(row, best) for row in self.results.rows if not row.is_repeat and row is not best]
        return all(abs(ratio - CLOSE_ENOUGH) > half for ratio, half in kept)

    def continued_by(self, other: Recording) -> Recording:
        """The rounds of this one and then those of another of the same script."""
        rows = [
            dataclasses.replace(mine, step_seconds=[*mine.step_seconds[: self.rounds], *theirs.step_seconds])
            for mine, theirs in zip(self.results.rows, other.results.rows, strict=True)
        ]
        seconds = self.rounds * self.round_seconds + other.rounds * other.round_seconds
        return Recording(dataclasses.replace(self.results, rows=rows), seconds / (self.rounds + other.rounds))

    def part(self, rounds: Sequence[int]) -> Results:
        """These rounds of it."""
        rows = [
            dataclasses.replace(row, step_seconds=[row.step_seconds[number] for number in rounds])
            for row in self.results.rows
        ]
        return dataclasses.replace(self.results, rows=rows)

    def benchmark(self, first: int, looks: int = LOOKS) -> tuple[Results, Results]:
        """What one would have found from this round on, and all other rounds; after the last one comes the first."""
        order = [(first + number) % self.rounds for number in range(self.rounds)]
        budget = min(DEFAULTS.BUDGET_SECONDS, self.rounds // 2 * self.round_seconds)
        plan = Schedule(None, budget, self.results.baseline, looks)
        while not plan.has_ended:
            passed = (plan.done + 1) * self.round_seconds
            plan.end_round(passed, self.round_seconds, lambda: self.part(order[: plan.done]).rows)
        return self.part(order[: plan.done]), self.part(order[plan.done :])

    def as_json(self) -> dict[str, Any]:
        """With whole microseconds, which take less room."""
        data = self.results.as_json()
        for row in data["rows"]:
            row["step_seconds"] = [[round(seconds * 1e6) for seconds in steps] for steps in row["step_seconds"]]
        return {"results": data, "round_seconds": self.round_seconds}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Recording:
        for row in data["results"]["rows"]:
            row["step_seconds"] = [[microseconds / 1e6 for microseconds in steps] for steps in row["step_seconds"]]
        return Recording(Results.from_json(data["results"]), data["round_seconds"])


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument(
        "--replay-only", action="store_true", help="only what the recordings say; what is real in the FILE stays"
    )
    options.add_argument("--keep-recordings", action="store_true", help="real benchmarks, judged by what is recorded")
    options.add_argument("--quick", action="store_true", help="two short rounds of each: whether it works at all")
    given = options.parse_args()
    path = None if given.json is None else given.json.resolve()
    # Paths as they stand in the results, whoever runs this.
    os.chdir(HERE.parent)
    if given.quick:
        write(path, {"quick": quick()})
    elif given.replay_only:
        stored = {} if path is None or not path.exists() else json.loads(path.read_text())
        write(path, {**({"real": stored["real"]} if "real" in stored else {}), "replayed": replay()})
    else:
        if not given.keep_recordings:
            record_all()
        write(path, {"real": measure(), "replayed": replay()})


def quick() -> dict[str, Any]:
    """One short benchmark of each script."""
    short = {"rounds": 2, "steps": 2, "warmup": 1}
    planted = [told_apart(run("trust_planted.py", **PLANTED, **short))]
    show_planted("Real benchmarks", planted)
    seeded = run("trust_seeded.py", "1", **SEEDED, **short)
    return summary(planted, [kept_by_winner(seeded, seeded)])


def replay() -> dict[str, Any]:
    """Benchmarks from the recordings: starts in that of known speeds, and one in each of the models that are left."""
    planted, *seeded = recordings()
    starts = random.Random(0).sample(range(planted.rounds), REPLAYS)
    of_looks = {
        looks: [told_apart(planted.benchmark(first, looks)[0]) for first in starts] for looks in range(1, LOOKS + 1)
    }
    for looks, benchmarks in of_looks.items():
        show_planted(f"Replayed benchmarks that ask {looks} times how many rounds it takes", benchmarks)
    winners = [
        kept_by_winner(*one.benchmark(random.Random(number).randrange(one.rounds)))
        for number, one in enumerate(seeded[len(REAL_SEEDS) :])
    ]
    show_winners("Winners of replayed benchmarks", winners)
    with_one_look = summary(of_looks[1], [])
    return {**summary(of_looks[LOOKS], winners), "slower_with_one_look": with_one_look["slower"]}


def measure() -> dict[str, Any]:
    """Real benchmarks; the winners among them judged by the recordings."""
    planted = [told_apart(run("trust_planted.py", **PLANTED)) for _ in range(REAL_PLANTED)]
    show_planted("Real benchmarks", planted)
    _, *seeded = recordings()
    winners = [
        kept_by_winner(run("trust_seeded.py", str(seed), **SEEDED), recording.results)
        for seed, recording in zip(REAL_SEEDS, seeded, strict=False)
    ]
    show_winners("Winners of real benchmarks", winners)
    return summary(planted, winners)


def record_all() -> None:
    """Record the known speeds and each model; each goes to the file as soon as it is there."""
    found = [record("trust_planted.py", rounds=PLANTED_ROUNDS, budget_seconds=3600.0, **PLANTED)]
    for seed in (*REAL_SEEDS, *REPLAYED_SEEDS):
        found.append(record_until_decided(seed))
        data = {"recordings": [one.as_json() for one in found]}
        RECORDINGS.write_text(json.dumps(data, separators=(",", ":")) + "\n")


def recordings() -> list[Recording]:
    """That of the known speeds, and one of each model."""
    return [Recording.from_json(data) for data in json.loads(RECORDINGS.read_text())["recordings"]]


def run(script: str, *arguments: str, **options: Any) -> Results:
    def progress(done: int, total: int, what: str) -> None:
        print(f"{script} {' '.join(arguments)} {done}/{total} {what}", file=sys.stderr, flush=True)

    return bench.run(f"benchmarks/{script}", *arguments, accelerator="cpu", progress=progress, **options)


def record(script: str, *arguments: str, **options: Any) -> Recording:
    start = time.monotonic()
    results = run(script, *arguments, check_steps=0, **options)
    return Recording(results, (time.monotonic() - start) / len(results.rows[0].step_seconds))


def record_until_decided(seed: int) -> Recording:
    """Of a seeded model, in parts, since more may be needed than the first says."""
    parts = (
        record("trust_seeded.py", str(seed), rounds=sys.maxsize, budget_seconds=PART_SECONDS, **SEEDED)
        for _ in range(MOST_PARTS)
    )
    recording = next(parts)
    while not recording.is_decided and (part := next(parts, None)) is not None:
        recording = recording.continued_by(part)
    return recording


def told_apart(results: Results) -> dict[str, Any]:
    """What the verdict says of the planted script's three speeds, the first of which was run twice."""
    baseline, alike, slower, _ = (row.combination.name for row in results.rows)
    winners = judge(results).winners
    noise = noise_of(results.rows, results.baseline)
    return {
        "rounds": len(results.rows[0].step_seconds),
        "noise": None if noise is None else noise.spread,
        "repeat": noise is not None and noise.ratio is not None and noise.ratio.is_told_apart,
        "alike": not {baseline, alike} <= set(winners),
        "slower": slower not in winners,
    }


def kept_by_winner(results: Results, others: Results) -> dict[str, Any]:
    """The throughput of the winner over that of the best, both as other rounds have them; no winner has none."""
    best = best_of(others)
    rows = {row.combination.name: row for row in others.rows if not row.is_repeat}
    winner = next(iter(judge(results).winners), None)
    kept, error = (0.0, 0.0) if winner is None else kept_by(rows[winner], best)
    return {
        "model": " ".join(results.script[1:]),
        "winner": winner,
        "best": best.combination.name,
        "kept": kept,
        "kept_error": error,
        "second_best": max(speed_of(row) for row in rows.values() if row is not best) / speed_of(best),
        "rounds": len(results.rows[0].step_seconds),
        "judged_by_rounds": len(best.step_seconds),
    }


def best_of(results: Results) -> Row:
    return max((row for row in results.rows if not row.is_repeat), key=speed_of)


def kept_by(row: Row, best: Row) -> tuple[float, float]:
    """The throughput of a row over that of the best, and half of the 95 % interval of that, from round to round."""
    kept = speed_of(row) / speed_of(best)
    ratios = [
        statistics.fmean(theirs) / statistics.fmean(mine)
        for mine, theirs in zip(row.step_seconds, best.step_seconds, strict=False)
    ]
    spread = statistics.stdev(ratios) / statistics.fmean(ratios)
    return kept, 1.96 * kept * spread / math.sqrt(len(ratios))


def speed_of(row: Row) -> float:
    """Samples per second, of all steps."""
    assert row.samples_per_step is not None
    steps = [seconds for steps in row.step_seconds for seconds in steps]
    return row.samples_per_step * len(steps) / sum(steps)


def summary(planted: Sequence[dict[str, Any]], winners: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "benchmarks": len(planted),
        **{name: sum(one[name] for one in planted) for name in ("alike", "repeat", "slower")},
        "winners": len(winners),
        "winners_good": sum(one["kept"] >= CLOSE_ENOUGH for one in winners),
        "each": [*planted, *winners],
    }


def show_planted(title: str, planted: Sequence[dict[str, Any]]) -> None:
    count = len(planted)
    show(
        f"{title}: told apart, of {count}",
        ["", "times", "bar"],
        [
            ["two that are alike", str(sum(one["alike"] for one in planted)), f"at most {count * 5 // 100}"],
            ["the baseline and its repeat", str(sum(one["repeat"] for one in planted)), f"at most {count * 5 // 100}"],
            ["one that is 5 % slower", str(sum(one["slower"] for one in planted)), f"at least {-(-count * 95 // 100)}"],
        ],
    )
    noises = sorted(one["noise"] for one in planted)
    counts = sorted(one["rounds"] for one in planted)
    print(f"  noise {noises[0]:.1%} to {noises[-1]:.1%} a round; {counts[0]} to {counts[-1]} rounds")


def show_winners(title: str, winners: Sequence[dict[str, Any]]) -> None:
    good = sum(one["kept"] >= CLOSE_ENOUGH for one in winners)
    show(
        f"{title}: {good} of {len(winners)} have {CLOSE_ENOUGH} of the best one's speed in other rounds (bar 19 of 20)",
        ["model", "winner", "rounds", "best of others", "of its speed", "second best there", "other rounds"],
        [
            [
                one["model"],
                str(one["winner"]),
                str(one["rounds"]),
                one["best"],
                f"{one['kept']:.3f} ±{one['kept_error']:.3f}",
                f"{one['second_best']:.3f}",
                str(one["judged_by_rounds"]),
            ]
            for one in winners
        ],
    )


if __name__ == "__main__":
    main()
