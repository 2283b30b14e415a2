"""Leaving in an orderly way when one rank is asked to: all ranks agree on the step after which they stop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from fabric_lite.errors import CollectiveError
from fabric_lite.notices import rank_zero_info
from fabric_lite.side_store import SideThread
from fabric_lite.signals import requests
from fabric_lite.steps import Steps

__all__ = ["Preemption", "agree"]

_LOOK_SECONDS = 0.25  # how often a rank that was not asked itself looks whether another was
_ANSWER_SECONDS = 0.02
_REQUEST, _ANSWERS, _TARGET = "request", "answers", "target"

_numbers = itertools.count()  # every rank makes its Fabrics in the same order


class Preemption:
    """Whether this run has been asked to stop, and by which step.

    Nothing happens before the first :attr:`should_stop`; from then on SIGTERM and SIGUSR1 to any one rank are a request
    to all. With several ranks a thread beside the loop agrees with the others through the store: no collective.

    Args:
        steps: Counts the steps, the same on all ranks.
        rank: This rank.
        world_size: The number of ranks.
    """

    def __init__(self, steps: Steps, rank: int, world_size: int) -> None:
        self._steps = steps
        self._rank = rank
        self._world_size = world_size
        self._name = f"preemption {next(_numbers)}"
        self._thread: SideThread | None = None
        self._is_listening = False
        self._is_closed = False
        self._asked: str | None = None
        self._reason = ""
        self._target: int | None = None

    @property
    def should_stop(self) -> bool:
        """Whether the step that all ranks have agreed on is completed; the same on all ranks after the same step."""
        if not self._is_listening:
            self._begin()
        if self._target is None or self._steps.completed < self._target:
            return False
        rank_zero_info(f"asked to stop by {self._reason or self._asked}: stopping after step {self._steps.total}")
        return True

    def asked(self, name: str) -> None:
        """Take a request, of the signal ``name``."""
        self._asked = name
        if self._thread is not None:
            self._thread.wake()
        elif self._world_size == 1 and self._target is None:
            self._target = self._steps.completed + 1

    def close(self) -> None:
        """Take no more requests, and let the other ranks do without this one."""
        self._is_closed = True
        if self._thread is not None:
            self._thread.close()
        if self._is_listening:
            requests.ignore(self)
            self._is_listening = False

    def let_go(self) -> None:
        """:meth:`close` for the garbage collector: it waits for nothing, and leaves handlers to the next one."""
        self._is_closed = True
        if self._thread is not None:
            self._thread.let_go()
        requests.forget(self)

    def _begin(self) -> None:
        # Without steps there is no moment to stop at, and a signal keeps its own meaning.
        if self._is_closed or not self._steps.is_counting:
            return
        if self._world_size > 1 and self._thread is None:
            try:
                self._thread = SideThread(self._name, self._watch)
            except CollectiveError as error:  # on all ranks alike; a signal keeps its own meaning
                rank_zero_info(f"should_stop stays False, since the ranks can't agree on a step. {error}")
                self._is_closed = True
                return
        self._is_listening = requests.listen(self)

    def _watch(self, thread: SideThread, store: Any) -> None:
        """Wait for a request to this rank or another, and agree."""
        try:
            while thread.wait(_LOOK_SECONDS, *requests.descriptors()):
                requests.pass_on()
                if self._asked is not None:
                    store.set(_REQUEST, f"{self._asked} on rank {self._rank}")
                if store.check([_REQUEST]):
                    self._reason = store.get(_REQUEST).decode()
                    self._target = agree(store, self._steps, self._rank, self._world_size, thread.wait)
                    break
            else:
                # So that nobody waits for the answer of a rank that has left.
                agree(store, self._steps, self._rank, self._world_size, thread.wait)
        except Exception:
            if not store.check([f"{_ANSWERS} {self._rank}"]):
                agree(store, self._steps, self._rank, self._world_size, lambda _: False)  # nor of one that cannot look
            raise
        finally:
            self._steps.let_go()
        # A signal that comes again ends a rank that is stuck.
        while thread.wait(_LOOK_SECONDS, *requests.descriptors()):
            requests.pass_on()


def agree(store: Any, steps: Steps, rank: int, world_size: int, wait: Callable[[float], bool]) -> int | None:
    """Return the same step on all ranks, one that no rank has completed yet; called beside the loop, on every rank.

    Each rank says after which step it can stop at the earliest, the one that it is in the middle of, and its loop does
    not go past that one before the answer is known; it is the latest of them. A rank that waits so is ahead of the
    others. No answer takes a loop's doing, so loops that wait for each other in a collective do not stand in the way.

    Args:
        store: Where ranks read what the others write.
        steps: This rank's; it is for the caller to let go of it when the answer is in its place.
        rank: This rank.
        world_size: How many ranks answer.
        wait: Waits for seconds; False where there is no time to wait.

    Returns:
        The number of the step, by ``steps.completed``; None when ``wait`` said so.
    """
    store.set(f"{_ANSWERS} {rank}", str(steps.hold_after_next()))
    if store.add(_ANSWERS, 1) == world_size:
        answers = store.multi_get([f"{_ANSWERS} {other}" for other in range(world_size)])
        store.set(_TARGET, str(max(map(int, answers))))
    while not store.check([_TARGET]):
        if not wait(_ANSWER_SECONDS):
            return None
    return int(store.get(_TARGET))
