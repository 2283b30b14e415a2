"""What ``setup`` does: lays models out as the strategy says, and lets others follow the steps of optimizers."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fabric_lite.adopt import extension_of
from fabric_lite.clearing import extend_zero_grad
from fabric_lite.data import Window
from fabric_lite.deferred import values_of
from fabric_lite.extension import ModuleExtension
from fabric_lite.guards import SynchronizationGuard
from fabric_lite.hooks import call_hook, has_hook
from fabric_lite.init import place
from fabric_lite.loss_scaling import LossScaler
from fabric_lite.optim import extend_optimizer, former_parameters, repoint
from fabric_lite.parameters import carry_over, check_exchangeable, parameters_of
from fabric_lite.registry import Registry
from fabric_lite.route import check_module, compiled_from, extend_module
from fabric_lite.run import Run
from fabric_lite.steps import Steps
from fabric_lite.strategies import Placement, Strategy

__all__ = ["Setup"]


@dataclasses.dataclass(frozen=True)
class Setup:
    """One Fabric's way of setting things up; each call checks all before it changes anything.

    Args:
        owner: The Fabric, as it stands in the extension of each object.
        run: Device, precision and strategy.
        scaler: Of a precision that scales the loss.
        callbacks: Told of every module that was set up and of every step.
        registry: Remembers what was set up.
        steps: Counts those of the first optimizer.
        window: The gradients that wait for a step.
    """

    owner: Any
    run: Run
    scaler: LossScaler | None
    callbacks: tuple[Any, ...]
    registry: Registry
    steps: Steps
    window: Window

    def lay_out(
        self, module: nn.Module, optimizers: Sequence[Optimizer], placement: Placement, move_to_device: bool
    ) -> None:
        """Lay ``module`` out over the ranks, extend it in place, and point its optimizers at its new parameters."""
        check_module(module)
        strategy, precision = self.run.strategy, self.run.precision
        values = values_of(module)
        fill = None if values is None else functools.partial(values.fill, module)
        if move_to_device and (not strategy.is_sharded or fill is None):
            strategy.materialize(module, placement, fill)
        # A sharded model comes to its device in wrap, block by block: it need not fit there as a whole.
        moves = move_to_device and not strategy.is_sharded
        # First, so that a weight of few bits need not fit on the device as a whole.
        converted = () if precision.convert is None else precision.convert(module) or ()
        named = list(module.named_parameters(remove_duplicate=False))
        extension = ModuleExtension(self.owner, placement.device.type, precision)
        # A compiled module is a shell: the hooks that shard belong on the module inside.
        inside = (compiled_from(module) if strategy.is_sharded else None) or module
        try:
            place(module, placement.device if moves else None, precision.param_dtype)
            if strategy.is_sharded:
                check_exchangeable(named)
            engine = strategy.wrap(inside, optimizers, extension.run, placement)
        except BaseException:
            for handle in converted:  # a later setup, in another precision, would go on with changed layers
                handle.remove()
            raise
        if strategy.is_sharded and fill is not None:
            strategy.materialize(module, placement, fill)
        extension.engine, extension.hooked, extension.reset = engine.module, engine.hooked, engine.reset
        extension.gathers, extension.is_copyable = engine.gathers, engine.is_copyable
        extension.frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        extend_module(module, extension)
        # Also those that are not given here: of setup_optimizers(), or of several models.
        extension.former = former_parameters(named, module)
        current = dict(module.named_parameters(remove_duplicate=False))
        for old, new in {id(old): (old, current[name]) for name, old in named}.values():
            if new is not old:
                carry_over(old, new)
        for optimizer in dict.fromkeys([*optimizers, *self.registry.optimizers()]):  # in one order on all ranks
            repoint(optimizer, extension.former, module)
        hides = engine.hooked or (engine.module is not None and strategy.hides_gradients)
        extension.handles += [
            *converted,
            *engine.handles,
            *self._hooks({id(inside): inside, id(module): module}, hides),
        ]
        self.registry.add(module)
        call_hook(self.callbacks, "on_after_setup", fabric=self.owner, module=module)

    def attach(self, optimizer: Optimizer) -> None:
        """Point the optimizer at the parameters that its models have now, and let all others follow its steps."""
        for module in self.registry.modules():
            repoint(optimizer, extension_of(module).former, module)

        def after_step(stepped: Optimizer, *_: Any) -> None:
            strategy = self.run.strategy
            call_hook(
                self.callbacks, "on_after_optimizer_step", strategy=strategy, optimizer=stepped, fabric=self.owner
            )

        wanted = after_step if has_hook(self.callbacks, "on_after_optimizer_step") else None
        strategy = self.run.strategy
        ends = None if type(strategy).after_step is Strategy.after_step else lambda one, *_: strategy.after_step(one)
        followers = (self.window.follow(optimizer), self.steps.follow(optimizer), ends, wanted)
        hooks = [hook for hook in followers if hook is not None]
        engine_step = strategy.step if strategy.owns_step else None
        # With several ranks, gradients that no engine has seen would let the ranks drift apart; and parts of a sharded
        # model that a forward without gradients has gathered would go on with the values from before the step.
        several = self.run.topology.world_size > 1 or strategy.is_sharded
        guard = SynchronizationGuard(self.registry.modules) if several else None
        extend_optimizer(optimizer, self.owner, self.scaler, guard, engine_step, hooks)
        extension_of(optimizer).handles.append(_Forgotten(self.window, optimizer))
        if strategy.hides_gradients:
            extension_of(optimizer).handles.append(extend_zero_grad(optimizer, self._forget_unsynchronized))
        self.registry.add(optimizer)
        call_hook(self.callbacks, "on_after_setup_optimizer", fabric=self.owner, optimizer=optimizer)

    def _hooks(self, modules: dict[int, nn.Module], hides_gradients: bool) -> list[Any]:
        """What is removed again when the module, or a compiled module and the one inside, is released."""
        handles: list[Any] = []
        if hides_gradients:
            handles += [extend_zero_grad(module, self._forget_all) for module in modules.values()]
        if self.scaler is not None:
            check = self.scaler.check_plain_backward
            parameters = next(iter(modules.values())).parameters()
            trainable = [parameter for parameter in parameters if parameter.requires_grad]
            handles += [parameter.register_post_accumulate_grad_hook(check) for parameter in trainable]
        return handles

    def _forget_all(self, module: nn.Module) -> None:
        self.run.strategy.forget_unsynchronized(module)
        extension_of(module).waits = False

    def _forget_unsynchronized(self, optimizer: Optimizer) -> None:
        parameters = {id(parameter) for parameter in parameters_of(optimizer)}
        for module in self.registry.modules():
            self.run.strategy.forget_unsynchronized(module, parameters)
            if any(id(parameter) in parameters for parameter in module.parameters()):
                extension_of(module).waits = False


class _Forgotten:
    """A handle whose removal tells the window that an optimizer's steps are not seen any more."""

    def __init__(self, window: Window, optimizer: Optimizer) -> None:
        self._window = window
        self._optimizer = weakref.ref(optimizer)

    def remove(self) -> None:
        """Called when the optimizer is released."""
        optimizer = self._optimizer()
        if optimizer is not None:
            self._window.forget(optimizer)
