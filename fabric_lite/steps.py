"""How many steps a run has made: the clock that all ranks share without a word between them."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch.optim import Optimizer

from fabric_lite.adopt import extension_of
from fabric_lite.notices import says_that_it_waits

__all__ = ["Steps"]


class Steps:
    """Completed calls of ``step`` of one optimizer, the first that was set up; those that overflowed count too.

    The count is the same on all ranks at the same line of the script, so ranks can agree on a moment by its number.

    Args:
        owner: Who sets the optimizers up.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = weakref.ref(owner)
        self._optimizer: Callable[[], Optimizer | None] = lambda: None
        self._is_held = False
        self._free = threading.Event()
        self._restored = 0
        self.completed = 0  # of this process

    @property
    def total(self) -> int:
        """The steps of the run, those before it was resumed included."""
        return self._restored + self.completed

    @property
    def is_counting(self) -> bool:
        """Whether there is an optimizer to follow."""
        optimizer = self._optimizer()
        return optimizer is not None and getattr(extension_of(optimizer), "owner", None) is self._owner()

    def restore(self, total: int) -> None:
        """Go on from ``total`` steps. What ranks agree on by this process's own count stays as it is."""
        self._restored = total - self.completed

    def follow(self, optimizer: Optimizer) -> Callable[..., None] | None:
        """The post-hook of ``step`` that counts; None while another optimizer is followed."""
        if self.is_counting and self._optimizer() is not optimizer:
            return None
        self._optimizer = weakref.ref(optimizer)

        def count(*_: Any) -> None:
            self.completed += 1  # before it looks, see hold_after_next
            if self._is_held:
                self._wait()

        def count_outermost(stepped: Optimizer, *_: Any) -> None:
            if not _is_within_step(sys._getframe(1), stepped):
                count()

        # One whose step calls that of its base class fires the hooks twice.
        defining = [kind for kind in type(optimizer).__mro__ if "step" in vars(kind) and kind is not Optimizer]
        return count if len(defining) < 2 else count_outermost

    def hold_after_next(self) -> int:
        """Let the loop wait at the end of its next step until :meth:`let_go`; from any thread but the loop's.

        Returns:
            The number of that step, by ``completed``. A loop that was just about to look waits one step before it.
        """
        # Without a lock, of which every step would pay the price: the loop counts first and looks then.
        self._is_held = True
        return self.completed + 1

    def let_go(self) -> None:
        """Let the loop run on; for good."""
        self._is_held = False
        self._free.set()

    def _wait(self) -> None:
        with says_that_it_waits("fabric.should_stop, since one was asked to stop,"):
            self._free.wait()


def _is_within_step(frame: FrameType, optimizer: Optimizer) -> bool:
    """Whether ``frame``, torch's wrapper around a ``step``, was called within another one of the same optimizer."""
    outer = frame.f_back
    while outer is not None:
        if outer.f_code is frame.f_code and outer.f_locals["args"][0] is optimizer:
            return True
        outer = outer.f_back
    return False
