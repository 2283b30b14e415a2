"""What steps log: sent step by step, and put together over an epoch and over the ranks."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fabric_lite import Fabric, FabricRuntimeError, FabricTypeError, FabricValueError

__all__ = ["Metrics"]

_COMBINE: dict[str, Any] = {"mean": torch.add, "sum": torch.add, "min": torch.minimum, "max": torch.maximum}


@dataclasses.dataclass
class Total:
    """What the values of an epoch come to so far; of a mean, the sum of value times weight."""

    name: str
    reduce_fx: str
    sync_dist: bool
    prog_bar: bool
    logger: bool
    value: Any = None
    weight: float = 0.0
    window: int | None = None  # of accumulation, that the latest value is of
    before: tuple[Any, float] = (None, 0.0)  # the value and weight before it

    def add(self, value: Any, weight: float, window: int | None) -> None:
        if window != self.window:
            self.window, self.before = window, (self.value, self.weight)
        new = torch.as_tensor(value)
        if not new.is_floating_point() or new.itemsize < 4:
            new = new.float()  # sums of halves stop growing, and of whole numbers and others a sum would be whole
        new = new * weight if self.reduce_fx == "mean" else new
        self.value = new if self.value is None else _COMBINE[self.reduce_fx](self.value.to(new.device), new)
        self.weight += weight

    def saved(self, window: int | None) -> dict[str, Any] | None:
        """What a checkpoint keeps: without the values of this window, which is open; None: nothing."""
        is_open = window is not None and window == self.window
        value, weight = self.before if is_open else (self.value, self.weight)
        fields = {name: getattr(self, name) for name in ("name", "reduce_fx", "sync_dist", "prog_bar", "logger")}
        return None if value is None else {**fields, "value": value.cpu(), "weight": weight}

    def result(self, parts: Sequence[tuple[float, float, bool]]) -> float:
        """What the values come to, of the ``(value, weight, sync_dist)`` of the ranks that count."""
        value = {"min": min, "max": max}.get(self.reduce_fx, sum)(part[0] for part in parts)
        weight = sum(part[1] for part in parts)
        return value if self.reduce_fx != "mean" else value / weight if weight else math.nan


class Metrics:
    """All that steps log, sent to the loggers of ``fabric``: the values of training steps every so many of them."""

    def __init__(self, fabric: Fabric, every_n_steps: int) -> None:
        self._fabric, self._every = fabric, every_n_steps
        self.latest: dict[str, Any] = {}
        self.of_step: dict[str, Any] = {}  # what this training step has logged
        self.shown: dict[str, Any] = {}  # beside the bar
        self.batch: Any = None  # of the step that is running
        self.stage: str | None = None  # whose steps they are
        self.suffix = ""  # of names, where there are several loaders
        self._totals: dict[str, dict[str, Total]] = {}  # by stage and name
        self._kept: dict[str, Total] | None = None
        self.window: int | None = None  # of accumulation, that is open; batches of it are done again after a resume
        self.to_send: dict[str, Any] = {}  # what training steps have logged, to the loggers

    def begin(self) -> None:
        """Forget what a fit before has logged and left unfinished."""
        self.latest, self.of_step, self.shown, self.to_send = {}, {}, {}, {}
        self._totals, self._kept, self.window = {}, None, None

    def rest(self) -> None:
        """Take no values until a stage begins; those of an epoch that was left can still be saved."""
        self._totals = {stage: totals for stage, totals in self._totals.items() if stage == "train"}
        self.to_send, self.stage, self.batch = {}, None, None

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool,
        logger: bool,
        on_step: bool | None,
        on_epoch: bool | None,
        reduce_fx: str,
        sync_dist: bool,
        batch_size: int | None,
    ) -> None:
        """See :meth:`fabric_lite.trainer.LightningModule.log`."""
        is_step = self.stage == "train" and self.batch is not None
        if self.stage is None:
            raise FabricRuntimeError("log() is for steps and the hooks around them.", given=f"log({name!r}, ...)")
        if reduce_fx not in _COMBINE:
            raise FabricValueError("An epoch has no such value.", given=f"{reduce_fx=}", fix=", ".join(_COMBINE))
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.detach()
        elif not isinstance(value, numbers.Real):
            fix = "value.compute(), and value.reset() after the epoch" if hasattr(value, "compute") else "value.mean()"
            raise FabricTypeError("A number is logged.", given=f"log({name!r}, {value!r:.60})", fix=fix)
        on_step = is_step if on_step is None else on_step
        on_epoch = not is_step if on_epoch is None else on_epoch
        if not on_step and not on_epoch:
            raise FabricValueError(
                "This value would go nowhere.", given=f"log({name!r}, {on_step=}, {on_epoch=})", fix="on_epoch=True"
            )
        name += self.suffix
        if on_epoch:
            totals, own = self._totals.setdefault(self.stage, {}), f"{name}_epoch" if on_step else name
            total = totals.setdefault(own, Total(name, reduce_fx, sync_dist, prog_bar, logger))
            total.add(value, _batch_size(self.batch) if batch_size is None else batch_size, self.window)
        if on_step:
            if sync_dist:
                value = self._fabric.all_reduce(torch.as_tensor(value, dtype=torch.float32), reduce_op=reduce_fx)
            own = f"{name}_step" if on_epoch else name
            self.latest[name] = self.latest[own] = self.of_step[own] = value
            if prog_bar:
                self.shown[own] = value
            if logger and self.stage == "train":
                self.to_send[own] = value

    def send(self, step: int) -> None:
        """Send what training steps have logged up to this step of the optimizer, if it is time to."""
        if self.to_send and step % self._every == 0:
            self._fabric.log_dict(self.to_send, step=step)
        self.to_send = {}

    def keep(self) -> None:
        """Let the totals of training steps be those of now until :meth:`restore`, also in a checkpoint."""
        self._kept = {name: dataclasses.replace(total) for name, total in self._totals.get("train", {}).items()}

    def restore(self) -> None:
        """Go on with the totals that were kept."""
        if self._kept is not None:
            self._totals["train"], self._kept = self._kept, None

    def end_epoch(self, step: int) -> dict[str, float]:
        """Put the values of the stage together, and send them with this step of the optimizer; every rank calls.

        Returns them by name.
        """
        totals = self._totals.pop(self.stage or "", {})
        results = self._results(totals)
        self.latest |= {total.name: results[name] for name, total in totals.items()} | results
        self.shown |= {name: value for name, value in results.items() if totals[name].prog_bar}
        sent = {name: value for name, value in results.items() if totals[name].logger}
        if sent:
            self._fabric.log_dict(sent, step=step)
        return results

    def _results(self, totals: Mapping[str, Total]) -> dict[str, float]:
        own = {name: (float(total.value), total.weight, total.sync_dist) for name, total in totals.items()}
        parts = [own]
        if any(total.sync_dist for total in totals.values()):  # all of them at once
            parts = [self._fabric.broadcast(own, src=rank) for rank in range(self._fabric.world_size)]
            shared = dict.fromkeys(name for part in parts for name, one in part.items() if one[2])
            if missing := [name for name in shared if any(name not in part for part in parts)]:
                raise FabricRuntimeError(
                    "With sync_dist=True a name is logged on every rank.",
                    given=f"{', '.join(missing)}, on some ranks only",
                    fix="log it on every rank in each epoch, or sync_dist=False",
                )
        return {
            name: total.result([part[name] for part in parts] if total.sync_dist else [own[name]])
            for name, total in totals.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The totals of a running epoch on each rank; every rank calls."""
        totals = self._totals.get("train", {}) if self._kept is None else self._kept
        found = {name: one.saved(self.window) for name, one in totals.items()}
        own = {name: one for name, one in found.items() if one is not None}
        latest = {name: float(value) for name, value in self.latest.items()}  # for what schedulers and savers watch
        return {
            "latest": latest,
            "totals": [self._fabric.broadcast(own, src=rank) for rank in range(self._fabric.world_size)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with them; with the totals at the world size at which they were saved."""
        self.latest |= state["latest"]
        if len(state["totals"]) == self._fabric.world_size:
            own = state["totals"][self._fabric.global_rank]
            self._totals["train"] = {name: Total(**fields) for name, fields in own.items()}


def _batch_size(batch: Any) -> int:
    """The length of the first tensor in a batch; 1 where there is none."""
    tensor = next(_tensors(batch), None)
    return 1 if tensor is None or tensor.dim() == 0 else tensor.size(0)


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    if dataclasses.is_dataclass(batch):
        batch = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)
