"""How far the data has got that the weights have seen: gradients that wait for their step are not in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Window"]


class Window:
    """The backward passes since the last step of any optimizer.

    A checkpoint holds no gradients. One that is saved while gradients wait therefore tells the place before the first
    batch of them, from where they are computed again.
    """

    __slots__ = ("has_steps", "waiting")

    def __init__(self) -> None:
        self.waiting = 0
        self.has_steps = False  # steps of optimizers that were not set up are not seen

    def follow(self) -> Callable[..., None]:
        """The post-hook of an optimizer's ``step``, which ends the window."""
        self.has_steps = True

        def end(*_: Any) -> None:
            self.waiting = 0

        return end
