"""How many rounds a benchmark has: as many as asked for, or as the noise asks for, within its budget."""

from __future__ import annotations

import pytest

from fabric_lite.bench import schedule
from fabric_lite.bench.schedule import Schedule
from fabric_lite.bench.statistics import PILOT_ROUNDS


def rounds_of(plan: Schedule, seconds: float = 1.0, anew_after: int | None = None) -> int:
    """How many there are if each takes so long; after so many it begins anew."""
    passed = 0.0
    while not plan.has_ended:
        passed += seconds
        plan.end_round(passed, seconds, list)
        if plan.done == anew_after:
            plan.begin_anew()
    return plan.done


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the noise asks for, one answer after the other."""
    answers: list[int] = []

    iterator = iter(answers)
    monkeypatch.setattr(schedule, "rounds_needed", lambda *_: next(iterator))
    return answers


def test_there_are_as_many_rounds_as_asked_for() -> None:
    assert rounds_of(Schedule(3, 100.0, "baseline")) == 3


def test_no_round_begins_that_would_end_after_the_budget() -> None:
    assert rounds_of(Schedule(30, 7.5, "baseline")) == 7
    assert rounds_of(Schedule(30, 0.0, "baseline")) == 1


def test_rounds_before_it_began_anew_do_not_count() -> None:
    plan = Schedule(3, 100.0, "baseline")
    assert rounds_of(plan, anew_after=2) == 5
    assert plan.trials == 2


def test_it_is_asked_again_as_long_as_it_takes_more_but_four_times_at_most(wanted: list[int]) -> None:
    wanted += [8, 12, 14, 16, 99]
    assert rounds_of(Schedule(None, 100.0, "baseline")) == 16


def test_it_is_not_asked_again_once_there_are_enough(wanted: list[int]) -> None:
    wanted += [8, 12, 12]
    assert rounds_of(Schedule(None, 100.0, "baseline")) == 12


def test_fewer_than_were_done_are_not_taken_back(wanted: list[int]) -> None:
    wanted += [8, 6]
    assert rounds_of(Schedule(None, 100.0, "baseline")) == 8


def test_it_can_be_asked_once_only(wanted: list[int]) -> None:
    wanted += [8]
    assert rounds_of(Schedule(None, 100.0, "baseline", looks=1)) == 8


def test_what_is_asked_for_counts_from_where_it_began_anew_and_ends_with_the_budget(wanted: list[int]) -> None:
    wanted += [8, 8]
    assert rounds_of(Schedule(None, 100.0, "baseline"), anew_after=1) == 9
    wanted += [8]
    assert rounds_of(Schedule(None, PILOT_ROUNDS + 3.0, "baseline"), anew_after=1) == PILOT_ROUNDS + 3


def test_it_is_asked_from_the_start_again_after_it_began_anew(wanted: list[int]) -> None:
    wanted += [10, 7, 9, 9]
    assert rounds_of(Schedule(None, 100.0, "baseline"), anew_after=6) == 6 + 9
