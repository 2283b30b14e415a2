"""Stopping a run that gets no better, on all ranks at the same moment."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from fabric_lite.callbacks.monitoring import check_mode, monitored
from fabric_lite.errors import FabricValueError, unknown_arguments
from fabric_lite.notices import rank_zero_info

__all__ = ["EarlyStopping"]


# What Lightning's has.
_INSTEAD = {
    "verbose": "leave it out, it says when it stops the run",
    "strict": "leave it out, a value that is missing raises",
    "stopping_threshold": "trainer.should_stop, or a break in a loop of your own",
    "divergence_threshold": "trainer.should_stop, or a break in a loop of your own",
}


class EarlyStopping:
    """Says when a value has not got better for some time. ::

        early = EarlyStopping("val_loss", patience=3)
        fabric = Fabric(callbacks=early)  # then its count is saved and restored with the fabric
        for epoch in range(epochs):
            ...
            if early.step({"val_loss": evaluate(model)}):
                break

    :meth:`step` and :meth:`on_validation_end` are the same, the latter for ``fabric.call("on_validation_end",
    metrics=...)``. Every rank calls; the value of rank 0 decides for all.

    Args:
        monitor: The name of the value.
        patience: How many times in a row it is no better when it is time to stop.
        mode: Whether better is ``"min"`` or ``"max"``.
        min_delta: By how much a better value differs from the best, at least.
        check_finite: Whether to stop at once at a value that is NaN or infinite.
        check_on_train_epoch_end: Whether its hook is ``on_train_epoch_end`` instead, for a value of the training.
        others: There are none; names of Lightning's arguments are told what to do here.

    Raises:
        FabricTypeError: There is no such argument.
        FabricValueError: A value is not allowed.
    """

    def __init__(
        self,
        monitor: str,
        patience: int = 3,
        mode: str = "min",
        min_delta: float = 0.0,
        check_finite: bool = True,
        check_on_train_epoch_end: bool = False,
        **others: Any,
    ) -> None:
        if others:
            raise unknown_arguments("EarlyStopping", others, inspect.signature(EarlyStopping).parameters, _INSTEAD)
        check_mode(mode)
        for name, value in (("patience", patience), ("min_delta", min_delta)):
            if not value >= 0:
                raise FabricValueError(f"{name} is not negative.", given=f"{name}={value}", fix=f"{name}=0")
        self.monitor, self.patience, self.mode = monitor, patience, mode
        self.min_delta, self.check_finite = min_delta, check_finite
        self.waits_for_validation = not check_on_train_epoch_end
        self.best: float | None = None
        self.waited = 0  # how many times in a row it was no better
        self.should_stop = False

    def step(self, metrics: Mapping[str, Any]) -> bool:
        """Look at a new value, and say whether to stop; every rank calls.

        Raises:
            FabricKeyError: The value is not among ``metrics`` of rank 0; on all ranks.
        """
        value = monitored(metrics, self.monitor)
        if self.check_finite and not math.isfinite(value):
            self._stop(f"{self.monitor} is {value}")
        elif self.best is None or math.isnan(self.best) or self._is_better(value, self.best):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
            if self.waited >= max(self.patience, 1):
                self._stop(f"{self.monitor} has not got better than {self.best:.4g} for {self.waited} times")
        return self.should_stop

    def on_validation_end(self, *, metrics: Mapping[str, Any], is_fitting: bool = True) -> None:
        """:meth:`step`, after a validation of a training."""
        if self.waits_for_validation and is_fitting:
            self.step(metrics)

    def on_train_epoch_end(self, *, metrics: Mapping[str, Any] | None = None) -> None:
        """:meth:`step`, after an epoch, if that was asked for; else it needs no metrics."""
        if not self.waits_for_validation:
            self.step(metrics or {})

    def reset(self) -> None:
        """Begin anew."""
        self.best, self.waited, self.should_stop = None, 0, False

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, how long it is ago, and whether to stop."""
        return {"best": self.best, "waited": self.waited, "should_stop": self.should_stop}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.best, self.waited, self.should_stop = state["best"], state["waited"], state["should_stop"]

    def _is_better(self, value: float, best: float) -> bool:
        return value < best - self.min_delta if self.mode == "min" else value > best + self.min_delta

    def _stop(self, reason: str) -> None:
        self.should_stop = True
        rank_zero_info(f"stopping early: {reason}")
