"""Measuring all combinations, in rounds: each of them once, in turn, so that a machine that drifts hits all alike.

Where they can live side by side, they take turns within a round too.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from fabric_lite.bench.machine import available_memory
from fabric_lite.bench.results import Combination, Communication, Comparison, Memory, Row
from fabric_lite.bench.runs import Outcome, Runs
from fabric_lite.bench.schedule import Schedule
from fabric_lite.launch.environment import cores
from fabric_lite.launch.rank import ScriptCall

__all__ = ["Course", "Measured", "Progress", "measure"]

# The reference computes in full precision, or better where a combination does.
_REFERENCES = {"64-true": "64-true"}
_REFERENCE_PRECISION = "32-true"
# Of a turn, at least: after each the caches are another job's.
_TURN_SECONDS = 0.05
# That all jobs together may take of the memory that is free.
_SHARE_OF_MEMORY = 0.5
# Of its steps' time, what a rank may compute while it waits for its turn: to wake up and to fall asleep.
_SHARE_OF_WORK = 0.05


@dataclasses.dataclass(frozen=True)
class Course:
    """How a benchmark goes.

    Args:
        script: What is run.
        combinations: In which ways.
        baseline: One of them, which is run twice a round.
        steps: Timed steps of each run.
        warmup: Steps before them.
        check_steps: Steps before those, in the first round, that are compared with the reference; 0: none.
        rounds: How often each combination is timed, at most, besides a first run that only checks and tries out where
            they take turns; None: as often as it takes to see differences of 5 %, which the first rounds tell.
        budget_seconds: No round begins that would probably end later; the first always runs.
        timeout_seconds: A run that takes longer has failed.
        accelerator: As in ``Fabric(accelerator=)``; None is the script's own choice.
    """

    script: ScriptCall
    combinations: Sequence[Combination]
    baseline: Combination
    steps: int
    warmup: int
    check_steps: int
    rounds: int | None
    budget_seconds: float
    timeout_seconds: float
    accelerator: str | None = None


# Called before each run with the number of runs done, of how many, and what runs now.
Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a course has found.

    Args:
        rows: Of all combinations, in order, and of the baseline once more.
        device_name: The accelerator's; None on a CPU.
        device_memory: Its bytes; None on a CPU.
        is_complete: Whether no Ctrl-C has ended it early.
        in_turns: Whether the combinations lived side by side in the timed rounds; else one run followed the other.
    """

    rows: list[Row]
    device_name: str | None
    device_memory: int | None
    is_complete: bool
    in_turns: bool


def measure(course: Course, progress: Progress = lambda *_: None) -> Measured:
    """Run the course. Ctrl-C ends it; the rounds that were done then are what it has found, if there is one.

    Raises:
        LaunchError: The ranks could not be started.
        KeyboardInterrupt: Before the end of the first round.
    """
    with tempfile.TemporaryDirectory(prefix="fabric_bench_") as name:
        folder = Path(name)
        with Runs(course.script, folder, course.accelerator, course.timeout_seconds) as runs:
            return _Measurement(course, runs, folder, progress).run()


@dataclasses.dataclass
class _Entry:
    """What is known so far of one combination."""

    combination: Combination
    is_repeat: bool = False
    failure: str | None = None
    first: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # the first run's figures, by rank
    rounds: list[list[dict[str, Any]]] = dataclasses.field(default_factory=list)  # of those that are timed
    starts: list[float] = dataclasses.field(default_factory=list)  # seconds of those that start by themselves
    record: Path | None = None
    comparison: Comparison | None = None


class _Measurement:
    def __init__(self, course: Course, runs: Runs, folder: Path, progress: Progress) -> None:
        self._course, self._runs, self._folder, self._progress = course, runs, folder, progress
        self._entries = [_Entry(combination) for combination in course.combinations]
        self._entries.append(_Entry(course.baseline, is_repeat=True))
        kinds = {
            (combination.devices, combination.batch_size, precision)
            for combination in course.combinations
            for precision in (combination.precision, _REFERENCE_PRECISION)
        }
        self._references = len(kinds) * bool(course.check_steps)
        self._schedule = Schedule(course.rounds, course.budget_seconds, course.baseline.name)
        self._done = 0  # runs
        self._takes_turns = False  # else one run follows the other
        self._first_round_seconds = 0.0

    def run(self) -> Measured:
        began, is_complete = time.monotonic(), True
        try:
            while not self._schedule.has_ended:
                self._whole_round(began)
        except KeyboardInterrupt:
            if self._schedule.done == 0:
                raise
            is_complete = False
            for entry in self._entries:
                del entry.rounds[self._schedule.done - self._schedule.trials :]
        figures = [own for entry in self._entries for own in entry.first]
        device = figures[0] if figures else {"device_name": None, "device_memory": None}
        return Measured(self._rows(), device["device_name"], device["device_memory"], is_complete, self._takes_turns)

    def _whole_round(self, began: float) -> None:
        """A round, and what is decided after it."""
        start = time.monotonic()
        self._round(self._schedule.done)
        seconds = time.monotonic() - start
        is_first = self._schedule.done == 0
        if is_first:
            self._first_round_seconds = seconds
            if self._course.check_steps:
                self._compare()
        self._schedule.end_round(time.monotonic() - began, seconds, self._rows)
        if all(entry.failure is not None for entry in self._entries):
            self._schedule.end()
        if is_first and not self._schedule.has_ended and self._can_take_turns():
            self._takes_turns = True
            self._begin_anew()

    def _rows(self) -> list[Row]:
        return [_row(entry) for entry in self._entries]

    def _can_take_turns(self) -> bool:
        """Whether the jobs can live side by side, by what the first round has shown.

        That takes memory for all of them, which accelerators seldom have. A job that works on while it waits (the
        workers of a loader, an asynchronous save) would have that for nothing, and hold the others up.
        """
        figures = [own for entry in self._entries if entry.failure is None for own in entry.first]
        has_room = sum(own["resident"] for own in figures) < _SHARE_OF_MEMORY * available_memory()
        is_on_cpu = all(own["device_name"] is None and own["blocked"] is not None for own in figures)
        has_warmup = self._course.warmup + self._course.check_steps > 0  # a job's first turn comes after it
        works_beside = any(own["works_beside"] for own in figures)
        return has_warmup and has_room and is_on_cpu and not works_beside

    def _begin_anew(self) -> None:
        """Do not count the rounds so far, which went otherwise than those to come."""
        self._schedule.begin_anew()
        for entry in self._entries:
            entry.rounds.clear()

    def _round(self, number: int) -> None:
        if self._takes_turns:
            # A second time, since what failed once, late, need not cost all rounds before it.
            if self._round_in_turns(number) or self._round_in_turns(number):
                return
            self._takes_turns = False
            self._begin_anew()
        turn = number % len(self._entries)
        for entry in self._entries[turn:] + self._entries[:turn]:
            if entry.failure is not None:
                self._done += 1
                continue
            checks = number == 0 and not entry.is_repeat
            outcome = self._run(
                f"round {number + 1}: {entry.combination.name}",
                entry.combination,
                # All time the same steps, those that check something too.
                warmup=self._course.warmup + (0 if checks else self._course.check_steps),
                steps=self._course.steps,
                check_steps=self._course.check_steps if checks else 0,
                initial_weights=str(self._folder / "initial"),
                probes=checks,
            )
            entry.failure = outcome.failure or _shortfall(outcome, self._course)
            if entry.failure is None:
                entry.rounds.append(outcome.figures)
                entry.first = entry.first or outcome.figures
                entry.starts.append(max(own["startup_seconds"] for own in outcome.figures))
            if checks and entry.failure is None and self._course.check_steps:
                entry.record = outcome.folder
            else:
                shutil.rmtree(outcome.folder)

    def _round_in_turns(self, number: int) -> bool:
        """Whether all has gone well, and none has worked while it waited; else nothing has been measured."""
        entries = [entry for entry in self._entries if entry.failure is None]
        turn = number % len(entries)
        entries = entries[turn:] + entries[:turn]
        self._report(f"round {number + 1}: all in turns")
        outcomes = self._runs.run_in_turns(
            [entry.combination for entry in entries],
            steps_of_turns=[_steps_of_a_turn(entry) for entry in entries],
            warmup=self._course.warmup + self._course.check_steps,
            steps=self._course.steps,
            timeout_seconds=self._course.timeout_seconds + self._first_round_seconds,
        )
        if outcomes is None or any(_works_while_waiting(own) for outcome in outcomes for own in outcome.figures):
            return False
        self._done += len(self._entries)
        for entry, outcome in zip(entries, outcomes, strict=True):
            entry.rounds.append(outcome.figures)
            shutil.rmtree(outcome.folder)
        return True

    def _report(self, what: str) -> None:
        total = len(self._entries) * self._schedule.total + self._references
        self._progress(self._done, max(total, self._done + 1), what)

    def _run(self, what: str, combination: Combination, **options: Any) -> Outcome:
        self._report(what)
        self._done += 1
        return self._runs.run(combination, **options)

    def _compare(self) -> None:
        from fabric_lite.bench.comparison import compared, fed_to  # with torch, which nothing else here needs

        references: dict[Any, Outcome] = {}
        for entry in self._entries:
            if entry.record is None:
                continue
            combination = entry.combination
            exact = _REFERENCES.get(combination.precision, _REFERENCE_PRECISION)
            fed = fed_to(entry.record, combination.devices)
            for precision in dict.fromkeys((exact, combination.precision)):
                if (fed, precision) not in references:
                    references[fed, precision] = self._run_reference(combination, precision, entry.record)
            reference, rounded = references[fed, exact], references[fed, combination.precision]
            if reference.failure is not None:
                entry.comparison = Comparison("not comparable", reason=f"the reference: {reference.failure}")
            else:
                entry.comparison = compared(
                    entry.record,
                    combination.devices,
                    reference.folder,
                    combination.precision,
                    None if rounded.failure is not None or rounded is reference else rounded.folder,
                )
        for folder in {entry.record for entry in self._entries if entry.record is not None}:
            shutil.rmtree(folder)

    def _run_reference(self, combination: Combination, precision: str, record: Path) -> Outcome:
        return self._run(
            f"the reference for {combination.devices} devices, {precision}",
            Combination("auto", precision, 1, combination.batch_size),
            warmup=0,
            steps=0,
            check_steps=self._course.check_steps,
            initial_weights=str(self._folder / "initial"),
            feed=str(record),
        )


def _steps_of_a_turn(entry: _Entry) -> int:
    step_seconds = max(median(own["step_seconds"]) for own in entry.first)
    return max(1, math.ceil(_TURN_SECONDS / step_seconds))


def _works_while_waiting(own: dict[str, Any]) -> bool:
    """Whether a rank has had much of its work done while other jobs had their turns: by a thread of its own, say."""
    return bool(own["worked_while_waiting"] > _SHARE_OF_WORK * sum(own["step_seconds"]))


def _shortfall(outcome: Outcome, course: Course) -> str | None:
    """Why a run that has ended well is of no use, if so."""
    wanted = course.check_steps + course.warmup + course.steps
    done = min(figures["done"] for figures in outcome.figures)
    return None if done >= wanted else f"the script ended after {done} steps of the {wanted} that are needed"


def _row(entry: _Entry) -> Row:
    if not entry.first:
        return Row(entry.combination, failure=entry.failure, is_repeat=entry.is_repeat)
    rounds = entry.rounds or [entry.first]
    slowest = [max(figures, key=lambda own: median(own["step_seconds"])) for figures in rounds]
    # In the first round there are the checks, with what they keep in memory.
    usual = [figures for figures in rounds if figures is not entry.first] or rounds
    # With fewer cores than ranks these take turns: not to run is not to wait for a collective.
    shows_waits = 1 < entry.combination.devices <= cores() and all(own["blocked"] is not None for own in slowest)
    return Row(
        entry.combination,
        failure=entry.failure,
        step_seconds=[
            [max(of_ranks) for of_ranks in zip(*(own["step_seconds"] for own in figures), strict=True)]
            for figures in rounds
        ],
        samples_per_step=_over_shares(rounds, "samples"),
        tokens_per_step=_over_shares(rounds, "tokens"),
        phases={name: median(own["phases"][name] for own in slowest) for name in slowest[0]["phases"]},
        exposed_communication=median(own["blocked"] for own in slowest) if shows_waits else None,
        memory=_memory([own for figures in usual for own in figures], [own["probe"] for own in entry.first]),
        communication=_communication(entry.first[0]["probe"]),
        comparison=entry.comparison,
        startup_seconds=median(entry.starts[1:] or entry.starts),
        is_repeat=entry.is_repeat,
    )


def _over_shares(rounds: Sequence[Sequence[dict[str, Any]]], name: str) -> float | None:
    """The mean over rounds of the sum over ranks, those with the same share of the data once."""
    sums = []
    for figures in rounds:
        shares = {own["data_rank"]: own[name] for own in figures}
        if any(value is None for value in shares.values()):
            return None
        sums.append(sum(shares.values()))
    return mean(sums) or None


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
