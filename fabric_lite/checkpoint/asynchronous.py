"""Saves that are written beside the training loop: one at a time, and none whose failure stays unknown."""

from __future__ import annotations

import atexit
import dataclasses
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from fabric_lite import process_end, run_config
from fabric_lite.checkpoint.layout import AgreedPlan, ShardPlan
from fabric_lite.checkpoint.remote import Target
from fabric_lite.checkpoint.staging import Staged, Staging
from fabric_lite.checkpoint.together import Together
from fabric_lite.collectives import is_distributed, rank, timeout_of_default_group
from fabric_lite.notices import rank_zero_info

__all__ = ["SaveHandle", "finish", "finish_at_exit", "start", "wait_for_last"]

NOTICEABLE_SECONDS = 1.0

# Writes the staged content and shards; the ranks agree through the given group.
Write = Callable[[Any, ShardPlan, Together], None]


class SaveHandle:
    """A save that is written while the training goes on: what ``fabric.save(..., async_=True)`` returns.

    What goes wrong is raised by :meth:`result`; if no rank has asked, by the next save, on all of them. A rank that
    was not told yet raises it in ``fabric.close()``; at the end of the process it is said on standard error, and the
    exit code is 1. Under ``fabric-run`` it then is what the rank has failed of.

    A process does not end before its save has, also after an exception. ``fabric-run`` leaves the ranks of its node
    five minutes for it then. A save over several ranks is lost when one of them is killed or crashes, and over several
    nodes when one fails; the checkpoint before it stays.
    """

    def __init__(self, target: Target, work: Callable[[], None]) -> None:
        self.path = target
        self.error: BaseException | None = None
        self.is_known = False  # whether its error was raised or said
        self.is_of_all = True  # whether an error is one on every rank
        self.process, self.rank = os.getpid(), rank()
        self._thread = self._started(work)

    def done(self) -> bool:
        """Whether this rank has finished, well or not. Does not wait."""
        return not self._thread.is_alive()

    def result(self) -> None:
        """Wait until the checkpoint is on the disk. Any rank may ask, the others need not, and can go on saving.

        Raises:
            CheckpointError: It could not be written, and an earlier one is as it was; on every rank that asks.
        """
        self.wait()
        self.is_known = True
        if self.error is not None:
            raise self.error

    def then(self, function: Callable[[], None]) -> None:
        """Call ``function`` beside the training too once the save has ended well; the save is done when it is.

        What it raises is an error of the save on this rank alone.
        """
        before = self._thread

        def work() -> None:
            before.join()
            if self.error is None:
                self.is_of_all = False
                function()

        self._thread = self._started(work)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the end, so long at most; whether it has come. Raises nothing of the save."""
        self._thread.join(seconds)
        return self.done()

    def take_error(self) -> BaseException | None:
        """What went wrong, if nobody was told yet."""
        error = None if self.is_known else self.error
        self.is_known = True
        return error

    def _started(self, work: Callable[[], None]) -> threading.Thread:
        # Else Python lets a new thread run for 5 ms (sys.getswitchinterval) before the training goes on.
        started = threading.Event()
        # Not a daemon: Python waits for it, also after an exception in the script.
        thread = threading.Thread(target=self._run, args=(work, started), name="fabric_lite save", daemon=False)
        try:
            thread.start()
        finally:
            started.set()  # also when Ctrl-C comes in between
        return thread

    def _run(self, work: Callable[[], None], started: threading.Event) -> None:
        started.wait()
        try:
            with torch.no_grad():
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
    agreed: AgreedPlan | None = None  # by the ranks of that group, in the last save
    is_watched: bool = False


_process = _Process()


def start(
    target: Target,
    content: Any,
    sharded: Mapping[str, Any] | None,
    make_plan: Callable[[], ShardPlan],
    write: Write,
) -> SaveHandle:
    """Copy what is to be written, and write the copy in a thread. Every rank calls it; no save may be under way.

    Where all ranks hold what they held at the save before, they only tell each other so, beside the copying. A rank
    that has no memory for its copy says so to the others in the thread; it raises nothing but what ``make_plan`` does.

    Args:
        target: The checkpoint's name.
        content: Plain data; rank 0's is written.
        sharded: The DTensors in it by their places; None where they could not be found, and ``make_plan`` raises why.
        make_plan: Has all ranks describe their DTensors and say who writes what; every rank calls it or none.
        write: Writes the copies.
    """
    together = Together(_own_group())
    agreed = _process.agreed
    plan = None if agreed is None or sharded is None else _still(agreed, sharded)
    all_know = together.all_soon(plan is not None)
    staged = None if plan is None else _staged(content, plan)
    if not all_know() or staged is None:
        plan = make_plan()
        _process.agreed = None if sharded is None else AgreedPlan(plan, sharded)
        staged = _staged(content, plan)
    if not _process.is_watched:
        atexit.register(finish_at_exit)
        process_end.owe(_is_under_way, _outcome)
        _process.is_watched = True

    def ready() -> tuple[Any, ShardPlan]:
        if not isinstance(staged, Staged):
            raise staged
        return staged.take(), staged.plan

    def work() -> None:
        write(*together.on_every_rank("save()", ready), together)

    _process.last = SaveHandle(target, work)
    return _process.last


def _still(agreed: AgreedPlan, sharded: Mapping[str, Any]) -> ShardPlan | None:
    try:
        return agreed.now(sharded)
    except Exception:
        return None  # why, making a plan says on all ranks


def _staged(content: Any, plan: ShardPlan) -> Staged | Exception:
    try:
        return _process.staging.stage(content, plan)
    except Exception as error:
        return error


def wait_for_last() -> SaveHandle | None:
    """Wait for the save that is under way, if any; return the last one if it failed."""
    last = _last()
    if last is None:
        return None
    if not last.wait(NOTICEABLE_SECONDS):
        rank_zero_info(
            "a save waits until the asynchronous one before it is on the disk: they come faster than it can be written"
        )
        last.wait()
    return None if last.error is None else last


def finish() -> BaseException | None:
    """Wait for the last save, and give back the memory that the copies were in; the error that nobody was told of."""
    error = _outcome()
    _process.last, _process.staging, _process.agreed = None, Staging(), None
    return error


def finish_at_exit() -> None:
    """:func:`finish` for the end of the process, where an error can only be said, and the exit code tell.

    One on every rank is said by rank 0.
    """
    last, error = _last(), _outcome()
    if last is None or error is None:
        return
    if last.rank == 0 or not last.is_of_all:
        print(f"fabric_lite: the asynchronous save of {last.path} failed.\n{error}", file=sys.stderr, flush=True)
    if run_config.current() is None:  # else a script that ran to its end has been told, and another has its own code
        process_end.exit_with_failure()


def _is_under_way() -> bool:
    last = _last()
    return last is not None and not last.done()


def _outcome() -> BaseException | None:
    """Wait for the last save; its error, if nobody was told of it."""
    last = _last()
    if last is None:
        return None
    last.wait()
    return last.take_error()


def _last() -> SaveHandle | None:
    """The last save of this process; a forked one has none."""
    last = _process.last
    return last if last is not None and last.process == os.getpid() else None


def _own_group() -> Any:
    """The group of all ranks for what is written beside the training; every rank calls it at the same time."""
    if not is_distributed():
        return None
    group = None if _process.group is None else _process.group()
    if group is None:
        group = dist.new_group(backend="gloo", timeout=timeout_of_default_group())
        _process.group, _process.agreed = weakref.ref(group), None
    return group
