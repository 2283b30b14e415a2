"""Optimizers as they are: loss scaling on torch's step hooks, parameters re-pointed after sharding.

No class is changed and no method replaced, so schedulers, closures and pickling stay torch's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fabric_lite.adopt import HOLDER
from fabric_lite.errors import FabricRuntimeError, FabricTypeError

__all__ = ["LossScaler", "extend_optimizer", "parameters_of", "release_optimizer", "repoint"]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return all parameters of ``optimizer``, group by group."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def repoint(optimizer: torch.optim.Optimizer, old_names: Mapping[int, str], module: nn.Module) -> None:
    """Replace parameters that ``module`` has exchanged (sharding makes new ones), state included.

    Args:
        optimizer: Changed in place; its groups and their options stay.
        old_names: ``id`` of each parameter before the exchange, and its name in ``module``.
        module: The module after the exchange.
    """
    current = dict(module.named_parameters(remove_duplicate=False))
    for group in optimizer.param_groups:
        for position, old in enumerate(group["params"]):
            new = current.get(old_names.get(id(old), ""), old)
            if new is not old:
                group["params"][position] = new
                if old in optimizer.state:
                    state = optimizer.state.pop(old)
                    optimizer.state[new] = {key: _laid_out_like(value, old, new) for key, value in state.items()}


def _laid_out_like(value: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    """Per-element optimizer state gets the new parameter's sharding; counters and scalars stay."""
    if not isinstance(value, torch.Tensor) or value.shape != old.shape or value.dim() == 0:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    return distribute_tensor(value, new.device_mesh, new.placements) if isinstance(new, DTensor) else value


@dataclasses.dataclass
class OptimizerExtension:
    """All that ``setup`` adds to an optimizer: a mark, and the handles of its step hooks."""

    owner: Any
    handles: list[Any]


def extend_optimizer(
    optimizer: torch.optim.Optimizer,
    owner: Any,
    scaler: LossScaler | None,
    engine_step: Callable[[torch.optim.Optimizer], None] | None = None,
    after_step: Callable[..., None] | None = None,
) -> None:
    """Mark ``optimizer`` as set up and let others follow its steps; its state comes to its parameters' device.

    Args:
        optimizer: Its class and methods stay as they are.
        owner: The Fabric that sets it up.
        scaler: Unscales gradients and skips steps that overflowed.
        engine_step: Called in place of torch's own step, which then finds no gradients.
        after_step: A post-hook of ``step``.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                state[key] = value.to(parameter.device)
    if scaler is not None:
        scaler.attach(optimizer)
    handles = [] if engine_step is None else _replace_step(optimizer, engine_step)
    if after_step is not None:
        handles.append(optimizer.register_step_post_hook(after_step))
    # Not pickled: an optimizer's state is its state, its groups and its defaults.
    optimizer.__dict__[HOLDER] = OptimizerExtension(owner, handles)


def _replace_step(optimizer: torch.optim.Optimizer, engine_step: Callable[[torch.optim.Optimizer], None]) -> list[Any]:
    """By hooks, since a scheduler made earlier would go around an exchanged method."""
    hidden: list[_Hidden] = []

    def before(*_: Any) -> None:
        hidden.append(_Hidden.of(optimizer))

    def after(*_: Any) -> None:
        hidden.pop().restore(optimizer)
        if not hidden:  # the outermost of nested steps
            engine_step(optimizer)

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


def release_optimizer(optimizer: torch.optim.Optimizer, scaler: LossScaler | None) -> None:
    """Take everything off that :func:`extend_optimizer` added."""
    extension: OptimizerExtension = optimizer.__dict__.pop(HOLDER)
    for handle in extension.handles:
        handle.remove()
    if scaler is not None:
        scaler.detach(optimizer)


class LossScaler:
    """One ``torch.amp.GradScaler`` for all optimizers of a run, driven by their step hooks.

    The user writes ``fabric.backward(loss)`` and ``optimizer.step()``. Gradients are unscaled before the step or
    before clipping, whichever comes first; a step on overflowed gradients does nothing. The scale changes only at
    the start of a backward at which no optimizer still holds scaled gradients that it has neither stepped on nor
    cleared, so two optimizers with one iteration between them make one update.

    Args:
        device_type: Device type of the gradients.
    """

    def __init__(self, device_type: str) -> None:
        self._scaler = torch.amp.GradScaler(device_type)
        self._watches: dict[int, _Watch] = {}
        self._in_backward = False

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let ``optimizer.step()`` unscale, check for overflow, and skip."""
        watch = self._watches[id(optimizer)] = _Watch(optimizer)
        watch.handles = [
            optimizer.register_step_pre_hook(lambda _, args, kwargs: self._before_step(watch, args, kwargs)),
            optimizer.register_step_post_hook(lambda *_: watch.after_step()),
        ]

    def detach(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the hooks off again."""
        for handle in self._watches.pop(id(optimizer)).handles:
            handle.remove()

    @property
    def scale_value(self) -> float:
        """The factor on the loss."""
        return self._scaler.get_scale()

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Return ``loss`` times the scale, after the update that is due."""
        self._update_if_due()
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, once per step; for clipping."""
        watch = self._watches.get(id(optimizer))
        if watch is not None and not watch.unscaled and watch.holds_gradients():
            watch.renew_recorder()
            self._scaler.unscale_(watch.recorder)  # type: ignore[arg-type]
            watch.unscaled = True

    def check_plain_backward(self, _: torch.Tensor) -> None:
        """A tensor hook on the model's outputs: raises when gradients arrive that were not scaled."""
        if not self._in_backward:
            raise FabricRuntimeError(
                "loss.backward() was called in a precision that scales the loss, so gradients would be wrong.",
                given="precision 16-mixed",
                fix="fabric.backward(loss)",
            )

    def __enter__(self) -> None:
        self._in_backward = True

    def __exit__(self, *_: object) -> None:
        self._in_backward = False

    def state_dict(self) -> dict[str, Any]:
        """The scale and its growth counter, after the update that is due."""
        self._update_if_due()
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scaler.load_state_dict(state)

    def _before_step(self, watch: _Watch, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
        if kwargs.get("closure") is not None or any(callable(argument) for argument in list(args)[1:]):
            raise FabricTypeError(
                "A closure cannot be used with loss scaling: it would run backward on an unscaled loss.",
                given=f"{type(watch.optimizer).__name__}.step(closure) in precision 16-mixed",
                fix="call fabric.backward(loss) and optimizer.step() without a closure, or use bf16-mixed",
            )
        watch.depth += 1
        if watch.depth > 1 or not watch.holds_gradients():
            return
        watch.renew_recorder()
        self._scaler.step(watch.recorder)  # type: ignore[arg-type]
        watch.stepped = True
        if not watch.recorder.may_step:
            watch.hide_gradients()

    def _update_if_due(self) -> None:
        watches = self._watches.values()
        for watch in watches:
            watch.recover()
        waiting = any(watch.holds_gradients() for watch in watches if not watch.stepped)
        if waiting or not any(watch.stepped for watch in watches):
            return
        self._scaler.update()
        for watch in watches:
            watch.begin_anew()


class _StepRecorder:
    """Stands for the optimizer in ``GradScaler.step``, which calls ``step`` only if all gradients are finite."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.may_step = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def step(self) -> None:
        self.may_step = True


@dataclasses.dataclass(eq=False)
class _Watch:
    """Where one optimizer stands between two updates of the scale."""

    optimizer: torch.optim.Optimizer
    handles: list[Any] = dataclasses.field(default_factory=list)
    # GradScaler knows optimizers by id: used recorders stay alive until the update.
    recorders: list[_StepRecorder] = dataclasses.field(default_factory=list)
    depth: int = 0  # a subclass that calls super().step() fires the hooks twice
    stepped: bool = False
    unscaled: bool = False
    hidden: _Hidden | None = None

    @property
    def recorder(self) -> _StepRecorder:
        return self.recorders[-1]

    def renew_recorder(self) -> None:
        """A second step before the update needs a new stand-in: GradScaler allows each one step."""
        if not self.recorders or (self.stepped and not self.unscaled):
            self.recorders.append(_StepRecorder(self.optimizer))

    def begin_anew(self) -> None:
        self.recorders.clear()
        self.stepped = self.unscaled = False

    def holds_gradients(self) -> bool:
        return any(parameter.grad is not None for parameter in parameters_of(self.optimizer))

    def hide_gradients(self) -> None:
        """Let the step that follows find no gradients, so that torch's optimizers do nothing."""
        self.hidden = _Hidden.of(self.optimizer)

    def after_step(self) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.unscaled = False
            if self.hidden is not None:
                self.hidden.restore(self.optimizer)
            self.hidden = None

    def recover(self) -> None:
        """After a step that raised: its gradients, hidden because they overflowed, are gone for good."""
        self.depth = 0
        self.hidden = None


@dataclasses.dataclass(frozen=True)
class _Hidden:
    """What a skipped step may not see or change: gradients, and the counters that some optimizers keep in groups."""

    gradients: list[tuple[torch.Tensor, torch.Tensor | None]]
    groups: list[dict[str, Any]]

    @staticmethod
    def of(optimizer: torch.optim.Optimizer) -> _Hidden:
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        parameters = parameters_of(optimizer)
        gradients = [(parameter, parameter.grad) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        return _Hidden(gradients, groups)

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        for group, options in zip(optimizer.param_groups, self.groups, strict=True):
            parameters = group["params"]
            group.clear()
            group.update({"params": parameters, **options})
