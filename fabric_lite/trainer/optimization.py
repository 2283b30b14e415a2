"""What ``configure_optimizers`` returns, in all its usual forms."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fabric_lite import FabricKeyError, FabricTypeError, FabricValueError
from fabric_lite.callbacks.monitoring import monitored

__all__ = ["Scheduled", "needs_closure", "parse_optimizers"]


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """A scheduler that steps after every ``frequency`` times ``"epoch"`` or ``"step"``.

    Where it takes a metric, as ``ReduceLROnPlateau`` does, it gets rank 0's ``monitor``, on all ranks.
    """

    scheduler: Any
    interval: str = "epoch"
    frequency: int = 1
    monitor: str | None = None
    name: str | None = None
    strict: bool = True

    def step(self, interval: str, count: int, metrics: Mapping[str, Any] | None) -> bool:
        """Step, if it is time to: without ``metrics`` if it needs none, with them if rank 0 has its metric."""
        if interval != self.interval or count % self.frequency:
            return False
        if self.monitor is None and metrics is None:
            self.scheduler.step()
            return True
        if self.monitor is None or metrics is None:
            return False
        try:
            value = monitored(metrics, self.monitor)
        except FabricKeyError:  # on all ranks
            return False
        self.scheduler.step(value)
        return True


def parse_optimizers(configured: Any) -> tuple[list[Optimizer], list[Scheduled]]:
    """The optimizers and schedulers that a module is trained with.

    Args:
        configured: None; an optimizer; a list of them; a list of optimizers and one of schedulers; a dict with
            ``"optimizer"`` and perhaps ``"lr_scheduler"``, or several. A scheduler is one, or a dict of the fields of
            :class:`Scheduled`.

    Raises:
        FabricTypeError, FabricValueError: It is something else.
    """
    if configured is None:
        return [], []
    if isinstance(configured, (Optimizer, Mapping)):
        configured = [configured]
    configured = configured if isinstance(configured, Sequence) else [configured]
    if all(isinstance(one, Optimizer) for one in configured):
        return list(configured), []
    if all(isinstance(one, Mapping) and "optimizer" in one for one in configured):
        schedulers = [one for one in configured if one.get("lr_scheduler") is not None]
        # Lightning takes the metric beside the scheduler too.
        return [one["optimizer"] for one in configured], [
            _scheduled(one["lr_scheduler"], one.get("monitor")) for one in schedulers
        ]
    if [isinstance(one, (list, tuple)) for one in configured] == [True, True]:
        return list(configured[0]), [_scheduled(one) for one in configured[1]]
    raise FabricTypeError(
        "configure_optimizers returned neither optimizers nor dicts with them.",
        given=f"{configured!r:.80}",
        fix='an optimizer, or {"optimizer": optimizer, "lr_scheduler": scheduler}',
    )


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether its step needs a function that runs forward and backward, as that of ``LBFGS`` does."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def _scheduled(given: Any, monitor: str | None = None) -> Scheduled:
    options = {"monitor": monitor, **(given if isinstance(given, Mapping) else {"scheduler": given})}
    takes_metric = options.pop("reduce_on_plateau", False) or isinstance(options.get("scheduler"), ReduceLROnPlateau)
    unknown = set(options) - {field.name for field in dataclasses.fields(Scheduled)}
    needs_monitor = takes_metric and options["monitor"] is None
    is_timed = options.get("interval", "epoch") in ("epoch", "step") and options.get("frequency", 1) >= 1
    if unknown or needs_monitor or not is_timed:
        raise FabricValueError(
            "This is not what a scheduler is configured with.",
            given=", ".join(f"{key}={value!r:.40}" for key, value in options.items()),
            fix='scheduler, interval "epoch" or "step", frequency, monitor (ReduceLROnPlateau needs one), name, strict',
        )
    # To another scheduler a metric would be the number of an epoch.
    return Scheduled(**{**options, "monitor": options["monitor"] if takes_metric else None})
