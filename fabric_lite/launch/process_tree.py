"""No orphans: processes die with their parent, and a job's end finds every descendant.

Linux gives both guarantees; elsewhere only the process group of the server is ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator

__all__ = [
    "adopt_orphans",
    "descendants",
    "die_with_parent",
    "end_descendants",
    "is_ending",
    "outlive_parent",
    "wait_for_exit",
]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37
_PF_EXITING = 4


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the thread that forked it ends; exit at once if it has ended already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def outlive_parent() -> None:
    """Undo :func:`die_with_parent`."""
    _prctl(_PR_SET_PDEATHSIG, 0)


@contextlib.contextmanager
def adopt_orphans() -> Iterator[None]:
    """Make orphaned descendants children of this process, so that they can be found and ended."""
    before = ctypes.c_int(0)
    _prctl(_PR_GET_CHILD_SUBREAPER, ctypes.addressof(before))
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _prctl(_PR_SET_CHILD_SUBREAPER, before.value)


def descendants(root: int) -> set[int]:
    """Return the ids of all living processes below ``root``; zombies do not count."""
    children: dict[int, list[int]] = {}
    zombies: set[int] = set()
    for pid, parent, state in _process_table():
        children.setdefault(parent, []).append(pid)
        if state in "ZX":
            zombies.add(pid)
    found: set[int] = set()
    pending = [root]
    while pending:
        for pid in children.get(pending.pop(), ()):
            if pid not in found:
                found.add(pid)
                pending.append(pid)
    return found - zombies


def end_descendants(root: int, *, keep: Collection[int] = (), grace_seconds: float) -> None:
    """End all descendants of ``root``: SIGTERM, then SIGKILL after the grace. ``keep`` and theirs stay."""

    def remaining() -> set[int]:
        kept = set(keep).union(*(descendants(pid) for pid in keep))
        return descendants(root) - kept

    told: set[int] = set()
    deadline = time.monotonic() + grace_seconds
    while alive := remaining():
        late = time.monotonic() > deadline
        # A new one may have been forked since the last look, hence the loop.
        for pid in alive if late else alive - told:
            _send(pid, signal.SIGKILL if late else signal.SIGTERM)
        told |= alive
        _reap(alive)
        time.sleep(0.005)
    _reap(told)


def is_ending(pid: int) -> bool:
    """Whether the process ``pid`` is on its way out: what it had open may be closed already."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # Field 9: the kernel's PF_ flags of the task.
            flags = int(file.read().rpartition(b")")[2].split()[6])
    except (FileNotFoundError, ProcessLookupError):
        return False
    return bool(flags & _PF_EXITING)


def wait_for_exit(pid: int, *, timeout_seconds: float) -> int | None:
    """Reap the child ``pid`` and return its wait status; None when it still lives after the timeout."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)


def _process_table() -> Iterator[tuple[int, int, str]]:
    """Yield (id, parent's id, state letter) of every process; nothing where there is no /proc."""
    names = os.listdir("/proc") if os.path.isdir("/proc") else ()
    for name in names:
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # The command's name stands in parentheses and may itself hold spaces and parentheses.
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended since the listing
        yield int(name), int(fields[1]), fields[0].decode()


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass  # it has ended since the listing, or has become another user's (sudo)


def _reap(pids: Collection[int]) -> None:
    for pid in pids:
        # Of a grandchild, or one that is reaped already, this process is told that it has no such child.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _prctl(option: int, argument: int) -> None:
    if sys.platform == "linux":
        result = ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(argument), 0, 0, 0)
        if result != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
