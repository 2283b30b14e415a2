"""How far the data has got that the weights have seen: gradients that wait for their step are not in a checkpoint."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from fabric_lite.parameters import local_part

__all__ = ["Window"]


class Window:
    """The backward passes since the last step of any optimizer.

    A checkpoint holds no gradients. One that is saved while gradients wait therefore tells the place before the first
    batch of them, from where they are computed again. Where another optimizer has stepped since, no place is right: its
    gradients are lost, which is said.
    """

    __slots__ = ("_followed", "batches", "waiting")

    def __init__(self) -> None:
        self.waiting = 0
        self.batches = 0  # handed out, by all loaders
        # By optimizer, at the end of its latest step: the batches, and what was left of its first gradient.
        self._followed: weakref.WeakKeyDictionary[Optimizer, list[Any]] = weakref.WeakKeyDictionary()

    def follow(self, optimizer: Optimizer) -> Callable[..., None]:
        """The post-hook of an optimizer's ``step``, which ends the window."""
        latest: list[Any] = [-1, None]
        self._followed[optimizer] = latest

        def end(stepped: Optimizer, *_: Any) -> None:
            self.waiting = 0
            latest[0], latest[1] = self.batches, _mark(_first_gradient(stepped))

        return end

    def forget(self, optimizer: Optimizer) -> None:
        """Follow an optimizer no more: its steps will not be seen."""
        self._followed.pop(optimizer, None)

    @property
    def is_open(self) -> bool:
        """Whether gradients wait for a step that will be seen; steps of optimizers that were not set up are not."""
        return self.waiting > 0 and len(self._followed) > 0

    def say_what_waits(self, batches: int, is_place_before: bool) -> None:
        """Warn of gradients that a state which is taken now does not hold; waits for the device.

        Args:
            batches: Those of the loader whose gradients wait, if any do.
            is_place_before: Whether the place that is told is before the first of them.
        """
        if self.is_open:
            then = "on resuming, they come again" if is_place_before else "on resuming, they are lost"
            self._warn(
                f"The gradients of the latest {batches} batches wait for a step, and a checkpoint has none: {then}."
            )
            return
        for optimizer, (stepped_at, mark) in list(self._followed.items()):
            gradient = _first_gradient(optimizer)
            # One that has stepped since the latest batch may be left gradients of another's loss, as in a GAN.
            is_new = gradient is not None and stepped_at < self.batches and not _is_marked(gradient, mark)
            if is_new and bool(local_part(gradient).count_nonzero()):
                self._warn(
                    f"Gradients of {type(optimizer).__name__} wait for a step while another optimizer has stepped, and "
                    "a checkpoint has none: on resuming, they are lost."
                )
                return

    @staticmethod
    def _warn(message: str) -> None:
        warnings.warn(
            f"{message} Random numbers are then no more those of a run in one go. Save after optimizer.step().",
            stacklevel=6,
        )


def _first_gradient(optimizer: Optimizer) -> Any:
    parameters = optimizer.param_groups[0]["params"]
    return parameters[0].grad if parameters else None


def _mark(gradient: Any) -> Any:
    """What tells a gradient that was added to, or another one, from this one; weak, since it may be let go."""
    return None if gradient is None else (weakref.ref(gradient), gradient._version)


def _is_marked(gradient: Any, mark: Any) -> bool:
    # Of another gradient the address may be the same, once the first is gone.
    return mark is not None and mark[0]() is gradient and mark[1] == gradient._version
