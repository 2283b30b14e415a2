"""The batch size with the most samples per second that fits, found by trying; all ranks have the same."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

from fabric_lite.bench.results import THE_SCRIPTS, Combination
from fabric_lite.bench.runs import Outcome, Runs
from fabric_lite.errors import FabricRuntimeError
from fabric_lite.launch.rank import ScriptCall
from fabric_lite.machine import available_memory

__all__ = ["Trial", "find_batch_size", "lines"]

_WARMUP, _STEPS = 2, 5
# Less than that of what is left is not asked for: a machine that swaps, or kills, takes others along.
_USABLE = 0.8
# Bisecting ends when the next size would be so close to one that is known.
_CLOSE = 1.1
_WORTH = 1.02
# One may be the noise of five steps.
_DOUBLINGS_WITHOUT_GAIN = 2


@dataclasses.dataclass(frozen=True)
class Trial:
    """One size that was tried.

    Args:
        batch_size: Per rank.
        failure: In one line, why it cannot be had; None if it can.
        samples_per_second: Over all ranks.
        memory: Bytes of the rank that needs most: of the accelerator's allocator, or resident on a CPU.
        was_stopped: Whether Ctrl-C has ended it, and the search.
    """

    batch_size: int
    failure: str | None
    samples_per_second: float | None = None
    memory: int | None = None
    was_stopped: bool = False


def find_batch_size(
    script: ScriptCall,
    combination: Combination,
    *,
    accelerator: str | None = None,
    budget_seconds: float = 300.0,
    timeout_seconds: float = 300.0,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Trial, list[Trial]]:
    """Try sizes from the script's own on, twice as large each time, then between the last that fits and the first not.

    A size is given up when a run fails with it, when memory would not suffice by what the sizes before took (on a CPU,
    where nothing else stops it), or when the data has no batch as large. The same size holds for all ranks, and is one
    that all ranks can have. The search ends early after two doublings in a row that bring less than 2 % each, and where
    its budget ends. Ctrl-C ends it with what was found so far, once there is a size that fits.

    Args:
        script: What is run.
        combination: In which way; its batch size is where to begin, None: the script's own.
        accelerator: As in ``Fabric(accelerator=)``.
        budget_seconds: No size is tried that would probably end later; the first always is.
        timeout_seconds: A run that takes longer has failed.
        progress: Called before each run with what runs now, and what became of the one before.

    Returns:
        The best, and all that were tried, by size. The best is the smallest that is within 2 % of the fastest.

    Raises:
        FabricRuntimeError: Not even the first size can be had.
        KeyboardInterrupt: Before the end of the first trial.
    """
    with (
        tempfile.TemporaryDirectory(prefix="fabric_bench_") as name,
        Runs(script, Path(name), accelerator, timeout_seconds) as runs,
    ):
        search = _Search(runs, combination, budget_seconds, progress)
        trials = sorted(search.trials(), key=lambda trial: trial.batch_size)
    fitting = [trial for trial in trials if trial.samples_per_second is not None]
    if not fitting:
        raise FabricRuntimeError(
            "The script does not run with the batch size to begin with.",
            given=trials[0].failure,
            fix="--batch-size with a smaller one, or see that the script runs by itself",
        )
    fastest = max(trial.samples_per_second or 0.0 for trial in fitting)
    return next(trial for trial in fitting if (trial.samples_per_second or 0.0) * _WORTH >= fastest), trials


def lines(best: Trial, trials: list[Trial]) -> list[str]:
    """The trials as lines of text, and what follows from them."""
    found = []
    for trial in trials:
        if trial.failure is not None:
            found.append(f"{trial.batch_size:>9}  {trial.failure}")
        else:
            memory = f"{(trial.memory or 0) / 2**20:,.0f} MiB"
            found.append(f"{trial.batch_size:>9}  {trial.samples_per_second:>12,.1f} samples/s  {memory:>12}")
    largest = max(trial.batch_size for trial in trials if trial.failure is None)
    return [
        "batch size per rank, samples/s over all ranks, memory of a rank",
        *found,
        f"Best: {best.batch_size}, the smallest within 2 % of the fastest. Largest that was seen to fit: {largest}.",
    ]


class _Search:
    def __init__(
        self, runs: Runs, combination: Combination, budget_seconds: float, progress: Callable[[str], None]
    ) -> None:
        self._runs, self._combination, self._progress = runs, combination, progress
        self._budget, self._began = budget_seconds, time.monotonic()
        self._fitting: list[Trial] = []  # from the smallest on
        self._last: Trial | None = None
        self._seconds = 0.0  # that the largest of those that fit took
        self._has_ended = False  # early
        room = available_memory()
        self._room = None if room is None else _USABLE * room

    def trials(self) -> Iterator[Trial]:
        first = self._trial(self._combination.batch_size)
        yield first
        size, too_large = first.batch_size, None
        while first.failure is None and too_large is None:
            trial = self._trial_of_double(2 * size)
            yield trial
            size, too_large = (size, trial.batch_size) if trial.failure else (trial.batch_size, None)
        while not self._has_ended and too_large is not None and too_large / size > _CLOSE and too_large - size > 1:
            trial = self._trial((size + too_large) // 2)
            yield trial
            size, too_large = (size, trial.batch_size) if trial.failure else (trial.batch_size, too_large)

    def _trial_of_double(self, batch_size: int) -> Trial:
        if _is_flat([trial.samples_per_second or 0.0 for trial in self._fitting]):
            self._has_ended = True
            gains = f"the last {_DOUBLINGS_WITHOUT_GAIN} doublings brought less than {100 * (_WORTH - 1):.0f} % each"
            return Trial(batch_size, f"not tried: {gains}")
        return self._trial(batch_size)

    def _trial(self, batch_size: int | None) -> Trial:
        if batch_size is not None and self._would_not_fit(batch_size):
            return Trial(batch_size, "not tried: by what smaller ones take, the machine has no memory for it")
        if batch_size is not None and self._would_be_late(batch_size):
            self._has_ended = True
            return Trial(batch_size, f"not tried: it would probably end after the budget of {self._budget:g} s")
        try:
            self._last = self._run(batch_size)
        except KeyboardInterrupt:
            if not self._fitting:
                raise
            self._has_ended = True
            return Trial(batch_size or 0, "stopped before its end", was_stopped=True)
        return self._last

    def _run(self, batch_size: int | None) -> Trial:
        self._progress(_announced(self._combination, batch_size, self._last))
        combination = dataclasses.replace(self._combination, batch_size=batch_size)
        start = time.monotonic()
        outcome = self._runs.run(combination, warmup=_WARMUP, steps=_STEPS)
        trial = _trial_of(outcome, batch_size)
        if trial.failure is None:
            self._fitting.append(trial)
            self._seconds = time.monotonic() - start
        return trial

    def _would_be_late(self, batch_size: int) -> bool:
        """Whether the budget would be over, if a size took as much longer as it is larger."""
        if not self._fitting:
            return False
        expected = self._seconds * batch_size / self._fitting[-1].batch_size
        return time.monotonic() - self._began + expected > self._budget

    def _would_not_fit(self, batch_size: int) -> bool:
        """Whether a straight line through the last two sizes says so; only for the machine's own memory."""
        if self._room is None or len(self._fitting) < 2:
            return False
        before, last = self._fitting[-2:]
        slope = ((last.memory or 0) - (before.memory or 0)) / (last.batch_size - before.batch_size)
        needed = (last.memory or 0) + max(slope, 0.0) * (batch_size - last.batch_size)
        return needed * self._combination.devices > self._room


def _trial_of(outcome: Outcome, batch_size: int | None) -> Trial:
    if outcome.failure is not None:
        return Trial(batch_size or 0, outcome.failure)
    figures = outcome.figures
    if any(len(own["step_seconds"]) < _STEPS for own in figures):
        return Trial(batch_size or 0, f"the data has no {_WARMUP + _STEPS} batches of this size")
    shares = {own["data_rank"]: own["samples"] for own in figures}
    samples = sum(shares.values())
    each = round(samples / len(shares))
    if batch_size is not None and each < batch_size:
        return Trial(batch_size, "the data has no full batches of this size")
    seconds = median(max(steps) for steps in zip(*(own["step_seconds"] for own in figures), strict=True))
    memory = max(own["device_reserved"] or own["resident"] for own in figures)
    return Trial(batch_size or each, None, samples / seconds, memory)


def _is_flat(speeds: Sequence[float]) -> bool:
    """Whether none of the last doublings was worth it, each held against the fastest before it."""
    if len(speeds) <= _DOUBLINGS_WITHOUT_GAIN:
        return False
    places = range(len(speeds) - _DOUBLINGS_WITHOUT_GAIN, len(speeds))
    return all(speeds[place] < _WORTH * max(speeds[:place]) for place in places)


def _announced(combination: Combination, batch_size: int | None, last: Trial | None) -> str:
    size = "the script's own batch size" if batch_size is None else f"batch size {batch_size}"
    if last is None:
        return f"{size}, {_in_words(combination)}"
    return f"{size}; {last.batch_size}: {last.failure or f'{last.samples_per_second:,.1f} samples/s'}"


def _in_words(combination: Combination) -> str:
    """Its name is a riddle where the script chooses: "script, script, 1 device"."""
    kinds = {"strategy": combination.strategy, "precision": combination.precision}
    own = [kind for kind, value in kinds.items() if value == THE_SCRIPTS]
    parts = [value for value in kinds.values() if value != THE_SCRIPTS]
    if own:
        parts.append(f"the script's own {' and '.join(own)}")
    return ", ".join([*parts, f"{combination.devices} device{'s' * (combination.devices > 1)}"])
