"""What is said to the user: one line, once, on rank 0; of a rank that waits for the others, by that rank."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
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
    timer = threading.Timer(
        WAIT_SECONDS if seconds is None else seconds, lambda: print(line, file=sys.stderr, flush=True)
    )
    timer.daemon = True  # a script that is stopped meanwhile ends at once
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
