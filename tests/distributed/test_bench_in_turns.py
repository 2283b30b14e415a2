"""Combinations live side by side where they can; else, and wherever that fails, one run follows the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fabric_lite import bench
from fabric_lite.bench import Results, measuring
from fabric_lite.bench.statistics import PILOT_ROUNDS
from fabric_lite.errors import LaunchError

ODD_SCRIPT = str(Path(__file__).with_name("bench_odd_script.py"))
ROUNDS, STEPS = 2, 6

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def benchmark(what: str, said: list[str], **options: Any) -> Results:
    """On one device: the baseline and its repeat. ``said`` gets what its progress says."""
    given: dict[str, Any] = {"rounds": ROUNDS, "steps": STEPS, "check_steps": 0}
    return bench.run(
        ODD_SCRIPT,
        what,
        devices=[1],
        strategies=["ddp"],
        precisions=["32-true"],
        progress=options.pop("progress", lambda *now: said.append(now[-1])),
        **(given | options),
    )


@pytest.mark.parametrize(
    ("what", "in_turns", "rounds_in_turns"),
    [
        ("nothing", True, ROUNDS),
        ("leaves once", True, ROUNDS + 1),  # the first one again
        pytest.param("leaves twice", False, 2, marks=pytest.mark.full),
        ("computes beside", False, 1),
        ("waits for saves", False, 0),
        pytest.param("no room", False, 0, marks=pytest.mark.full),
    ],
)
def test_combinations_take_turns_where_nothing_forbids_it(
    what: str, in_turns: bool, rounds_in_turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "no room":
        monkeypatch.setattr(measuring, "available_memory", lambda: 1 << 20)
    # A thread that works beside may get no processor within few steps, on a machine that others use too.
    count = 200 if what == "computes beside" else STEPS
    said: list[str] = []
    results = benchmark(what, said, steps=count)
    assert [row.failure for row in results.rows] == [None, None]
    assert [[len(steps) for steps in row.step_seconds] for row in results.rows] == [[count] * ROUNDS] * 2
    assert results.in_turns == in_turns
    assert sum("in turns" in words for words in said) == rounds_in_turns


@pytest.mark.full
def test_a_round_in_turns_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_turns = measuring.Runs.run_in_turns

    def at_once_late(self: measuring.Runs, *args: Any, **options: Any) -> Any:
        return run_in_turns(self, *args, **(options | {"timeout_seconds": 0.01}))

    monkeypatch.setattr(measuring.Runs, "run_in_turns", at_once_late)
    results = benchmark("nothing", [])
    assert not results.in_turns
    assert [[len(steps) for steps in row.step_seconds] for row in results.rows] == [[STEPS] * ROUNDS] * 2


@pytest.mark.full
@pytest.mark.parametrize(("good", "in_turns"), [(PILOT_ROUNDS, True), (PILOT_ROUNDS - 1, False)])
def test_rounds_in_turns_are_kept_if_there_are_enough_when_a_later_one_fails(
    good: int, in_turns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_turns = measuring.Runs.run_in_turns
    made: list[None] = []

    def failing_after_some(self: measuring.Runs, *args: Any, **options: Any) -> Any:
        made.append(None)
        return run_in_turns(self, *args, **options) if len(made) <= good else None

    monkeypatch.setattr(measuring.Runs, "run_in_turns", failing_after_some)
    results = benchmark("nothing", [], rounds=PILOT_ROUNDS + 1)
    assert len(made) == good + 2
    assert (results.in_turns, results.is_complete) == (in_turns, not in_turns)
    assert ("failed twice" in results.stopped_by) == in_turns
    rounds = good if in_turns else PILOT_ROUNDS + 1
    assert [[len(steps) for steps in row.step_seconds] for row in results.rows] == [[STEPS] * rounds] * 2


@pytest.mark.parametrize(
    "rounds_done", [pytest.param(1, marks=pytest.mark.full), 2, pytest.param(3, marks=pytest.mark.full)]
)
def test_an_interrupt_leaves_what_whole_rounds_have_found(rounds_done: int) -> None:
    def interrupt(*now: Any) -> None:
        if now[-1].startswith(f"round {rounds_done + 1}"):
            raise KeyboardInterrupt

    results = benchmark("nothing", [], progress=interrupt, rounds=4)
    assert not results.is_complete
    assert results.in_turns == (rounds_done > 1)
    # After the first round, which is only timed where no other follows, there are those in turns.
    assert [[len(steps) for steps in row.step_seconds] for row in results.rows] == [
        [STEPS] * max(1, rounds_done - 1)
    ] * 2


def test_an_interrupt_in_the_first_round_leaves_nothing() -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        benchmark("nothing", [], progress=interrupt)


@pytest.mark.parametrize("error", [LaunchError("The server has died."), OSError("no such folder")])
def test_what_whole_rounds_have_found_is_not_lost_with_the_server_or_the_folder(error: Exception) -> None:
    def fail_in(number: int) -> Any:
        def progress(*now: Any) -> None:
            if now[-1].startswith(f"round {number}"):
                raise error

        return progress

    results = benchmark("nothing", [], progress=fail_in(2))
    assert (results.is_complete, results.stopped_by) == (False, str(error))
    assert [len(row.step_seconds) for row in results.rows] == [1, 1]
    with pytest.raises(LaunchError):
        benchmark("nothing", [], progress=fail_in(1))
