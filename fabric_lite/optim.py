"""Optimizers as they are: followed by torch's step hooks, parameters re-pointed after sharding.

No class is changed and no method replaced, so schedulers, closures and pickling stay torch's own.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from fabric_lite.adopt import HOLDER
from fabric_lite.errors import FabricValueError, StrategyError
from fabric_lite.loss_scaling import Hidden, LossScaler
from fabric_lite.parameters import mesh_of, parameters_of

__all__ = [
    "Former",
    "LossScaler",
    "check_belongs",
    "extend_optimizer",
    "former_parameters",
    "parameters_of",
    "release_optimizer",
    "repoint",
]


def check_belongs(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Raise if ``optimizer`` holds no parameter of ``module``.

    Raises:
        FabricValueError: It would step on nothing of this model; most likely another model's optimizer was given.
    """
    own = {id(parameter) for parameter in module.parameters()}
    if own and not any(id(parameter) in own for parameter in parameters_of(optimizer)):
        raise FabricValueError(
            f"The optimizer holds no parameter of the {type(module).__name__} that it is set up with.",
            given=f"{type(optimizer).__name__} with {len(parameters_of(optimizer))} parameters of other modules",
            fix="fabric.setup(model, optimizer_of_that_model), or fabric.setup_optimizers(optimizer)",
        )


Former: TypeAlias = Sequence[tuple["weakref.ref[torch.Tensor]", str]]


def former_parameters(named: Iterable[tuple[str, torch.Tensor]], module: nn.Module) -> Former:
    """Those of the parameters ``named`` that ``module`` has exchanged since (sharding makes new ones), held weakly."""
    current = {id(parameter) for parameter in module.parameters()}
    return [(weakref.ref(parameter), name) for name, parameter in named if id(parameter) not in current]


def repoint(optimizer: torch.optim.Optimizer, former: Former, module: nn.Module) -> None:
    """Replace parameters that ``module`` has exchanged by those that it has now, state included.

    Args:
        optimizer: Changed in place; its groups and their options stay.
        former: The parameters before the exchange, and their names in ``module``.
        module: The module after the exchange.
    """
    names = {id(parameter): name for reference, name in former if (parameter := reference()) is not None}
    if not names:
        return
    current = dict(module.named_parameters(remove_duplicate=False))
    for group in optimizer.param_groups:
        for position, old in enumerate(group["params"]):
            new = current.get(names.get(id(old), ""), old)
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
    before_step: Callable[..., None] | None = None,
    engine_step: Callable[[torch.optim.Optimizer], None] | None = None,
    after_step: Sequence[Callable[..., None]] = (),
) -> None:
    """Mark ``optimizer`` as set up and let others follow its steps; its state comes to its parameters' device.

    Args:
        optimizer: Its class and methods stay as they are.
        owner: The Fabric that sets it up.
        scaler: Unscales gradients and skips steps that overflowed.
        before_step: A pre-hook of ``step``, ahead of all others.
        engine_step: Called in place of torch's own step, which then finds no gradients.
        after_step: Post-hooks of ``step``, behind all others.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                state[key] = value.to(parameter.device)
    handles = [] if before_step is None else [optimizer.register_step_pre_hook(before_step)]
    if scaler is not None:
        scaler.attach(optimizer)
    if engine_step is not None:
        handles += _replace_step(optimizer, engine_step)
    # The innermost: what stands around a step sees the options as the user gave them.
    handles += _step_mixtures_one_by_one(optimizer)
    handles += [optimizer.register_step_post_hook(hook) for hook in after_step]
    # Not pickled: an optimizer's state is its state, its groups and its defaults.
    optimizer.__dict__[HOLDER] = OptimizerExtension(owner, handles)


def _step_mixtures_one_by_one(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Let torch's loop step on groups that hold plain tensors and DTensors; return the handles of the hooks.

    Its foreach kernels, which are the default on accelerators, refuse such a mixture; several meshes they take. The
    option is set for the length of a step, so that neither a checkpoint nor a release carries it away.

    Raises:
        StrategyError: Such a group was made with ``foreach=True`` or ``fused=True``.
    """
    if not any(_is_steppable_mixture(group) for group in optimizer.param_groups):
        return []
    changed: list[dict[str, Any]] = []

    def before(*_: Any) -> None:
        for group in optimizer.param_groups:
            if _is_steppable_mixture(group) and group["foreach"] is None:
                group["foreach"] = False
                changed.append(group)

    def after(*_: Any) -> None:
        for group in changed:
            group["foreach"] = None
        changed.clear()

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


def _is_steppable_mixture(group: Mapping[str, Any]) -> bool:
    """Whether the parameters of ``group`` are of two kinds, of which torch's loop can take one after the other."""
    # Nobody steps on a frozen weight of which setup has kept few bits elsewhere: it is empty, and never laid out.
    steppable = [parameter for parameter in group["params"] if parameter.requires_grad or parameter.numel()]
    if "foreach" not in group or len({mesh_of(parameter) is None for parameter in steppable}) < 2:
        return False
    asked = [name for name in ("foreach", "fused") if group.get(name)]
    if asked:
        raise StrategyError(
            f"{asked[0]}=True steps on all parameters of a group at once, which torch cannot do with plain tensors "
            "beside DTensors.",
            given=f"{asked[0]}=True for a group of parameters of which only some are laid out over ranks",
            fix=f"leave {asked[0]} out, or make one group of parameters for each kind",
        )
    return True


def _replace_step(optimizer: torch.optim.Optimizer, engine_step: Callable[[torch.optim.Optimizer], None]) -> list[Any]:
    """By hooks, since a scheduler made earlier would go around an exchanged method."""
    hidden: list[Hidden] = []

    def before(_: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        # Torch would run a closure inside its step, and then find the gradients that it made.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        result = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            result = (args[0], lambda: loss), {key: value for key, value in kwargs.items() if key != "closure"}
        if any(parameter.grad is not None for parameter in parameters_of(optimizer)):
            hidden.clear()  # left by a step that raised; nested steps find no gradients
        hidden.append(Hidden.of(optimizer))
        return result

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
