"""Whether what ``fabric-bench`` says is true: of two that are alike, of one that is 5 % slower, and of the winner.

    OMP_NUM_THREADS=1 python benchmarks/trust.py                # about 25 minutes, for a quiet machine
    OMP_NUM_THREADS=1 python benchmarks/trust.py --replay-only  # seconds: from the recordings in results/
    OMP_NUM_THREADS=1 python benchmarks/trust.py --quick

Real benchmarks with the default budget; and long recordings, in which many such benchmarks are replayed: from a random
round on, over as many rounds as a benchmark would have asked for, but half of the recording at most. They overlap: they
are far fewer independent cases. What is best is what a long recording says, without
the rounds of the benchmark that is judged by it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measure import parser, show, write

from fabric_lite import bench
from fabric_lite.bench.benchmark import DEFAULTS
from fabric_lite.bench.results import Results, Row
from fabric_lite.bench.statistics import PILOT_ROUNDS, compare, noise_of, rounds_needed
from fabric_lite.bench.verdict import judge

HERE = Path(__file__).parent
RECORDINGS = HERE / "results" / "trust_recordings.json"
SEEDS = (1, 2, 3, 4)  # of the models whose winner is looked for
REAL_PLANTED, REPLAYS, REPLAYED_WINNERS = 5, 100, 16
CLOSE_ENOUGH = 0.98
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

    def part(self, rounds: Sequence[int]) -> Results:
        """These rounds of it."""
        rows = [
            dataclasses.replace(row, step_seconds=[row.step_seconds[number] for number in rounds])
            for row in self.results.rows
        ]
        return dataclasses.replace(self.results, rows=rows)

    def benchmark(self, seed: int) -> tuple[Results, Results]:
        """What one with the default budget would have found from a random round on, and all other rounds.

        After the last round comes the first; half of them at least are left for the others.
        """
        first = random.Random(seed).randrange(self.rounds)
        order = [(first + number) % self.rounds for number in range(self.rounds)]
        most = min(int(DEFAULTS.BUDGET_SECONDS / self.round_seconds), self.rounds // 2)
        count = PILOT_ROUNDS
        for _ in range(2):  # as the benchmark asks
            wanted = rounds_needed(self.part(order[:count]).rows, self.results.baseline)
            count = max(count, min(wanted, most))
        return self.part(order[:count]), self.part(order[count:])


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--replay-only", action="store_true", help="only what the recordings say")
    options.add_argument("--quick", action="store_true", help="two short rounds of each: whether it works at all")
    given = options.parse_args()
    path = None if given.json is None else given.json.resolve()
    # Paths as they stand in the results, whoever runs this.
    os.chdir(HERE.parent)
    if given.quick:
        write(path, {"quick": quick()})
    elif given.replay_only:
        write(path, {"replayed": replay()})
    else:
        write(path, {"real": measure(), "replayed": replay()})


def quick() -> dict[str, Any]:
    """One short benchmark of each script."""
    short = {"rounds": 2, "steps": 2, "warmup": 1}
    planted = [told_apart(run("trust_planted.py", **PLANTED, **short))]
    show_planted("Real benchmarks", planted)
    seeded = run("trust_seeded.py", "1", **SEEDED, **short)
    return summary(planted, [kept_by_winner(seeded, seeded)])


def replay() -> dict[str, Any]:
    """Benchmarks from the recordings."""
    stored = json.loads(RECORDINGS.read_text())["recordings"]
    planted, *seeded = [Recording(Results.from_json(one["results"]), one["round_seconds"]) for one in stored]
    benchmarks = replayed(planted, REPLAYS, lambda part, _: told_apart(part))
    show_planted("Replayed benchmarks", benchmarks)
    count = REPLAYED_WINNERS // len(seeded)
    winners = [winner for recording in seeded for winner in replayed(recording, count, kept_by_winner)]
    show_winners("Winners of replayed benchmarks", winners)
    return summary(benchmarks, winners)


def measure() -> dict[str, Any]:
    """Real benchmarks and recordings; the latter go to a file."""
    planted = [told_apart(run("trust_planted.py", **PLANTED)) for _ in range(REAL_PLANTED)]
    show_planted("Real benchmarks", planted)
    recordings = [record("trust_planted.py", rounds=120, check_steps=0, **PLANTED)]
    winners = []
    for seed in SEEDS:
        short = run("trust_seeded.py", str(seed), **SEEDED)
        recordings.append(record("trust_seeded.py", str(seed), rounds=100, check_steps=0, **SEEDED))
        winners.append(kept_by_winner(short, recordings[-1].results))
    show_winners("Winners of real benchmarks", winners)
    RECORDINGS.write_text(
        json.dumps({"recordings": [as_json(one) for one in recordings]}, separators=(",", ":")) + "\n"
    )
    return summary(planted, winners)


def run(script: str, *arguments: str, **options: Any) -> Results:
    def progress(done: int, total: int, what: str) -> None:
        print(f"{script} {' '.join(arguments)} {done}/{total} {what}", file=sys.stderr, flush=True)

    return bench.run(f"benchmarks/{script}", *arguments, accelerator="cpu", progress=progress, **options)


def record(script: str, *arguments: str, **options: Any) -> Recording:
    start = time.monotonic()
    results = run(script, *arguments, budget_seconds=3600.0, **options)
    return Recording(results, (time.monotonic() - start) / len(results.rows[0].step_seconds))


def as_json(recording: Recording) -> dict[str, Any]:
    data = recording.results.as_json()
    for row in data["rows"]:
        row["step_seconds"] = [[round(seconds, 6) for seconds in steps] for steps in row["step_seconds"]]
    return {"results": data, "round_seconds": recording.round_seconds}


def replayed(recording: Recording, count: int, figure: Callable[[Results, Results], Any]) -> list[Any]:
    """``figure(benchmark, all other rounds)`` of so many replays."""
    return [figure(*recording.benchmark(seed)) for seed in range(count)]


def told_apart(results: Results) -> dict[str, Any]:
    """What the benchmark says of the planted script's three speeds, the first of which was run twice."""
    baseline, alike, slower, _ = results.rows
    noise = noise_of(results.rows, results.baseline)
    with_slower = compare(baseline, slower, noise)
    return {
        "rounds": len(baseline.step_seconds),
        "noise": None if noise is None else noise.spread,
        "repeat": noise is not None and noise.ratio is not None and noise.ratio.is_told_apart,
        "alike": compare(baseline, alike, noise).is_told_apart,
        "slower": with_slower.is_told_apart and with_slower.value > 1,
        "ratio": with_slower.value,
    }


def kept_by_winner(results: Results, long: Results) -> dict[str, Any]:
    """The throughput of the winner over that of the best, both as a long run has them."""
    speeds = {row.combination.name: speed_of(row) for row in long.rows if not row.is_repeat}
    winner, best = judge(results).winners[0], max(speeds, key=speeds.__getitem__)
    rounds = len(results.rows[0].step_seconds)
    return {"winner": winner, "best": best, "kept": speeds[winner] / speeds[best], "rounds": rounds}


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
            ["the baseline and its repeat", str(sum(one["repeat"] for one in planted)), ""],
            ["one that is 5 % slower", str(sum(one["slower"] for one in planted)), f"at least {-(-count * 95 // 100)}"],
        ],
    )
    noises = sorted(one["noise"] for one in planted)
    counts = sorted(one["rounds"] for one in planted)
    print(f"  noise {noises[0]:.1%} to {noises[-1]:.1%} a round; {counts[0]} to {counts[-1]} rounds")


def show_winners(title: str, winners: Sequence[dict[str, Any]]) -> None:
    lines = [[one["winner"], one["best"], f"{one['kept']:.3f}", str(one["rounds"])] for one in winners]
    show(
        f"{title} (bar: {CLOSE_ENOUGH} of the best)", ["winner", "best in a long run", "of its speed", "rounds"], lines
    )


if __name__ == "__main__":
    main()
