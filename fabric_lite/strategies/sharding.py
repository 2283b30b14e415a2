"""``fully_shard`` (FSDP2) as sharded strategies use it; its private state is touched here and in ``hooked`` alone."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from fabric_lite import buffers
from fabric_lite.device import kind_of
from fabric_lite.errors import StrategyError
from fabric_lite.strategies.base import Engine, Placement

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "check_shardable",
    "follow_rank_zero",
    "forget_unsynchronized",
    "is_synchronizing",
    "no_sync",
    "shard_module",
]


def shard_module(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh | None,
    placement: Placement,
    *,
    reshard_after_forward: bool | int | None = None,
    cpu_offload: bool = False,
) -> Engine:
    """Shard each of ``blocks``, then what is left of ``module``, over ``mesh``; parts that are sharded already stay.

    Every rank calls it. Parameters become DTensors, shards of dimension 0, on the mesh's device. At no time more than
    one block is whole on that device.

    Args:
        module: The whole model, also one on the meta device.
        blocks: Submodules that are gathered and freed one by one, inner ones first.
        mesh: One axis (shard), or two (replicate, shard).
        placement: Device and precision. Under a mixed precision parameters are gathered in its compute dtype (those
            beside running statistics in their own) and gradients are reduced in its reduce dtype; the parameters
            themselves keep theirs.
        reshard_after_forward: Whether parameters are freed after forward and gathered again for backward, or to how
            many ranks. None: those of blocks are, those of the root are not, since backward needs them at once.
        cpu_offload: Whether shards, gradients and optimizer state stay in the host's memory.

    Raises:
        StrategyError: A class cannot be sharded; for all else call :func:`check_shardable` first.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    precision = placement.precision
    options = {
        "mesh": mesh,
        "reshard_after_forward": reshard_after_forward,
        "offload_policy": (
            CPUOffloadPolicy(pin_memory=kind_of(placement.device).pins_memory) if cpu_offload else OffloadPolicy()
        ),
    }
    for part, own in _groups(module, blocks):
        if not isinstance(part, FSDPModule):  # else by the user's own hand
            compute_dtype = None if any(map(_needs_own_dtype, own)) else precision.compute_dtype
            policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=precision.reduce_dtype)
            # torch moves parameters to the device before it cuts them. Whoever still holds one, an optimizer that was
            # made before, would keep it there whole.
            homes = [(parameter, parameter.data) for parameter in part.parameters() if not parameter.is_meta]
            try:
                fully_shard(part, mp_policy=policy, **options)  # type: ignore[arg-type]
            except TypeError as error:
                if "layout differs" not in str(error):
                    raise
                raise _refused_class(type(part)) from error
            for parameter, data in homes:
                if parameter.data.device != data.device:
                    parameter.data = data
        # Programs look models up by the name of their class and print it; torch writes FSDP before it.
        first, *others = type(part).__bases__
        if first is FSDPModule:
            type(part).__name__, type(part).__qualname__ = others[0].__name__, others[0].__qualname__
    statistics = buffers.keep_statistics_alike(module, None, lambda: is_synchronizing(module))
    handles = () if statistics is None else (statistics,)
    return Engine(hooked=True, reset=lambda: _reset(module), handles=handles)


@torch.no_grad()
def follow_rank_zero(module: nn.Module, device: torch.device) -> None:
    """Give ``module`` rank 0's parameters and buffers, one at a time; every rank calls it.

    Each rank keeps a shard of its own copy, so copies that differ (a script that sets no seed) would be mixed up.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_meta or hasattr(tensor, "placements"):  # DTensors are alike already
            continue
        sent = tensor.detach().to(device).contiguous()
        dist.broadcast(sent, 0)
        if sent.data_ptr() != tensor.data_ptr():
            tensor.copy_(sent)


@contextlib.contextmanager
def no_sync(module: nn.Module) -> Iterator[None]:
    """A context in which the gradients of ``module``'s sharded parts add up on their rank; contexts may be nested."""
    before = [(group, group.reduce_grads, group.all_reduce_grads) for group in _parameter_groups(module)]
    for group, *_ in before:
        group.reduce_grads = group.all_reduce_grads = False
    try:
        yield
    finally:
        for group, reduces, all_reduces in before:
            group.reduce_grads, group.all_reduce_grads = reduces, all_reduces


def forget_unsynchronized(module: nn.Module, parameters: Container[int] | None = None) -> None:
    """Drop the unsharded gradients that wait for a backward that synchronizes.

    Neither ``module.zero_grad()`` nor the optimizer's reaches them, so that without this an accumulation that was given
    up would be added to the next step's gradients.

    Args:
        module: A sharded module.
        parameters: The ``id`` of each parameter it is about; None is all.
    """
    for group in _parameter_groups(module):
        if parameters is None:
            group._partial_reduce_output = None
        for held in group.fsdp_params:
            if parameters is None or id(held.sharded_param) in parameters:
                held.unsharded_accumulated_grad = None
                if hasattr(held, "_unsharded_param"):  # there from the first forward on
                    held._unsharded_param.grad = None


def is_synchronizing(module: nn.Module) -> bool:
    """Whether the next backward reduces gradients: False within :func:`no_sync`."""
    return all(group.reduce_grads for group in _parameter_groups(module))


def _reset(module: Any) -> None:
    """Before a forward from outside: clean up after one, or a backward, that an exception has cut short."""
    state = module._get_fsdp_state()
    context = state._state_ctx
    is_stale = context.iter_forward_root is not None or context.post_backward_final_callback_queued
    if is_stale and state._is_root and hasattr(module, "reset_iter_state"):  # since torch 2.13
        module.reset_iter_state()


def _parameter_groups(module: nn.Module) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            state: Any = part._get_fsdp_state()
            # Before torch 2.13 there was one group, or none, to a module.
            groups = getattr(state, "_fsdp_param_groups", None)
            yield from [state._fsdp_param_group] if groups is None and state._fsdp_param_group else groups or []


def check_shardable(module: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Raise unless ``module`` can be sharded by ``blocks``; nothing is changed.

    Raises:
        StrategyError: A parameter is a scalar, one group has two dtypes, or ``module`` has no forward.
    """
    _check(module)
    for part, own in _groups(module, blocks):
        _check_dtypes(part, own)


def _groups(module: nn.Module, blocks: Sequence[nn.Module]) -> list[tuple[nn.Module, list[nn.Module]]]:
    """``blocks``, inner ones first, and ``module``, each with those of its submodules that are in no block before."""
    taken: set[nn.Module] = set()
    groups = []
    for part in [*blocks, module]:
        own = [child for child in part.modules() if child not in taken]
        taken.update(own)
        groups.append((part, own))
    return groups


def _needs_own_dtype(module: nn.Module) -> bool:
    """Whether half precision breaks what is done with the weights of ``module``; autocast still computes around it.

    Batch norm takes weights of its statistics' dtype alone, and a parametrization (orthogonal, spectral_norm) computes
    the weights from others in their dtype.
    """
    if nn.utils.parametrize.is_parametrized(module):
        return True
    return buffers.keeps_statistics(module) and next(module.parameters(recurse=False), None) is not None


def _check_dtypes(part: nn.Module, own: Sequence[nn.Module]) -> None:
    """The parameters of one group travel together; those that are in a group already are DTensors."""
    names = {id(parameter): name for name, parameter in part.named_parameters()}
    found: dict[torch.dtype, str] = {}
    for parameter in (parameter for child in own for parameter in child.parameters(recurse=False)):
        if parameter.requires_grad and not hasattr(parameter, "placements"):
            found.setdefault(parameter.dtype, names[id(parameter)])
    if len(found) > 1:
        raise StrategyError(
            "Trainable parameters that are gathered together must have one dtype.",
            given=f"{' and '.join(f'{name} of {dtype}' for dtype, name in found.items())} in {type(part).__name__}",
            fix="auto_wrap_policy with the modules of the other dtype as blocks, or one dtype",
        )


def _refused_class(kind: type) -> StrategyError:
    return StrategyError(
        f"torch cannot shard a {kind.__name__}: it changes the class of the object, which this one forbids.",
        given=f"{kind.__name__}({', '.join(base.__name__ for base in kind.__bases__)})",
        fix=f"class {kind.__name__}(nn.Module, ...) with nn.Module as the first base",
    )


def _check(module: nn.Module) -> None:
    scalars = [name for name, parameter in module.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise StrategyError(
            "A parameter without dimensions cannot be sharded.",
            given=f"{', '.join(scalars)} in {type(module).__name__}",
            fix="nn.Parameter(torch.ones(1)) in the place of nn.Parameter(torch.tensor(1.0))",
        )
    empty = [name for name, parameter in module.named_parameters() if parameter.numel() == 0]
    if empty:
        raise StrategyError(
            "A parameter without elements cannot be sharded.",
            given=f"{', '.join(empty)} in {type(module).__name__}",
            fix="a buffer in its place, or None",
        )
    sparse = [name for name, child in module.named_modules() if getattr(child, "sparse", None) is True]
    if sparse:
        raise StrategyError(
            "Sparse gradients cannot be divided over the ranks.",
            given=f"sparse=True in {', '.join(sparse)}",
            fix="sparse=False, or strategy='ddp'",
        )
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        raise StrategyError(
            f"A {type(module).__name__} has no forward, so nothing would gather its parameters.",
            given=f"setup({type(module).__name__})",
            fix="a module with a forward that holds it, or setup() of each of its modules",
        )
