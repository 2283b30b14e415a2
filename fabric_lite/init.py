"""Making tensors and modules where and as they are needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fabric_lite.deferred import record

__all__ = ["place", "tensors_on"]


@contextlib.contextmanager
def tensors_on(
    device: torch.device, dtype: torch.dtype | None, *, skip_initialization: bool = False, deferred: bool = False
) -> Iterator[None]:
    """A context in which new tensors are on ``device``, floats in ``dtype``.

    The device is that of this thread's new tensors only. The dtype is torch's default dtype, of which the process has
    one: while the block runs, other threads make their float tensors in it too.

    Args:
        device: Where.
        dtype: Default floating-point dtype; None leaves the process's own.
        skip_initialization: Whether ``torch.nn.init`` does nothing, so that parameters hold whatever memory held.
        deferred: Whether the tensors get no memory yet: they are on the meta device, and what is done with them is
            recorded, see :mod:`fabric_lite.deferred`.
    """
    previous = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if skip_initialization:
            stack.enter_context(_SkipInitialization())
        stack.enter_context(record(device) if deferred else device)
        try:
            if dtype is not None:
                torch.set_default_dtype(dtype)
            yield
        finally:
            torch.set_default_dtype(previous)


def place(module: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """Move ``module`` to ``device`` and its floating-point tensors to ``dtype``, in place; None leaves them.

    A module that is right already is not touched.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if device is not None and any(tensor.device != device for tensor in tensors):
        module.to(device)
    if dtype is not None and any(tensor.dtype != dtype for tensor in tensors if tensor.is_floating_point()):
        module.to(dtype)


class _SkipInitialization(TorchFunctionMode):
    """Turns the functions of ``torch.nn.init`` into no-ops."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
