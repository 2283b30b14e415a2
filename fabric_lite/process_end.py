"""What a process owes at its end: work beside its script that has to be waited for, and an exit code that tells.

It imports no torch, because ``fabric-run`` asks here for ranks that may have loaded none.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

__all__ = [
    "EXIT_PREEMPTED",
    "be_quick",
    "exit_with_failure",
    "finish",
    "is_pending",
    "is_quick",
    "note_status",
    "owe",
    "status",
]

# What a rank exits with that was asked to leave (SIGTERM, SIGUSR1) and has saved its work: EX_TEMPFAIL, "try again".
EXIT_PREEMPTED = 75

_owed: list[tuple[Callable[[], bool], Callable[[], BaseException | None]]] = []
_is_quick = False
_status: str | None = None


def note_status(status: str) -> None:
    """Say how this process's script ends: ``"success"``, ``"failed"``, or ``"aborted"`` when it was asked to leave."""
    global _status
    _status = status


def status(*, is_at_exit: bool) -> str:
    """How the script ends, or what is now being left by an exception; ``"success"`` as long as nothing else is known.

    Under plain ``python`` that is also the end of a script by ``sys.exit(1)``, of whose code Python tells nobody.

    Args:
        is_at_exit: Whether Python itself is ending: then an exception that it has shown is the script's.
    """
    if _status is not None:
        return _status
    error = sys.exc_info()[1]
    if isinstance(error, SystemExit):
        if error.code is None or error.code == 0:
            return "success"
        return "aborted" if error.code == EXIT_PREEMPTED else "failed"
    if error is not None:
        return "failed"
    is_script = not hasattr(sys, "ps1")  # in a session an exception that was shown is one of many commands'
    return "failed" if is_at_exit and is_script and getattr(sys, "last_value", None) is not None else "success"


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
