"""Where the time of steps goes: seconds by phase, without a hook on any module."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter, thread_time
from typing import Any

from fabric_lite.bench.results import PHASES

__all__ = ["Stopwatch"]


class Stopwatch:
    """Marks in the loop, from which all times follow.

    Waiting for data, backward, stepping, clipping and saving are calls that begin and end. What passes before a
    backward is forward, with the loss; what passes before any other call is the rest of the loop. Of one call within
    another only the outer counts.

    Sums and numbers alone are kept: an object for each step would keep the garbage collector busy.
    """

    def __init__(self) -> None:
        self._is_inside = False
        self.restart()

    def restart(self) -> None:
        """Forget what was measured; a step begins."""
        self.steps: list[float] = []  # seconds of each
        self.phases = dict.fromkeys(PHASES, 0.0)  # seconds over all steps; they add up to those of the steps
        # Of forward and backward, seconds in which the loop's thread computed nothing.
        self.blocked = 0.0
        self.resume()

    def resume(self) -> None:
        """Let the step go on from here: what has passed since the last mark is nobody's."""
        self._began = self._last = perf_counter()
        self._used = thread_time()

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose calls are that phase."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return function(*args, **kwargs)
            self.enter(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave(phase)

        return timed

    def enter(self, phase: str) -> None:
        """A call begins."""
        self._is_inside = True
        self._mark("forward" if phase == "backward" else "other")

    def leave(self, phase: str) -> None:
        """It ends."""
        self._is_inside = False
        self._mark(phase)

    def lap(self) -> None:
        """A step ends, and the next one begins with :meth:`resume`."""
        now = perf_counter()
        self.phases["other"] += now - self._last
        self.steps.append(now - self._began)

    def _mark(self, phase: str) -> None:
        now = perf_counter()
        passed = now - self._last
        self._last = now
        self.phases[phase] += passed
        # A call of the system, hence only where it tells something: between data and the end of backward.
        if phase in ("data", "forward", "backward"):
            used = thread_time()
            if phase != "data":
                self.blocked += max(passed - (used - self._used), 0.0)
            self._used = used
