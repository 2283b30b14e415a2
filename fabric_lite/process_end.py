"""What a process owes at its end: work beside its script that has to be waited for, and an exit code that tells.

It imports no torch, because ``fabric-run`` asks here for ranks that may have loaded none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

__all__ = ["be_quick", "exit_with_failure", "finish", "is_pending", "is_quick", "owe"]

_owed: list[tuple[Callable[[], bool], Callable[[], BaseException | None]]] = []
_is_quick = False


def owe(is_pending: Callable[[], bool], finish: Callable[[], BaseException | None]) -> None:
    """Let the end of this process's script wait; once for each kind of work.

    Args:
        is_pending: Whether there is work that has not ended.
        finish: Waits until it has, and returns what went wrong, if nobody was told yet.
    """
    _owed.append((is_pending, finish))


def is_pending() -> bool:
    """Whether work is under way beside the script."""
    return any(pending() for pending, _ in _owed)


def finish() -> None:
    """Wait for it, and raise what went wrong, if nobody was told yet."""
    for _, wait in _owed:
        error = wait()
        if error is not None:
            raise error


def be_quick() -> None:
    """Let a rank that exits with code 0 end without taking Python and torch apart, which takes 0.4 s.

    Its exit handlers still run. Open files that the script has not flushed may lack their end.
    """
    global _is_quick
    _is_quick = True


def is_quick() -> bool:
    """Whether :func:`be_quick` was called."""
    return _is_quick


def exit_with_failure() -> None:
    """Let this process end with code 1, as one that ends by an exception; for exit handlers, which cannot raise.

    All of Python's own end comes before: the other exit handlers, flushed streams, finalizers. After it only C's
    streams are flushed; what C++ libraries do when a process ends is left out. Another code that the script has chosen
    is lost; a process that Ctrl-C ends still ends by it.
    """
    c = ctypes.CDLL(None)
    # The last to be registered runs first. Python's own way, os._exit() in a handler, would leave out all handlers
    # that were registered before it: multiprocessing's, logging's, the removal of temporary folders.
    c.__cxa_atexit(c._exit, ctypes.c_void_p(1), None)
    c.__cxa_atexit(c.fflush, None, None)
