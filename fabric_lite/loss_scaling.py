"""Loss scaling on torch's step hooks."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fabric_lite.errors import FabricRuntimeError, FabricTypeError, FabricValueError
from fabric_lite.parameters import local_part, local_stand_ins, mesh_of, parameters_of, reduced

__all__ = ["Hidden", "LossScaler"]


class LossScaler:
    """One ``torch.amp.GradScaler`` for all optimizers of a run, driven by their step hooks.

    The user writes ``fabric.backward(loss)`` and ``optimizer.step()``. Gradients are unscaled before the step or
    before clipping, whichever comes first; a step on overflowed gradients does nothing. The scale changes only at
    the start of a backward at which no optimizer still holds scaled gradients that it has neither stepped on nor
    cleared, so two optimizers with one iteration between them make one update.

    With DTensors among the parameters, an overflow on one rank skips the step on all, whatever the layouts; every rank
    then calls ``step``, ``unscale`` and ``backward``.

    Args:
        device_type: Device type of the gradients.
    """

    def __init__(self, device_type: str) -> None:
        self._scaler = torch.amp.GradScaler(device_type)
        self._watches: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Watch] = weakref.WeakKeyDictionary()
        self._in_backward = False

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let ``optimizer.step()`` unscale, check for overflow, and skip."""
        watch = self._watches[optimizer] = _Watch(weakref.ref(optimizer))
        watch.handles = [
            optimizer.register_step_pre_hook(lambda _, args, kwargs: self._before_step(watch, args, kwargs)),
            optimizer.register_step_post_hook(lambda *_: watch.after_step()),
        ]

    def detach(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the hooks off again."""
        for handle in self._watches.pop(optimizer).handles:
            handle.remove()

    def backward(self, loss: torch.Tensor, run: Callable[[torch.Tensor], None]) -> None:
        """Call ``run`` with ``loss`` times the scale, after the update that is due.

        Raises:
            FabricRuntimeError: It added scaled gradients onto those that were unscaled for clipping.
        """
        self._update_if_due()
        unscaled = {watch: watch.versions() for watch in self._watches.values() if watch.unscaled}
        self._in_backward = True
        try:
            run(self._scaler.scale(loss))
        finally:
            self._in_backward = False
        if any(watch.versions() != before for watch, before in unscaled.items()):
            raise FabricRuntimeError(
                "Gradients were added to gradients that are clipped already.",
                given="fabric.clip_gradients(), then another fabric.backward() before optimizer.step()",
                fix="clip once, after the last backward of the window; zero_grad() gives a window up",
            )

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, once per step; for clipping.

        Raises:
            FabricValueError: The optimizer was not set up, so its step would know nothing of the scale.
        """
        watch = self._watches.get(optimizer)
        if watch is None:
            raise FabricValueError(
                f"This {type(optimizer).__name__} was not set up, and the precision scales the loss.",
                given="clip_gradients() in precision 16-mixed",
                fix="model, optimizer = fabric.setup(model, optimizer)",
            )
        if not watch.unscaled and watch.holds_gradients():
            self._scaler.unscale_(watch.fresh_recorder())  # type: ignore[arg-type]
            watch.unscaled = True

    def check_plain_backward(self, _: torch.Tensor) -> None:
        """A hook for parameters that have just received a gradient: raises when the loss was not scaled."""
        if not self._in_backward:
            raise FabricRuntimeError(
                "loss.backward() was called in a precision that scales the loss, so gradients would be wrong.",
                given="precision 16-mixed",
                fix="fabric.backward(loss)",
            )

    def state_dict(self) -> dict[str, Any]:
        """The scale and its growth counter, after the update that is due."""
        self._update_if_due()
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a scale; what was going on until now makes no update of it."""
        for watch in self._watches.values():
            watch.begin_anew()
        self._scaler.load_state_dict(state)

    def _before_step(self, watch: _Watch, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if kwargs.get("closure") is not None or any(callable(argument) for argument in args[1:]):
            raise FabricTypeError(
                "A closure cannot be used with loss scaling: it would run backward on an unscaled loss.",
                given=f"{type(args[0]).__name__}.step(closure) in precision 16-mixed",
                fix="call fabric.backward(loss) and optimizer.step() without a closure, or use bf16-mixed",
            )
        watch.depth += 1
        if watch.depth > 1 or not watch.holds_gradients():
            return
        recorder = watch.recorder if watch.unscaled else watch.fresh_recorder()
        self._scaler.step(recorder)  # type: ignore[arg-type]
        if watch.is_laid_out():
            recorder = watch.verdict(recorder)
            self._scaler.step(recorder)  # type: ignore[arg-type]
        watch.stepped = True
        if not recorder.may_step:
            watch.overflowed = True
            watch.hidden = Hidden.of(args[0])

    def _update_if_due(self) -> None:
        watches = list(self._watches.values())
        for watch in watches:
            watch.recover()
        stepped = {id(parameter) for watch in watches if watch.stepped for parameter in watch.parameters()}
        if not stepped:
            return
        waiting = [parameter for watch in watches if not watch.stepped for parameter in watch.waiting(stepped)]
        overflowed = any(watch.overflowed for watch in watches)
        if not overflowed and _any_gradient(waiting):
            return
        before = self._scaler.get_scale()
        self._scaler.update()
        for parameter in waiting:
            # Else one optimizer that is not stepped on for long would keep a scale at which nothing trains.
            local_part(parameter.grad).mul_(self._scaler.get_scale() / before)  # type: ignore[arg-type]
        for watch in watches:
            if watch.stepped or not watch.unscaled:
                watch.begin_anew()


class _StepRecorder:
    """Stands for the optimizer in ``GradScaler.step``, which calls ``step`` only if all gradients are finite.

    Args:
        groups: Returns the ``param_groups``.
    """

    def __init__(self, groups: Callable[[], list[dict[str, Any]]]) -> None:
        self._groups = groups
        self.may_step = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._groups()

    def step(self) -> None:
        self.may_step = True


def _any_gradient(parameters: Sequence[torch.Tensor]) -> bool:
    """Whether any element of the gradients is not zero, on any rank if any of ``parameters`` is laid out."""
    found = any(bool(local_part(p.grad).any()) for p in parameters if p.grad is not None)
    if not any(mesh_of(parameter) is not None for parameter in parameters):
        return found
    flag = torch.full((), float(found), device=local_part(parameters[0]).device)
    return bool(reduced(flag, parameters, dist.ReduceOp.MAX))


@dataclasses.dataclass(eq=False)
class _Watch:
    """Where one optimizer stands between two updates of the scale."""

    optimizer: weakref.ref[torch.optim.Optimizer]
    handles: list[Any] = dataclasses.field(default_factory=list)
    # GradScaler knows optimizers by id: used recorders stay alive until the update.
    recorders: list[_StepRecorder] = dataclasses.field(default_factory=list)
    depth: int = 0  # a subclass that calls super().step() fires the hooks twice
    stepped: bool = False
    overflowed: bool = False
    unscaled: bool = False
    hidden: Hidden | None = None

    @property
    def recorder(self) -> _StepRecorder:
        return self.recorders[-1]

    def fresh_recorder(self) -> _StepRecorder:
        """A stand-in that GradScaler has not seen: it allows each of them one step between two updates."""
        self.recorders.append(_StepRecorder(self._groups))
        return self.recorder

    def verdict(self, own: _StepRecorder) -> _StepRecorder:
        """A stand-in whose one gradient overflows if ``own`` found an overflow on any rank; every rank calls.

        So GradScaler backs off on all of them alike. What it makes of DTensors itself looks only at the layout of the
        first, and agrees only along that one's mesh.
        """
        parameters = self.parameters()
        flag = torch.full((), 0.0 if own.may_step else math.inf, device=local_part(parameters[0]).device)
        flag = reduced(flag, parameters, dist.ReduceOp.MAX)
        stand_in = flag.detach()
        stand_in.grad = flag
        self.recorders.append(_StepRecorder(lambda: [{"params": [stand_in]}]))
        return self.recorder

    def is_laid_out(self) -> bool:
        return any(mesh_of(parameter) is not None for parameter in self.parameters())

    def _groups(self) -> list[dict[str, Any]]:
        optimizer = self.optimizer()
        if optimizer is None or not self.is_laid_out():
            return [] if optimizer is None else optimizer.param_groups
        return [{"params": local_stand_ins(self.parameters())}]

    def begin_anew(self) -> None:
        self.recorders.clear()
        self.stepped = self.overflowed = self.unscaled = False

    def parameters(self) -> list[torch.Tensor]:
        optimizer = self.optimizer()
        return [] if optimizer is None else parameters_of(optimizer)

    def holds_gradients(self) -> bool:
        return any(parameter.grad is not None for parameter in self.parameters())

    def waiting(self, stepped: set[int]) -> list[torch.Tensor]:
        """The parameters with scaled gradients that were not stepped on; those that are all zero count as cleared."""
        if self.unscaled:
            return []
        return [p for p in self.parameters() if p.grad is not None and id(p) not in stepped]

    def versions(self) -> list[int]:
        """A number for each gradient that changes when something is added to it."""
        return [-1 if parameter.grad is None else parameter.grad._version for parameter in self.parameters()]

    def after_step(self) -> None:
        self.depth -= 1
        optimizer = self.optimizer()
        if self.depth == 0 and optimizer is not None:
            self.unscaled = False
            if self.hidden is not None:
                self.hidden.restore(optimizer)
            self.hidden = None

    def recover(self) -> None:
        """Before a backward: forget a step that raised, and a window that was given up after clipping."""
        self.depth = 0
        self.hidden = None  # its gradients overflowed
        if self.unscaled and not _any_gradient(self.parameters()):
            self.unscaled = False


@dataclasses.dataclass(frozen=True)
class Hidden:
    """What a skipped step may not see or change: gradients, and the counters that some optimizers keep in groups."""

    gradients: list[tuple[torch.Tensor, torch.Tensor | None]]
    groups: list[dict[str, Any]]

    @staticmethod
    def of(optimizer: torch.optim.Optimizer) -> Hidden:
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        parameters = parameters_of(optimizer)
        gradients = [(parameter, parameter.grad) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        return Hidden(gradients, groups)

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        for group, options in zip(optimizer.param_groups, self.groups, strict=True):
            parameters = group["params"]
            group.clear()
            group.update({"params": parameters, **options})
