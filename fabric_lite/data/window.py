"""How far the data has got that the weights have seen: gradients that wait for their step are not in a checkpoint."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from fabric_lite.parameters import local_part

__all__ = ["Window"]


class Window:
    """The backward passes since the last step of any optimizer.

    A checkpoint holds no gradients. One that is saved while gradients wait therefore tells the place before the first
    batch of them, from where they are computed again. Where another optimizer has stepped since, no place is right: its
    gradients are lost, which is said; but not of a plain ``loss.backward()`` after a step on those of
    ``fabric.backward``, which were counted and not looked at.
    """

    __slots__ = ("_are_several", "_followed", "batches", "waiting")

    def __init__(self) -> None:
        self.waiting = 0
        self.batches = 0  # handed out, by all loaders
        self._followed: weakref.WeakKeyDictionary[Optimizer, _Step] = weakref.WeakKeyDictionary()
        self._are_several = False

    def follow(self, optimizer: Optimizer) -> Callable[..., None]:
        """The post-hook of an optimizer's ``step``, which ends the window."""
        latest = self._followed[optimizer] = _Step()
        self._are_several = len(self._followed) > 1

        def end(stepped: Optimizer, *_: Any) -> None:
            # Every step pays for this. One optimizer's gradients are counted as they come, by fabric.backward.
            is_counted = self.waiting and not self._are_several
            self.waiting = 0
            if is_counted:
                latest.gradient = None
            else:
                latest.see(stepped, self.batches)

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
        for optimizer, latest in list(self._followed.items()):
            parameters = optimizer.param_groups[0]["params"]
            gradient = parameters[0].grad if parameters else None
            # One that has stepped since the latest batch may be left gradients of another's loss, as in a GAN.
            if gradient is None or latest.batches == self.batches or latest.explains(gradient):
                continue
            if bool(local_part(gradient).count_nonzero()):
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


class _Step:
    """What the latest step of one optimizer saw: the batches, and the first of its gradients."""

    __slots__ = ("batches", "gradient", "version")

    def __init__(self) -> None:
        self.batches = -1
        # Weak, since it may be let go; None where nobody has looked.
        self.gradient: Callable[[], torch.Tensor | None] | None = _nothing
        self.version = 0

    def see(self, optimizer: Optimizer, batches: int) -> None:
        """Take note of what the optimizer has stepped on."""
        self.batches = batches
        parameters = optimizer.param_groups[0]["params"]
        gradient = parameters[0].grad if parameters else None
        if gradient is None:
            self.gradient = _nothing
        else:
            self.gradient, self.version = weakref.ref(gradient), gradient._version

    def explains(self, gradient: torch.Tensor) -> bool:
        """Whether ``gradient`` is what that step left, and nothing was added to it."""
        # Of another gradient the address may be the same, once the first is gone.
        return self.gradient is None or (self.gradient() is gradient and self.version == gradient._version)


def _nothing() -> None:
    """What there is to see of a gradient that was not there."""
