"""Jobs that live side by side and take turns of a few steps: what the machine does for a second, it does to all.

A shared machine changes its speed for seconds at a time. Two runs one after the other then differ by 10 or 20 %,
however long each of them is; side by side, in turns of 50 ms or a step, by 2 to 5 %. The latter is what
benchmarks/trust.py shows; the former was seen before there were turns.
"""

from __future__ import annotations

import math
import os
import random
import select
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["Gate", "Turns"]

_NUMBER_BYTES = 8
_REPORTS = "reports"
# Threads of OpenMP wait so long for more work before they sleep, at most; and what it takes to fall asleep and wake up.
_SPIN_SECONDS = 0.03
_WAKING_SECONDS = 0.001


def _gate_file(folder: Path, rank: int) -> Path:
    return folder / f"gate_{rank}"


class Gate:
    """A rank's end: it waits here until its job's turn has come.

    Args:
        folder: Of the job.
        rank: Which one of it.
        spins: Whether the rank computes in several threads, which spin for some milliseconds after their last work.
    """

    def __init__(self, folder: Path, rank: int, *, spins: bool = False) -> None:
        self._forgiven = _SPIN_SECONDS if spins else 0.0
        # The other end has both open, so neither call waits.
        self._reports = os.open(folder / _REPORTS, os.O_WRONLY)
        self._gate = os.open(_gate_file(folder, rank), os.O_RDONLY)
        self._until = 0
        self.worked_seconds = 0.0  # that processors were at work for this process while it waited

    def wait(self, done: int) -> None:
        """After so many steps; returns at once within a turn."""
        if done >= self._until:
            os.write(self._reports, b".")
            select.select([self._gate], [], [], self._forgiven)
            start = time.process_time()
            self._until = int.from_bytes(os.read(self._gate, _NUMBER_BYTES), "little")
            self.worked_seconds += max(time.process_time() - start - _WAKING_SECONDS, 0.0)


class Turns:
    """The other end: hands out turns until all jobs have made their steps, and lets them end together.

    They start and make their first step at once, since that is not timed. The first turn of each begins with the rest
    of the warm-up, which finds what the job before has left in the caches.

    Args:
        folders: Of the jobs.
        ranks: How many ranks each job has.
        first: The step after which those begin that are timed.
        last: The step after which they wait for the end.
        steps: Of a turn of each job.
        seed: Of the order.
    """

    def __init__(
        self, folders: Sequence[Path], ranks: Sequence[int], *, first: int, last: int, steps: Sequence[int], seed: int
    ) -> None:
        self._first, self._last, self._steps = first, last, steps
        self._seed = seed
        self._gates: list[list[int]] = []
        # One for all: only those that have the turn report.
        reports = folders[0] / _REPORTS
        os.mkfifo(reports)
        self.reports = os.open(reports, os.O_RDWR)
        for folder, count in zip(folders, ranks, strict=True):
            if folder is not folders[0]:
                os.symlink(reports, folder / _REPORTS)
            for rank in range(count):
                os.mkfifo(_gate_file(folder, rank))
            self._gates.append([os.open(_gate_file(folder, rank), os.O_RDWR) for rank in range(count)])
        self._missing = sum(ranks)
        self._schedule = self._turns()
        self.have_ended = False  # whether all jobs have made their steps

    def read(self) -> None:
        """Take in that ranks wait; hand on the turn once all of its job do."""
        self._missing -= len(os.read(self.reports, 1 << 12))
        if self._missing == 0:
            job, until = next(self._schedule, (None, 0))
            if job is None:
                self.have_ended = True
                for each in range(len(self._gates)):
                    self._release(each, self._last + 1)
            else:
                self._missing = len(self._gates[job])
                self._release(job, until)

    def close(self) -> None:
        """Close all ends."""
        for end in [self.reports, *(gate for gates in self._gates for gate in gates)]:
            os.close(end)

    def _turns(self) -> Iterator[tuple[int, int]]:
        """The job, and the step up to which it goes.

        Those with fewer turns have them spread evenly. The order is drawn anew each time,
        since a job feels which one was before it (caches, a processor that is hot).
        """
        draw = random.Random(self._seed)
        counts = [math.ceil((self._last - self._first) / steps) for steps in self._steps]
        most = max(counts)
        made = [0] * len(counts)
        for number in range(1, most + 1):
            due = [job for job, count in enumerate(counts) if (number * count + most // 2) // most > made[job]]
            for job in draw.sample(due, len(due)):
                made[job] += 1
                yield job, min(self._first + made[job] * self._steps[job], self._last)

    def _release(self, job: int, until: int) -> None:
        for gate in self._gates[job]:
            os.write(gate, until.to_bytes(_NUMBER_BYTES, "little"))
