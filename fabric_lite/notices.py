"""What is said to the user: one line, once, on rank 0; of a rank that waits for the others, by that rank."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from fabric_lite.call_site import user_line
from fabric_lite.collectives import is_distributed, rank

__all__ = ["rank_zero_info", "rank_zero_only", "rank_zero_warn", "says_that_it_waits"]

WAIT_SECONDS = 30.0

Function = TypeVar("Function", bound=Callable[..., Any])

_said: set[str] = set()


def rank_zero_only(function: Function) -> Function:
    """Let ``function`` run on rank 0 only; on every other rank it returns None."""

    @functools.wraps(function)
    def on_rank_zero(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if rank() == 0 else None

    return on_rank_zero  # type: ignore[return-value]


def rank_zero_info(message: str) -> None:
    """Write ``message`` to standard error on rank 0, the same text once per process."""
    if rank() == 0 and message not in _said:
        _said.add(message)
        print(f"fabric_lite: {message}", file=sys.stderr, flush=True)


@rank_zero_only
def rank_zero_warn(message: str, category: type[Warning] = UserWarning, stacklevel: int = 3) -> None:
    """``warnings.warn`` on rank 0 only."""
    warnings.warn(message, category, stacklevel=stacklevel + 1)


@contextlib.contextmanager
def says_that_it_waits(call: str, seconds: float | None = None) -> Iterator[None]:
    """Let a rank say on standard error that it waits, if the block has not ended after ``seconds``.

    A collective that not all ranks call hangs without a word. In a process alone nothing is said.

    Args:
        call: What every rank must call, as the user writes it.
        seconds: How long to be silent; None is ``WAIT_SECONDS``.
    """
    if not is_distributed():
        yield
        return
    line = f"fabric_lite: rank {rank()} waits in {call} at {user_line() or 'an unknown line'}; every rank must call it"
    wait = _waits.begin(line, WAIT_SECONDS if seconds is None else seconds)
    try:
        yield
    finally:
        _waits.end(wait)


class _Waits:
    """Says what takes too long, of any number of waits in one thread, since to start one for each takes a while.

    The thread ends when nothing waits as it wakes. It is a daemon: a script that is stopped meanwhile ends at once.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waits: dict[int, tuple[float, str]] = {}  # when to say what
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._wakes_at = 0.0

    def begin(self, line: str, seconds: float) -> int:
        """Have ``line`` written after so many seconds, unless the wait whose number is returned has ended."""
        with self._changed:
            number, due = next(self._numbers), time.monotonic() + seconds
            self._waits[number] = due, line
            if self._thread is None or not self._thread.is_alive():  # a forked child has none
                self._wakes_at = due
                self._thread = threading.Thread(target=self._run, name="fabric_lite waits", daemon=True)
                self._thread.start()
            elif due < self._wakes_at:
                self._changed.notify()
        return number

    def end(self, number: int) -> None:
        with self._changed:
            self._waits.pop(number, None)

    def _run(self) -> None:
        with self._changed:
            while self._waits:
                self._wakes_at = min(due for due, _ in self._waits.values())
                self._changed.wait(max(self._wakes_at - time.monotonic(), 0.0))
                now = time.monotonic()
                for number, (due, line) in list(self._waits.items()):
                    if due <= now:
                        del self._waits[number]
                        print(line, file=sys.stderr, flush=True)
            self._thread = None


_waits = _Waits()
