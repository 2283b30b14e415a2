"""Clipping gradients by norm and by value, whatever the layout of the parameters, also of several layouts at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fabric_lite.errors import FabricRuntimeError, FabricValueError
from fabric_lite.parameters import local_part, local_stand_ins, mesh_of, reduced

__all__ = ["clip_grad_norm", "clip_grad_value", "total_norm"]


def clip_grad_norm(
    parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> torch.Tensor:
    """Scale gradients so that their norm, over all ranks, is at most ``max_norm``.

    Plain tensors alone are clipped by torch's own function, and nothing is communicated. Else every rank calls, with
    the same parameters, and one number is reduced over all ranks.

    Args:
        parameters: Plain tensors, equal on all ranks, and DTensors over any axes of the mesh of all ranks.
        max_norm: The largest norm allowed.
        norm_type: The p of the p-norm; ``math.inf`` for the largest absolute value.
        error_if_nonfinite: Whether to raise on a norm that is infinite or no number; costs a synchronization.

    Returns:
        The norm before, a plain 0-dim tensor, equal on all ranks.

    Raises:
        RuntimeError: On all ranks, the gradients untouched, when the norm is not finite and that was not allowed.
        FabricValueError: With DTensors, ``norm_type`` is not above 0.
    """
    parameters = list(parameters)
    if all(mesh_of(parameter) is None for parameter in parameters):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)
    if not norm_type > 0:
        raise FabricValueError(
            "There is no such norm of sharded gradients.", given=f"norm_type={norm_type}", fix="1, 2 or float('inf')"
        )
    stand_ins = local_stand_ins(parameters)
    norm = _norm_over_ranks(parameters, float(norm_type))
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise FabricRuntimeError(
            f"The norm of order {norm_type} of the gradients is non-finite, so they cannot be clipped.",
            given=f"a norm of {norm.item()} over all ranks; gradients are untouched",
            fix="find the NaN or overflow, or clip with error_if_nonfinite=False",
        )
    torch.nn.utils.clip_grads_with_norm_(stand_ins, max_norm, norm)
    return norm


@torch.no_grad()
def total_norm(parameters: Iterable[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    """The norm of the gradients over all ranks, a plain 0-dim tensor; with DTensors every rank calls."""
    parameters = list(parameters)
    if any(mesh_of(parameter) is not None for parameter in parameters):
        return _norm_over_ranks(parameters, float(norm_type))
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], norm_type)


def clip_grad_value(parameters: Iterable[torch.Tensor], clip_value: float) -> None:
    """Bring every element of the gradients into ``[-clip_value, clip_value]``; every rank calls."""
    torch.nn.utils.clip_grad_value_(local_stand_ins(parameters), clip_value)


@torch.no_grad()
def _norm_over_ranks(parameters: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
    """The norm of all gradients as one vector, each element counted once however many ranks hold it.

    torch's norm of DTensors makes a reduction for each axis of each mesh, and in the gradients' dtype: in float16 the
    sum of squares is infinite from a norm of 256 on.
    """
    dtype = _common_dtype(parameters)
    wide = torch.promote_types(dtype, torch.float32)
    # Zero: a rank may hold no gradient that another one holds.
    norms = [torch.zeros((), dtype=wide, device=local_part(parameters[0]).device)]
    for holders, parts in _by_holders(parameters).items():
        norm = torch.nn.utils.get_total_norm(parts, norm_type).to(norms[0].device, wide)
        norms.append(norm if math.isinf(norm_type) else norm / holders ** (1 / norm_type))
    norm = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if math.isinf(norm_type):
        # A NaN can get lost in a maximum over ranks, so it travels as a number of its own.
        pair = torch.stack([norm.nan_to_num(0.0, posinf=math.inf), norm.isnan().to(wide)])
        largest, is_nan = reduced(pair, parameters, dist.ReduceOp.MAX)
        return torch.where(is_nan > 0, math.nan, largest).to(dtype)
    return reduced(norm.pow(norm_type), parameters, dist.ReduceOp.SUM).pow(1 / norm_type).to(dtype)


def _by_holders(parameters: Sequence[Any]) -> dict[int, list[torch.Tensor]]:
    """This rank's parts of the gradients, by the number of ranks that hold the same part."""
    parts: dict[int, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        mesh, holders = mesh_of(parameter), dist.get_world_size()
        if mesh is not None:
            sharded = [
                size
                for size, placement in zip(mesh.shape, parameter.grad.placements, strict=True)
                if not placement.is_replicate()
            ]
            holders //= math.prod(sharded)
        parts.setdefault(holders, []).append(local_part(parameter.grad))
    return parts


def _common_dtype(parameters: Sequence[torch.Tensor]) -> torch.dtype:
    first, *others = {parameter.dtype for parameter in parameters}
    for other in others:
        first = torch.promote_types(first, other)
    return first
