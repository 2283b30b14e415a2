"""``zero_grad()`` under strategies that hold gradients back where ``parameter.grad`` does not show them."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["extend_zero_grad"]


@dataclasses.dataclass(frozen=True)
class _Handle:
    """Takes the method off again, like the handle of a hook."""

    target: weakref.ref[Any]

    def remove(self) -> None:
        target = self.target()
        if target is not None:
            target.__dict__.pop("zero_grad", None)


def extend_zero_grad(target: torch.optim.Optimizer | torch.nn.Module, forget: Callable[[Any], None]) -> _Handle:
    """Let ``target.zero_grad()`` call ``forget(target)`` as well.

    torch has no hook for ``zero_grad``, so this one method is set on the object. Pickles and copies of an optimizer do
    not carry it; of sharded modules there are none.

    Returns:
        A handle whose ``remove()`` takes it off.
    """
    reference: weakref.ref[Any] = weakref.ref(target)  # no cycle: it goes when its user lets it go
    plain: Callable[..., None] = type(target).zero_grad

    @functools.wraps(plain)
    def zero_grad(*args: Any, **kwargs: Any) -> None:
        own: Any = reference()
        plain(own, *args, **kwargs)
        forget(own)

    target.__dict__["zero_grad"] = zero_grad
    return _Handle(reference)
