"""Measuring all combinations, in rounds: each of them once, in turn, so that a machine that drifts hits all alike.

Where they can live side by side, they take turns within a round too.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fabric_lite.bench.entry import Entry, blocked_seconds, row_of
from fabric_lite.bench.results import Combination, Comparison, Row
from fabric_lite.bench.runs import Outcome, Runs
from fabric_lite.bench.schedule import Schedule
from fabric_lite.bench.statistics import PILOT_ROUNDS
from fabric_lite.errors import LaunchError
from fabric_lite.launch.rank import ScriptCall
from fabric_lite.machine import available_memory

__all__ = ["Course", "Measured", "Progress", "measure"]

# The reference computes in full precision, or better where a combination does.
_REFERENCES = {"64-true": "64-true"}
_REFERENCE_PRECISION = "32-true"
# Of a turn, at least: after each the caches are another job's, which costs some 2 ms.
_TURN_SECONDS = 0.05
# How often a round in turns is tried: what failed once, late, need not cost all rounds before it.
_TRIES = 2
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
        stopped_by: In one line, what has ended it early; empty where nothing has.
        in_turns: Whether the combinations lived side by side in the timed rounds; else one run followed the other.
    """

    rows: list[Row]
    device_name: str | None
    device_memory: int | None
    stopped_by: str
    in_turns: bool


def measure(course: Course, progress: Progress = lambda *_: None) -> Measured:
    """Run the course. Ctrl-C ends it; the rounds that were done then are what it has found, if there is one.

    Raises:
        LaunchError: The ranks could not be started, or the temporary folder could not be used.
        KeyboardInterrupt: Before the end of the first round.
    """
    with tempfile.TemporaryDirectory(prefix="fabric_bench_", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with Runs(course.script, folder, course.accelerator, course.timeout_seconds) as runs:
            try:
                return _Measurement(course, runs, folder, progress).run()
            except OSError as error:
                raise LaunchError(
                    "The folder for what the runs leave cannot be used.", given=error, fix="TMPDIR=, a folder with room"
                ) from error


class _Measurement:
    def __init__(self, course: Course, runs: Runs, folder: Path, progress: Progress) -> None:
        self._course, self._runs, self._folder, self._progress = course, runs, folder, progress
        self._entries = [Entry(combination) for combination in course.combinations]
        self._entries.append(Entry(course.baseline, is_repeat=True))
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
        self._began = 0.0
        self._stopped_by = ""

    def run(self) -> Measured:
        self._began = time.monotonic()
        try:
            while not self._schedule.has_ended:
                self._whole_round()
        except (KeyboardInterrupt, LaunchError, OSError) as error:
            # The server may have died, the scratch folder may be gone or full: what is known already is not lost.
            if self._schedule.done == 0:
                raise
            self._stopped_by = str(error).partition("\n")[0] or "an interrupt"
        timed = self._schedule.done - self._schedule.trials
        for entry in self._entries:
            del entry.rounds[timed:]
        figures = [own for entry in self._entries for own in entry.first]
        device = figures[0] if figures else {"device_name": None, "device_memory": None}
        return Measured(
            self._rows(),
            device["device_name"],
            device["device_memory"],
            self._stopped_by,
            # Without any in turns there is the first round, in which one run followed the other.
            in_turns=self._takes_turns and timed > 0,
        )

    def _whole_round(self) -> None:
        """A round, and what is decided after it."""
        is_first = self._schedule.done == 0
        seconds = self._round(self._schedule.done)
        if seconds is None:
            self._stopped_by = "a round in turns that failed twice"
            self._schedule.end()
            return
        if is_first:
            self._first_round_seconds = seconds
            if self._course.check_steps:
                self._compare()
        self._schedule.end_round(self._passed(), seconds, self._rows)
        if all(entry.failure is not None for entry in self._entries):
            self._schedule.end()
        if is_first and not self._schedule.has_ended and self._can_take_turns():
            self._takes_turns = True
            self._begin_anew()

    def _passed(self) -> float:
        return time.monotonic() - self._began

    def _rows(self) -> list[Row]:
        return [row_of(entry, self._idle_seconds(entry.combination)) for entry in self._entries]

    def _idle_seconds(self, combination: Combination) -> float:
        """Of a step, what the script waits for on one device: it sleeps, reads, writes. 0 where that is not known."""
        single = dataclasses.replace(combination, devices=1)
        alike = [
            blocked_seconds(entry.rounds or [entry.first])
            for entry in self._entries
            if entry.first and dataclasses.replace(entry.combination, strategy=combination.strategy) == single
            if all(own["blocked"] is not None for own in entry.first)
        ]
        return min(alike, default=0.0)

    def _can_take_turns(self) -> bool:
        """Whether the jobs can live side by side, by what the first round has shown.

        That takes memory for all of them, which accelerators seldom have. A job that works on while it waits (the
        workers of a loader, an asynchronous save) would have that for nothing, and hold the others up.
        """
        figures = [own for entry in self._entries if entry.failure is None for own in entry.first]
        room = available_memory()
        has_room = room is not None and sum(own["resident"] for own in figures) < _SHARE_OF_MEMORY * room
        is_on_cpu = all(own["device_name"] is None and own["blocked"] is not None for own in figures)
        has_warmup = self._course.warmup + self._course.check_steps > 0  # a job's first turn comes after it
        works_beside = any(own["works_beside"] for own in figures)
        return has_warmup and has_room and is_on_cpu and not works_beside

    def _begin_anew(self) -> None:
        """Do not count the rounds so far, which went otherwise than those to come."""
        self._schedule.begin_anew()
        for entry in self._entries:
            entry.rounds.clear()

    def _round(self, number: int) -> float | None:
        """Seconds that it took; None where it failed and there are enough rounds before it."""
        for _ in range(_TRIES if self._takes_turns else 0):
            start = time.monotonic()
            outcomes = self._run_in_turns(number)
            if outcomes is not None:
                if self._take(outcomes):
                    return time.monotonic() - start
                break  # since it would compute while it waits the next time too
            if self._passed() > self._course.budget_seconds:
                break
        if self._takes_turns and self._schedule.done - self._schedule.trials >= PILOT_ROUNDS:
            return None
        if self._takes_turns:
            self._takes_turns = False
            self._begin_anew()
        start = time.monotonic()
        self._round_one_by_one(number)
        return time.monotonic() - start

    def _round_one_by_one(self, number: int) -> None:
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

    def _run_in_turns(self, number: int) -> dict[int, Outcome] | None:
        """What the entries that have not failed have come to, by their numbers; None where anything went wrong."""
        entries = {place: entry for place, entry in enumerate(self._entries) if entry.failure is None}
        self._report(f"round {number + 1}: all in turns")
        step_seconds = [self._step_seconds(entry.combination) for entry in entries.values()]
        outcomes = self._runs.run_in_turns(
            [entry.combination for entry in entries.values()],
            steps_of_turns=[math.ceil(_TURN_SECONDS / seconds) for seconds in step_seconds],
            warmup=self._course.warmup + self._course.check_steps,
            steps=self._course.steps,
            timeout_seconds=self._course.timeout_seconds + self._first_round_seconds,
        )
        return None if outcomes is None else dict(zip(entries, outcomes, strict=True))

    def _take(self, outcomes: Mapping[int, Outcome]) -> bool:
        """Keep the figures, unless a rank has computed while it waited."""
        figures = [own for outcome in outcomes.values() for own in outcome.figures]
        is_fair = not any(map(_works_while_waiting, figures))
        for place, outcome in outcomes.items():
            shutil.rmtree(outcome.folder)
            if is_fair:
                self._entries[place].rounds.append(outcome.figures)
        if is_fair:
            self._done += len(self._entries)
        return is_fair

    def _step_seconds(self, combination: Combination) -> float:
        """As far as is known now: the same for the baseline and its repeat, whose turns are to be equally long."""
        entries = [entry for entry in self._entries if entry.combination == combination and entry.failure is None]
        rounds = [figures for entry in entries for figures in entry.rounds or [entry.first]]
        return median(max(median(own["step_seconds"]) for own in figures) for figures in rounds)

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


def _works_while_waiting(own: dict[str, Any]) -> bool:
    """Whether a rank has had much of its work done while other jobs had their turns: by a thread of its own, say."""
    return bool(own["worked_while_waiting"] > _SHARE_OF_WORK * sum(own["step_seconds"]))


def _shortfall(outcome: Outcome, course: Course) -> str | None:
    """Why a run that has ended well is of no use, if so."""
    wanted = course.check_steps + course.warmup + course.steps
    done = min(figures["done"] for figures in outcome.figures)
    return None if done >= wanted else f"the script ended after {done} steps of the {wanted} that are needed"
