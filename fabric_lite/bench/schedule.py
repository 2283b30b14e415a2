"""How many rounds a benchmark has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fabric_lite.bench.results import Row
from fabric_lite.bench.statistics import DEFAULT_ROUNDS, PILOT_ROUNDS, rounds_needed

__all__ = ["LOOKS", "Schedule"]

# How often it is asked how many rounds it takes, at most: after the pilot, and then after as many as the answer before
# said, until it says no more. benchmarks/trust.py shows what each of these questions finds.
LOOKS = 4


class Schedule:
    """Counts rounds, as many as were asked for or as it takes to see differences of 5 %, within a budget.

    Args:
        rounds: That are timed, at most; None: as many as it takes.
        budget_seconds: No round begins that would probably end later; the first always does.
        baseline: The name of the combination that the others are compared with.
        looks: How often it is asked how many it takes, at most.
    """

    def __init__(self, rounds: int | None, budget_seconds: float, baseline: str, looks: int = LOOKS) -> None:
        self._is_open, self._budget, self._baseline = rounds is None, budget_seconds, baseline
        self._looks, self._looks_left, self._next_look = looks, looks, PILOT_ROUNDS
        self.total = DEFAULT_ROUNDS if rounds is None else rounds  # as far as that is known
        self.done = 0
        self.trials = 0  # of the rounds that are done, those that are not timed

    @property
    def has_ended(self) -> bool:
        """Whether no round is left."""
        return self.done >= self.total

    def begin_anew(self) -> None:
        """Count from here on: the rounds so far went otherwise than those to come, and are not timed."""
        self.total += self.done - self.trials
        self.trials = self.done
        self._looks_left, self._next_look = self._looks, PILOT_ROUNDS + self.done

    def end(self) -> None:
        """Let no other round begin."""
        self.total = self.done

    def end_round(self, passed: float, seconds: float, rows: Callable[[], Sequence[Row]]) -> None:
        """A round has ended.

        Args:
            passed: Seconds since the benchmark began.
            seconds: That the round took; the next one will take as long.
            rows: Gives what was found in the timed rounds so far.
        """
        self.done += 1
        if passed + seconds > self._budget:
            self.end()
        elif self._is_open and self._looks_left and self.done == self._next_look:
            wanted = self.trials + rounds_needed(rows(), self._baseline)
            affordable = self.done + int((self._budget - passed) / seconds)
            self.total = max(self.done, min(wanted, affordable))
            self._looks_left, self._next_look = self._looks_left - 1, self.total
