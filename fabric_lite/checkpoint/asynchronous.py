"""Saves that are written beside the training loop: one at a time, and none whose failure stays unknown."""

from __future__ import annotations

import atexit
import dataclasses
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fabric_lite.checkpoint.layout import ShardPlan
from fabric_lite.checkpoint.remote import Target
from fabric_lite.checkpoint.staging import Staging
from fabric_lite.checkpoint.together import Together, lost_ranks_explained
from fabric_lite.collectives import is_distributed, rank
from fabric_lite.notices import rank_zero_info

__all__ = ["SaveHandle", "finish", "finish_at_exit", "start", "wait_for_last"]

NOTICEABLE_SECONDS = 1.0

# Writes the staged content and shards; the ranks agree through the given group.
Write = Callable[[Any, ShardPlan, Together], None]


class SaveHandle:
    """A save that is written while the training goes on: what ``fabric.save(..., async_=True)`` returns.

    What goes wrong is raised by :meth:`result`; if nobody asks, by the next save or by ``fabric.close()``, and at the
    end of the process it is said on standard error. The process does not end before the save has.
    """

    def __init__(self, target: Target, work: Callable[[], None]) -> None:
        self.path = target
        self.error: BaseException | None = None
        self.is_known = False  # whether its error was raised or said
        self.place = os.getpid(), rank()
        # Not a daemon: Python waits for it, also after an exception in the script.
        self._thread = threading.Thread(target=self._run, args=(work,), name="fabric_lite save", daemon=False)
        self._thread.start()

    def done(self) -> bool:
        """Whether this rank has finished, well or not. Does not wait."""
        return not self._thread.is_alive()

    def result(self) -> None:
        """Wait until the checkpoint is on the disk. Any rank may ask, the others need not.

        Raises:
            CheckpointError: It could not be written, and an earlier one is as it was; on every rank that asks.
        """
        self.wait()
        self.is_known = True
        if self.error is not None:
            raise self.error

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the end, so long at most; whether it has come. Raises nothing of the save."""
        self._thread.join(seconds)
        return self.done()

    def take_error(self) -> BaseException | None:
        """What went wrong, if nobody was told yet."""
        error = None if self.is_known else self.error
        self.is_known = True
        return error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            with torch.no_grad(), lost_ranks_explained("save()"):
                work()
        except BaseException as error:
            self.error = error


@dataclasses.dataclass
class _Process:
    """What this process knows of its asynchronous saves."""

    last: SaveHandle | None = None
    staging: Staging = dataclasses.field(default_factory=Staging)
    # Weak: it ends with the default group, and gloo aborts a process that holds a group at its end.
    group: weakref.ref[Any] | None = None
    is_watched: bool = False


_process = _Process()


def start(target: Target, content: Any, plan: ShardPlan, write: Write) -> SaveHandle:
    """Copy what is to be written, and write the copy in a thread. Every rank calls it; no save may be under way.

    It raises nothing: a rank that has no memory for its copy says so to the others in the thread.
    """
    together = Together(_own_group())
    error: Exception | None = None
    try:
        staged = _process.staging.stage(content, plan)
    except Exception as exception:
        error = exception
    if not _process.is_watched:
        atexit.register(finish_at_exit)
        _process.is_watched = True

    def ready() -> None:
        if error is not None:
            raise error
        staged.wait()

    def work() -> None:
        together.on_every_rank("save()", ready)
        write(staged.content, staged.plan, together)

    _process.last = SaveHandle(target, work)
    return _process.last


def wait_for_last() -> BaseException | None:
    """Wait for the save that is under way, if any; return what went wrong in the last one, if nobody was told yet."""
    last = _last()
    if last is None:
        return None
    if not last.wait(NOTICEABLE_SECONDS):
        rank_zero_info(
            "a save waits until the asynchronous one before it is on the disk: they come faster than it can be written"
        )
        last.wait()
    return last.take_error()


def finish() -> BaseException | None:
    """:func:`wait_for_last`, and give back the memory that the copies were in."""
    error = wait_for_last()
    _process.last, _process.staging = None, Staging()
    return error


def finish_at_exit() -> None:
    """:func:`finish` for the end of the process, where an error can only be said; rank 0 does."""
    last = _last()
    if last is None:
        return
    last.wait()
    error = last.take_error()
    if error is not None and last.place[1] == 0:
        print(f"fabric_lite: the asynchronous save of {last.path} failed.\n{error}", file=sys.stderr, flush=True)


def _last() -> SaveHandle | None:
    """The last save of this process; a forked one has none."""
    last = _process.last
    return last if last is not None and last.place[0] == os.getpid() else None


def _own_group() -> Any:
    """The group of all ranks for what is written beside the training; every rank calls it at the same time."""
    if not is_distributed():
        return None
    group = None if _process.group is None else _process.group()
    if group is None:
        group = dist.new_group(backend="gloo")
        _process.group = weakref.ref(group)
    return group
