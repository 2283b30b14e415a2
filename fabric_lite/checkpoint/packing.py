"""Tensors made ready to be written: on the CPU, shared memory shared, and no view drags its whole storage along."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fabric_lite.checkpoint.plain import Place, values_where

__all__ = ["copied", "packed", "storages"]

_Packed = dict[int, torch.Tensor]
_PER_CHANNEL = {torch.per_channel_affine, torch.per_channel_symmetric, torch.per_channel_affine_float_qparams}
_COMPRESSED = {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


def copied(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """``copy.deepcopy``, also of compressed sparse tensors, which it can't copy: they have no storage of their own."""
    memo = {} if memo is None else memo
    for _, tensor in values_where(_is_compressed, value, Place()):
        memo.setdefault(id(tensor), tensor.clone())
    return copy.deepcopy(value, memo)


def _is_compressed(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout in _COMPRESSED


def packed(tensors: list[torch.Tensor], copy_of: Callable[[torch.Tensor], torch.Tensor] | None = None) -> _Packed:
    """Return what to write for each tensor, keyed by its ``id``.

    Tensors whose memory overlaps go on sharing it. A storage that they cover entirely is used as it is; of any
    other only the covered parts are copied.

    Args:
        tensors: Detached tensors on any device, of any layout.
        copy_of: Makes a copy of a strided tensor that is neither conjugated nor negated: contiguous, on the CPU, in a
            storage of just its size; one that is contiguous keeps its strides. With it everything is copied, nothing
            used as it is; None copies into new memory.
    """
    written: _Packed = {}
    by_storage: dict[int, list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_quantized:
            written[id(tensor)] = tensor.cpu() if copy_of is None or tensor.device.type != "cpu" else tensor.clone()
        elif tensor.numel() == 0 or tensor.is_conj() or tensor.is_neg():
            written[id(tensor)] = (copy_of or _fresh)(tensor.resolve_conj().resolve_neg())
        else:
            by_storage.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    for members in by_storage.values():
        for cluster in _overlapping(members):
            written.update(_pack_cluster(cluster, copy_of))
    return written


def _fresh(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of a tensor in the order in which ``torch.save`` meets them."""
    if tensor.layout == torch.strided:
        yield tensor.untyped_storage()
        if tensor.is_quantized and tensor.qscheme() in _PER_CHANNEL:
            yield tensor.q_per_channel_scales().untyped_storage()
            yield tensor.q_per_channel_zero_points().untyped_storage()
        return
    if tensor.layout == torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    else:
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    for part in parts:
        yield part.untyped_storage()


def _span(tensor: torch.Tensor) -> tuple[Any, Any]:
    """The bytes of its storage that a strided tensor with elements reaches over: first, and one past the last."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.storage_offset() * tensor.itemsize
    return start, start + reach * tensor.itemsize


def _overlapping(members: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    if len(members) == 1:
        yield members
        return
    cluster: list[torch.Tensor] = []
    end = -1
    for tensor in sorted(members, key=_span):
        first, past = _span(tensor)
        if cluster and first >= end:
            yield cluster
            cluster = []
        cluster.append(tensor)
        end = max(end, past)
    yield cluster


def _pack_cluster(cluster: list[torch.Tensor], copy_of: Callable[[torch.Tensor], torch.Tensor] | None) -> _Packed:
    head = cluster[0]
    if copy_of is not None and len(cluster) == 1 and head.is_contiguous():
        return {id(head): copy_of(head)}  # the most of them, and the training waits
    make = copy_of or _fresh
    if any(tensor.dtype != head.dtype for tensor in cluster):
        # One memory seen as several dtypes can't be written by torch.save: each gets its own.
        return {id(tensor): make(tensor) for tensor in cluster}
    spans = [_span(tensor) for tensor in cluster]
    first, past = min(span[0] for span in spans), max(span[1] for span in spans)
    if copy_of is None and head.device.type == "cpu" and past - first == head.untyped_storage().nbytes():
        return {id(tensor): tensor for tensor in cluster}
    alike = len({(tensor.storage_offset(), tensor.shape, tensor.stride()) for tensor in cluster}) == 1
    if alike and past - first > head.numel() * head.itemsize:
        # A view with gaps (one column of a matrix) is smaller without them.
        return dict.fromkeys(map(id, cluster), make(head))
    origin = first // head.itemsize
    memory = make(head.as_strided(((past - first) // head.itemsize,), (1,), origin))
    return {id(tensor): _view_like(memory, tensor, origin) for tensor in cluster}


def _view_like(memory: torch.Tensor, tensor: Any, origin: int) -> torch.Tensor:
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - origin)
