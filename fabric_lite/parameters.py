"""The parameters of an optimizer: plain tensors, or DTensors, each laid out over a mesh of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fabric_lite.errors import StrategyError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "carry_over",
    "check_exchangeable",
    "local_part",
    "local_stand_ins",
    "mesh_of",
    "parameters_of",
    "reduced",
    "settle_gradient",
]

_PLAIN = (torch.nn.Parameter, torch.Tensor)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return all parameters of ``optimizer``, group by group."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_exchangeable(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise unless the parameters ``named`` can be exchanged for shards without a loss; nothing is changed.

    Raises:
        StrategyError: One has a gradient already, or a hook that autograd would call with the whole gradient.
    """
    for name, parameter in named:
        if parameter.grad is not None and not parameter.grad.is_meta and parameter.grad.any():
            raise StrategyError(
                "Gradients from before setup cannot be taken over into shards.",
                given=f"a gradient of {name}",
                fix="setup() first, or zero_grad() before it",
            )
        if getattr(parameter, "_backward_hooks", None):
            raise StrategyError(
                "A hook on a parameter's gradient would not be called any more: no rank has the whole gradient.",
                given=f"{name}.register_hook(...)",
                fix=f"{name}.register_post_accumulate_grad_hook(...), which is given the shard",
            )


def carry_over(old: torch.Tensor, new: torch.Tensor) -> None:
    """Give ``new``, which takes the place of ``old``, its attributes and the hooks for its accumulated gradient."""
    new.__dict__.update(old.__dict__)
    for hook in (getattr(old, "_post_accumulate_grad_hooks", None) or {}).values():
        new.register_post_accumulate_grad_hook(hook)


def mesh_of(tensor: torch.Tensor) -> DeviceMesh | None:
    """Return the mesh over which ``tensor`` is laid out; None for a plain one."""
    # No isinstance: DTensor's module takes longer to import than a process without DTensors would forgive.
    return None if type(tensor) in _PLAIN else getattr(tensor, "device_mesh", None)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of ``tensor``: a plain tensor over the same memory, without a history."""
    if mesh_of(tensor) is None:
        return tensor.detach()
    with torch.no_grad():
        part: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def local_stand_ins(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return for each parameter that has a gradient a plain tensor with this rank's part of it as its ``grad``.

    What is done to the gradients in place is done to those of the parameters. Plain parameters stand for themselves.
    So torch's functions over gradients take any mixture of layouts, of which their foreach kernels take none. All ranks
    of the parameters' meshes call.
    """
    found = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if mesh_of(parameter) is None:
            found.append(parameter)
        else:
            settle_gradient(parameter)
            part = local_part(parameter.grad)
            stand_in = part.detach()
            stand_in.grad = part
            found.append(stand_in)
    return found


@torch.no_grad()
def settle_gradient(parameter: torch.Tensor) -> None:
    """Lay the gradient of ``parameter`` out as the parameter is; all ranks of its mesh call.

    Autograd leaves the gradients of replicated parameters as sums that are still to be made where activations are
    sharded (sequence parallelism). A norm of such parts, or a value clipped in them, would be wrong.
    """
    gradient: Any = parameter.grad
    if gradient is not None and mesh_of(gradient) is not None:
        placements = parameter.placements  # type: ignore[attr-defined]
        if gradient.placements != placements:
            parameter.grad = gradient.redistribute(placements=placements)


def reduced(
    value: torch.Tensor, parameters: Sequence[torch.Tensor], operation: dist.ReduceOp.RedOpType
) -> torch.Tensor:
    """Return ``value`` reduced over all ranks, where any of ``parameters`` is laid out; else as it is.

    Every rank calls it with the same parameters. Ranks of one replica hold equal plain tensors, so without DTensors
    there is nothing to agree on.
    """
    mesh = next((mesh for mesh in map(mesh_of, parameters) if mesh is not None), None)
    if mesh is None:
        return value
    # Offloaded shards are on the CPU, where the backend may not communicate.
    sent = value.to(mesh.device_type, copy=True)
    dist.all_reduce(sent, operation)
    return sent.to(value.device)
