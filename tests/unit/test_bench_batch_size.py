"""The search for a batch size, on a script whose speed and time are made up; the ranks are in tests/distributed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fabric_lite.bench import batch_size
from fabric_lite.bench.batch_size import Trial, find_batch_size, lines
from fabric_lite.bench.cli import main
from fabric_lite.bench.results import THE_SCRIPTS, Combination
from fabric_lite.bench.runs import Outcome
from fabric_lite.errors import FabricRuntimeError
from fabric_lite.launch.rank import ScriptCall

SCRIPT = ScriptCall("train.py", False, ())
OWN = Combination(THE_SCRIPTS, THE_SCRIPTS, 1)
OWN_SIZE, MIB = 32, 2**20
# Samples per second by batch size; what is not there has no room.
RISING = {32: 100.0, 64: 190.0, 128: 350.0, 256: 600.0, 512: 900.0}

Play = Callable[..., list[int]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Let every run have the given speed and take a second for each 32 samples; gives the list of sizes that run."""

    def play(speeds: Mapping[int, float], before_run: Callable[[int], None] = lambda _: None) -> list[int]:
        tried: list[int] = []
        seconds = 0.0

        class Runs:
            def __init__(self, *_: Any) -> None: ...

            def __enter__(self) -> Runs:
                return self

            def __exit__(self, *_: object) -> None: ...

            def run(self, combination: Combination, *, warmup: int, steps: int) -> Outcome:
                nonlocal seconds
                size = combination.batch_size or OWN_SIZE
                before_run(size)
                tried.append(size)
                seconds += size / OWN_SIZE
                if size not in speeds:
                    return Outcome(Path(), "RuntimeError: out of memory", [])
                step_seconds = [size / speeds[size]] * steps
                figures = {"data_rank": 0, "samples": size, "step_seconds": step_seconds}
                return Outcome(Path(), None, [figures | {"device_reserved": None, "resident": MIB}])

        monkeypatch.setattr(batch_size, "Runs", Runs)
        monkeypatch.setattr(batch_size, "time", SimpleNamespace(monotonic=lambda: seconds))
        return tried

    return play


def stop_at(size: int, number: signal.Signals = signal.SIGINT) -> Callable[[int], None]:
    def before_run(now: int) -> None:
        if now == size:
            if number == signal.SIGINT:
                raise KeyboardInterrupt  # workers of pytest-xdist may ignore the signal
            signal.raise_signal(number)

    return before_run


def test_sizes_are_doubled_until_one_fails_and_then_halved_in_between(play: Play) -> None:
    tried = play({size: float(size) for size in range(200)})
    best, trials = find_batch_size(SCRIPT, OWN)
    assert tried == [32, 64, 128, 256, 192, 224, 208]
    assert [trial.batch_size for trial in trials] == sorted(tried)
    assert best == Trial(192, None, pytest.approx(192.0), MIB)


def test_two_doublings_in_a_row_that_bring_nothing_end_the_search(play: Play) -> None:
    tried = play({32: 100.0, 64: 150.0, 128: 151.0, 256: 149.0, 512: 900.0})
    best, trials = find_batch_size(SCRIPT, OWN)
    assert tried == [32, 64, 128, 256]
    assert trials[-1] == Trial(512, "not tried: the last 2 doublings brought less than 2 % each")
    assert best.batch_size == 64


def test_one_doubling_that_brings_nothing_may_be_noise(play: Play) -> None:
    tried = play({32: 100.0, 64: 90.0, 128: 180.0, 256: 181.0, 512: 400.0})
    best, _ = find_batch_size(SCRIPT, OWN)
    assert tried[:6] == [32, 64, 128, 256, 512, 1024]
    assert best.batch_size == 512


@pytest.mark.parametrize(
    ("budget_seconds", "expected"),
    # They take 1, 2, 4, 8 and 16 seconds.
    [(0.0, [32]), (2.9, [32]), (3.0, [32, 64]), (14.0, [32, 64, 128]), (15.0, [32, 64, 128, 256])],
)
def test_no_size_is_tried_that_would_probably_end_after_the_budget_but_the_first_always_is(
    play: Play, budget_seconds: float, expected: list[int]
) -> None:
    tried = play(RISING)
    best, trials = find_batch_size(SCRIPT, OWN, budget_seconds=budget_seconds)
    assert tried == expected
    reason = f"not tried: it would probably end after the budget of {budget_seconds:g} s"
    assert trials[-1] == Trial(2 * expected[-1], reason)
    assert best.batch_size == expected[-1]


def test_the_budget_holds_for_sizes_in_between_too(play: Play) -> None:
    # Up to 128 they take 7 s, 256 takes 8 s more, 192 would take 6 s.
    tried = play({32: 100.0, 64: 190.0, 128: 350.0, 192: 500.0})
    _, trials = find_batch_size(SCRIPT, OWN, budget_seconds=20.0)
    assert tried == [32, 64, 128, 256]
    assert [trial.failure for trial in trials[3:]] == [
        "not tried: it would probably end after the budget of 20 s",
        "RuntimeError: out of memory",
    ]


@pytest.mark.parametrize("size", [64, 256])
def test_ctrl_c_leaves_the_best_of_what_was_tried(play: Play, size: int) -> None:
    tried = play(RISING, stop_at(size))
    best, trials = find_batch_size(SCRIPT, OWN)
    assert best.batch_size == tried[-1] == size // 2
    assert trials[-1] == Trial(size, "stopped before its end", was_stopped=True)
    assert lines(best, trials)[-2].split() == [str(size), "stopped", "before", "its", "end"]


def test_ctrl_c_in_the_first_trial_leaves_nothing(play: Play) -> None:
    play(RISING, stop_at(OWN_SIZE))
    with pytest.raises(KeyboardInterrupt):
        find_batch_size(SCRIPT, OWN)


def test_progress_says_what_runs_and_what_became_of_the_one_before(play: Play) -> None:
    play({32: 1000.0, 40: 1100.0, 48: 1500.0})
    said: list[str] = []
    find_batch_size(SCRIPT, OWN, progress=said.append)
    assert said[:4] == [
        "the script's own batch size, the script's own strategy and precision, 1 device",
        "batch size 64; 32: 1,000.0 samples/s",
        "batch size 48; 64: RuntimeError: out of memory",
        "batch size 56; 48: 1,500.0 samples/s",
    ]


@pytest.mark.parametrize(
    ("combination", "words"),
    [
        (Combination("ddp", "32-true", 2, 8), "batch size 8, ddp, 32-true, 2 devices"),
        (Combination("ddp", THE_SCRIPTS, 2, 8), "batch size 8, ddp, the script's own precision, 2 devices"),
        (Combination(THE_SCRIPTS, "32-true", 1, 8), "batch size 8, 32-true, the script's own strategy, 1 device"),
    ],
)
def test_the_combination_is_said_in_words(play: Play, combination: Combination, words: str) -> None:
    play({8: 1.0})
    said: list[str] = []
    find_batch_size(SCRIPT, combination, progress=said.append)
    assert said[0] == words


def test_a_first_size_that_cannot_be_had_is_an_error(play: Play) -> None:
    play({})
    with pytest.raises(FabricRuntimeError, match="does not run with the batch size to begin with"):
        find_batch_size(SCRIPT, OWN)


def test_the_command_keeps_to_its_budget(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    tried = play(RISING)
    assert main(["--find-batch-size", "--budget", "3", __file__]) == 0
    assert tried == [32, 64]
    assert "128  not tried: it would probably end after the budget of 3 s" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_shows_what_it_has_found_when_it_is_stopped(
    play: Play, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    play(RISING, stop_at(128, number))
    assert main(["--find-batch-size", __file__]) == 130
    printed = capsys.readouterr()
    assert "128  stopped before its end" in printed.out
    assert "Best: 64, the smallest within 2 % of the fastest." in printed.out
    assert "stopped early; these are the sizes that were tried." in printed.err
    play(RISING, stop_at(OWN_SIZE, number))
    assert main(["--find-batch-size", __file__]) == 130
    assert "stopped before the end of the first trial." in capsys.readouterr().err
