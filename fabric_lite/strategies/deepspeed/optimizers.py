"""The optimizer that DeepSpeed steps: a copy of the user's, over the parts, that follows the user's options."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch.optim import Optimizer

from fabric_lite.errors import StrategyError

__all__ = ["Trained", "follow_options", "from_inner", "inner_optimizer", "to_inner", "trained_of"]

# Their steps need whole parameters, or all of them at once; and DeepSpeed makes Adagrad anew, without its groups.
_NOT_BY_ELEMENT = {"Adafactor", "Adagrad", "LBFGS", "Muon", "SparseAdam"}
_OF_TORCH = {"defaults", "state", "param_groups"}


@dataclasses.dataclass(frozen=True)
class Trained:
    """What of an optimizer is trained at setup, since DeepSpeed lays out nothing else, neither then nor later.

    Args:
        groups: The numbers of the groups that hold any of it, which the inner optimizer's stand for, in this order.
        parameters: By their ``id``.
    """

    groups: tuple[int, ...]
    parameters: frozenset[int]


def trained_of(optimizer: Optimizer) -> Trained:
    """What of ``optimizer`` is trained now."""
    found = [_trained_in(group) for group in optimizer.param_groups]
    groups = tuple(number for number, parameters in enumerate(found) if parameters)
    return Trained(groups, frozenset(id(parameter) for parameters in found for parameter in parameters))


def _trained_in(group: dict[str, Any]) -> list[torch.Tensor]:
    return [parameter for parameter in group["params"] if parameter.requires_grad]


def inner_optimizer(optimizer: Optimizer, offload: bool) -> Optimizer:
    """Return an optimizer of the same kind and options, over the trainable parameters of ``optimizer``.

    Args:
        optimizer: The user's; it stays as it is.
        offload: Whether the step is made on the CPU, where DeepSpeed has an Adam of its own.

    Raises:
        StrategyError: Its step does not work element by element.
    """
    kind = type(optimizer)
    if kind.__name__ in _NOT_BY_ELEMENT and kind.__module__.startswith("torch.optim"):
        raise StrategyError(
            f"{kind.__name__} cannot step on parts of parameters, flat and side by side, as DeepSpeed lays them out.",
            given=f"setup(model, {kind.__name__}) under DeepSpeedStrategy",
            fix="an optimizer that works element by element, such as AdamW; or FSDPStrategy",
        )
    groups = [{**group, "params": trained} for group in optimizer.param_groups if (trained := _trained_in(group))]
    if kind.__name__ == "DeepSpeedCPUAdam" or (offload and _is_plain_adam(optimizer)):
        return _cpu_adam(optimizer, groups)
    inner = copy.copy(optimizer)  # torch's own state alone, no hooks
    for name, value in vars(optimizer).items():
        # Not a scheduler's or Fabric's, which stand for a method of the class.
        if name not in vars(inner) and name not in _OF_TORCH and not name.startswith("_") and not hasattr(kind, name):
            setattr(inner, name, value)
    inner.state = type(optimizer.state)(optimizer.state.default_factory)
    inner.param_groups = groups
    return inner


def follow_options(inner: Optimizer, optimizer: Optimizer, trained: Trained) -> None:
    """Give the groups of ``inner`` the options that those of ``optimizer`` have now; schedulers change them.

    A group that is frozen meanwhile has no learning rate: its gradients are zeros, but weight decay and momentum would
    move it.

    Args:
        inner: What DeepSpeed steps.
        optimizer: The user's.
        trained: What it trained at setup.

    Raises:
        StrategyError: It trains something else too now, or has lost a group.
    """
    sources = optimizer.param_groups
    new = {
        number: parameters
        for number, group in enumerate(sources)
        if (parameters := [one for one in _trained_in(group) if id(one) not in trained.parameters])
    }
    if new:
        raise StrategyError(
            "The optimizer trains what was frozen or not in it at setup, and so has not been laid out by DeepSpeed.",
            given=f"{sum(map(len, new.values()))} parameters, in group {', '.join(map(str, new))} of {len(sources)}",
            fix="setup while they are all trained, and requires_grad_(False) after it for those that begin later",
        )
    if max(trained.groups) >= len(sources):
        raise StrategyError(
            "The optimizer has lost groups since setup, and DeepSpeed steps on them still.",
            given=f"{len(sources)} groups, of which number {max(trained.groups)} was trained at setup",
            fix="requires_grad_(False) for a group that is to be left out",
        )
    for group, number in zip(inner.param_groups, trained.groups, strict=True):
        source = sources[number]
        group.update({key: value for key, value in source.items() if key in group and key != "params"})
        if not _trained_in(source):
            group["lr"] = source["lr"] * 0


def from_inner(inner: Optimizer, name: str, value: Any) -> Any:
    """A plain value of the state of ``inner``, as the user's optimizer has it."""
    if name == "step" and isinstance(value, int) and _is_cpu_adam(inner):
        return torch.tensor(float(value))
    return value.clone() if isinstance(value, torch.Tensor) else value


def to_inner(inner: Optimizer, name: str, value: Any) -> Any:
    """A plain value of the user's optimizer, as ``inner`` has it."""
    if name == "step" and _is_cpu_adam(inner):
        return int(value)
    return value.clone() if isinstance(value, torch.Tensor) else value


def _is_plain_adam(optimizer: Optimizer) -> bool:
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and not any(
        group["amsgrad"] or group["maximize"] for group in optimizer.param_groups
    )


def _is_cpu_adam(optimizer: Optimizer) -> bool:
    return type(optimizer).__name__ == "DeepSpeedCPUAdam"


def _cpu_adam(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    names = ("params", "lr", "betas", "eps", "weight_decay", "bias_correction")
    first = optimizer.param_groups[0]
    adamw = getattr(optimizer, "adam_w_mode", first.get("decoupled_weight_decay", True))
    kept = [{name: group[name] for name in names if name in group} for group in groups]
    return DeepSpeedCPUAdam(kept, adamw_mode=adamw)
