"""Where a step's time goes, by a clock that the test moves."""

from __future__ import annotations

import pytest

from fabric_lite.bench import stopwatch
from fabric_lite.bench.results import PHASES
from fabric_lite.bench.stopwatch import Stopwatch


class Clock:
    """Seconds that pass, and those of them in which the thread computes."""

    def __init__(self) -> None:
        self.now = self.used = 0.0

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.used += seconds

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(stopwatch, "thread_time", lambda: clock.used)
    return clock


def step(watch: Stopwatch, clock: Clock) -> None:
    clock.work(1.0)  # logging, say
    watch.timed("data", clock.wait)(2.0)
    clock.work(3.0)

    def backward() -> None:
        clock.work(4.0)
        clock.wait(1.5)

    watch.timed("backward", backward)()
    clock.work(0.25)

    def optimizer() -> None:
        clock.work(4.0)
        clock.wait(1.0)
        watch.timed("save", clock.work)(1.0)  # within another: the outer counts

    watch.timed("optimizer", optimizer)()
    watch.lap()


def test_phases_add_up_to_the_steps_and_what_comes_before_backward_is_forward(clock: Clock) -> None:
    watch = Stopwatch()
    step(watch, clock)
    assert watch.phases == {"data": 2.0, "forward": 3.0, "backward": 5.5, "optimizer": 6.0, "save": 0.0, "other": 1.25}
    assert sum(watch.phases.values()) == 17.75
    assert watch.steps == [17.75]
    assert set(watch.phases) == set(PHASES)
    assert watch.blocked == 1.5  # not the wait for data, nor what a step waits for
    clock.work(100.0)  # ours
    watch.resume()
    step(watch, clock)
    assert watch.steps == [17.75, 17.75]
    assert watch.phases["forward"] == 6.0
    assert watch.blocked == 3.0


def test_what_was_measured_before_a_restart_is_forgotten(clock: Clock) -> None:
    watch = Stopwatch()
    step(watch, clock)
    watch.restart()
    clock.work(2.0)
    watch.lap()
    assert watch.steps == [2.0]
    assert watch.phases == {**dict.fromkeys(PHASES, 0.0), "other": 2.0}
    assert watch.blocked == 0.0


def test_a_call_that_raises_has_taken_its_time(clock: Clock) -> None:
    watch = Stopwatch()

    def end() -> None:
        clock.wait(1.0)
        raise StopIteration

    with pytest.raises(StopIteration):
        watch.timed("data", end)()
    assert watch.phases["data"] == 1.0
