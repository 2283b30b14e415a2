"""What a training step asks of a Fabric: backward, clipping, and gradients that wait for the end of a window."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_lite.adopt import extension_of
from fabric_lite.collectives import Collectives
from fabric_lite.data import Window
from fabric_lite.errors import FabricTypeError, FabricValueError
from fabric_lite.extension import ModuleExtension
from fabric_lite.guards import check_nothing_waits
from fabric_lite.identity import Identity
from fabric_lite.loss_scaling import LossScaler
from fabric_lite.parameters import mesh_of, parameters_of
from fabric_lite.registry import Registry

__all__ = ["Stepping"]


class Stepping(Identity):
    """The parts of a step that the loop written by hand would write differently for each layout and precision."""

    _collectives: Collectives
    _scaler: LossScaler | None
    _set_up: Registry
    _window: Window

    def backward(self, tensor: torch.Tensor, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """``tensor.backward(*args, **kwargs)``, the loss scaled where the precision asks."""
        if not isinstance(tensor, torch.Tensor):
            raise FabricTypeError("backward() takes a tensor.", given=f"{tensor!r:.80}", fix="fabric.backward(loss)")
        if self._scaler is None:
            self._run.strategy.backward(tensor, model, *args, **kwargs)
        else:
            self._scaler.backward(tensor, lambda scaled: self.strategy.backward(scaled, model, *args, **kwargs))
        self._window.waiting += 1

    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> torch.Tensor | None:
        """Clip the gradients of ``optimizer``'s parameters by value or by their norm over all ranks.

        Returns:
            By norm: the norm before clipping, a 0-dim tensor equal on all ranks. By value: None.

        Raises:
            FabricValueError: Not exactly one of ``clip_val`` and ``max_norm``.
            RuntimeError: The norm is not finite, on all ranks, parameters untouched. With a loss scaler such a step is
                skipped instead.
        """
        if (clip_val is None) == (max_norm is None):
            raise FabricValueError(
                "Gradients are clipped either by value or by norm.",
                given=f"clip_val={clip_val}, max_norm={max_norm}",
                fix="exactly one of clip_val= and max_norm=",
            )
        if not isinstance(optimizer, Optimizer):
            raise FabricTypeError(
                "clip_gradients() takes a module and its optimizer.",
                given=f"optimizer={optimizer!r:.80}",
                fix="fabric.clip_gradients(model, optimizer, max_norm=1.0)",
            )
        for other in self._set_up.modules():
            if extension_of(other).waits:
                check_nothing_waits(other, optimizer, "clip_gradients()")
        if self._scaler is not None:
            self._scaler.unscale(optimizer)
        parameters = parameters_of(optimizer)
        if clip_val is not None:
            self.strategy.clip_grad_value(parameters, clip_val)
            return None
        assert max_norm is not None
        if self._collectives.check and any(mesh_of(parameter) is not None for parameter in parameters):
            # Other norms are of this rank alone.
            self._collectives.enter(f"clip_gradients to a norm of {max_norm} of order {norm_type}")
        strict = error_if_nonfinite and self._scaler is None
        return self.strategy.clip_grad_norm(parameters, float(max_norm), float(norm_type), strict)

    @contextlib.contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> Iterator[None]:
        """Around forward and backward of a micro-step: gradients stay on their rank and add up.

        An exception inside drops the gradients of the window, so that nothing of it reaches a later step.
        """
        extension = extension_of(module)
        if not isinstance(extension, ModuleExtension):
            raise FabricTypeError(
                "no_backward_sync() needs a module that went through setup().",
                given=f"module={type(module).__name__}",
                fix="model = fabric.setup(model) first",
            )
        if not enabled:
            yield
            return
        extension.windows += 1
        try:
            with self.strategy.no_sync(module, extension.engine):
                yield
            extension.waits = bool(extension.sharded)
        except BaseException:
            for parameter in module.parameters():
                parameter.grad = None
            self.strategy.forget_unsynchronized(module)
            raise
        finally:
            extension.windows -= 1

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context that ``forward`` runs in."""
        dtype, own = self.precision.compute_dtype, self.precision.context
        around = contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)
        return around if own is None else _both(around, own())


@contextlib.contextmanager
def _both(
    outer: contextlib.AbstractContextManager[Any], inner: contextlib.AbstractContextManager[Any]
) -> Iterator[None]:
    with outer, inner:
        yield
