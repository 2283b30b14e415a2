"""``optimizer.zero_grad()`` under strategies that hold gradients back where ``parameter.grad`` does not show them."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Container
from typing import Any

import torch

__all__ = ["extend_zero_grad"]


@dataclasses.dataclass(frozen=True)
class _Handle:
    """Takes the method off again, like the handle of a hook."""

    optimizer: weakref.ref[torch.optim.Optimizer]

    def remove(self) -> None:
        optimizer = self.optimizer()
        if optimizer is not None:
            optimizer.__dict__.pop("zero_grad", None)


def extend_zero_grad(optimizer: torch.optim.Optimizer, forget: Callable[[Container[int]], None]) -> _Handle:
    """Let ``optimizer.zero_grad()`` call ``forget`` with the ``id`` of each of its parameters as well.

    torch has no hook for ``zero_grad``, so this one method is set on the object; copies and pickles of an optimizer do
    not carry it.

    Returns:
        A handle whose ``remove()`` takes it off.
    """
    reference = weakref.ref(optimizer)  # no cycle: an optimizer goes when its user lets it go
    plain = type(optimizer).zero_grad

    @functools.wraps(plain)
    def zero_grad(*args: Any, **kwargs: Any) -> None:
        target = reference()
        assert target is not None
        plain(target, *args, **kwargs)
        forget({id(parameter) for group in target.param_groups for parameter in group["params"]})

    optimizer.__dict__["zero_grad"] = zero_grad
    return _Handle(reference)
