"""Boxes of a tensor: what two of them share, and whether some of them are the whole tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["Box", "common", "tiling_fault"]

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape


def common(one: Box, other: Box) -> Box | None:
    """The box that two boxes share; None if they share no element."""
    offset, shape = [], []
    for begin, size, start, length in zip(*one, *other, strict=True):
        first, past = max(begin, start), min(begin + size, start + length)
        if first >= past:
            return None
        offset.append(first)
        shape.append(past - first)
    return tuple(offset), tuple(shape)


def tiling_fault(boxes: Sequence[Box], shape: Sequence[int]) -> str | None:
    """What is wrong with boxes that shall have each element of a tensor once, after "the pieces"; None if they do."""
    for offset, sizes in boxes:
        if not len(offset) == len(sizes) == len(shape):
            return "have another number of dims than their tensor"
        if any(start + size > whole for start, size, whole in zip(offset, sizes, shape, strict=True)):
            return "reach beyond their tensor"
    if sum(math.prod(sizes) for _, sizes in boxes) != math.prod(shape):
        return "are not the whole tensor"
    return "overlap" if _overlap(boxes, len(shape)) else None


def _overlap(boxes: Sequence[Box], dims: int) -> bool:
    if len(boxes) < 2:
        return False
    if dims == 0:
        return True
    # Along the dim with the most cuts, few boxes stand side by side: the tensors of a thousand ranks are quick too.
    along = max(range(dims), key=lambda dim: len({offset[dim] for offset, _ in boxes}))
    beside: list[Box] = []
    for box in sorted(boxes, key=lambda box: box[0][along]):
        beside = [other for other in beside if other[0][along] + other[1][along] > box[0][along]]
        if any(common(other, box) for other in beside):
            return True
        beside.append(box)
    return False
