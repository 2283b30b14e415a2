"""A tensor that still lies in a file: any box of it is read straight to where it belongs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fabric_lite.checkpoint.boxes import Box, common
from fabric_lite.checkpoint.packing import copied
from fabric_lite.checkpoint.plain import Place, values_where
from fabric_lite.checkpoint.stored_files import StoredFile, read_into
from fabric_lite.errors import CheckpointDamagedError

__all__ = ["Located", "Piece", "Storage", "StoredTensor", "is_tensor", "materialized", "row_major"]

# What does not lie in the file as it shall lie in memory goes through a buffer of this size.
_STAGING_BYTES = 4 << 20
# Rows that are at least this long are read one by one, shorter ones together with what lies between them.
_LONG_ROW_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Located:
    """Elements in a file: the byte at which the first one begins, and the stride of each dim, in elements."""

    file: StoredFile
    begin: int
    stride: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """One box of a tensor.

    Args:
        offset: Where its first element is in the whole tensor, per dim.
        shape: Its shape.
        locate: Says where it lies; it may have to look into the file, and raises CheckpointError.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    locate: Callable[[], Located]

    @property
    def box(self) -> Box:
        return self.offset, self.shape

    @staticmethod
    def at(offset: Sequence[int], shape: Sequence[int], located: Located) -> Piece:
        """A piece of which it is known where it lies."""
        return Piece(tuple(offset), tuple(shape), lambda: located)


@dataclasses.dataclass(frozen=True)
class Storage:
    """Bytes of a file in which several tensors may lie, as views of one memory do.

    Args:
        file: The file.
        begin: The first byte.
        bytes: How many.
        offset: Where the tensor begins in it, in elements.
    """

    file: StoredFile
    begin: int
    bytes: int
    offset: int


@dataclasses.dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a checkpoint, of which nothing is in memory.

    Args:
        dtype: Its dtype.
        shape: Its shape.
        pieces: Boxes that tile it.
        stride: The strides with which it was saved.
        storage: The memory that it shares with others, if the format has such; ``stride`` then holds in it.

    Raises:
        CheckpointError: The shape is negative, or larger than torch can count.
    """

    dtype: torch.dtype
    shape: torch.Size
    pieces: Sequence[Piece]
    stride: tuple[int, ...]
    storage: Storage | None = None

    def __post_init__(self) -> None:
        # Of a tensor without elements the file's size says nothing of its shape.
        if any(size < 0 for size in self.shape) or math.prod(max(1, size) for size in self.shape) >= 1 << 59:
            raise CheckpointDamagedError(
                "The description of a checkpoint's content is damaged.",
                given=f"a tensor of shape {tuple(self.shape)}",
                fix="an earlier checkpoint",
            )

    def __repr__(self) -> str:
        return f"tensor of shape {tuple(self.shape)} and {self.dtype} in the file"

    def check(self, offset: Sequence[int], shape: Sequence[int]) -> None:
        """Look up where a box lies: after that only the disk can fail :meth:`read`. Raises CheckpointError."""
        for piece in self.pieces:
            if common(piece.box, (tuple(offset), tuple(shape))) is not None:
                piece.locate()

    def read(self, offset: Sequence[int], shape: Sequence[int], out: torch.Tensor | None = None) -> torch.Tensor:
        """Return one box of the tensor; nothing else of it is held in memory.

        Args:
            offset: Where the box begins, per dim.
            shape: Its shape.
            out: A tensor of this shape, of any strides, dtype and device, that is filled and returned. None: a new
                one on the CPU.

        Raises:
            CheckpointError: The file could not be read.
        """
        if out is None:
            out = torch.empty(tuple(shape), dtype=self.dtype, device="cpu")
        for piece in self.pieces:
            shared = common(piece.box, (tuple(offset), tuple(shape)))
            if shared is None:
                continue
            located, target, begin = piece.locate(), out.detach(), 0
            for dim, (first, size) in enumerate(zip(*shared, strict=True)):
                target = target.narrow(dim, first - offset[dim], size)
                begin += (first - piece.offset[dim]) * located.stride[dim]
            with located.file.opened() as descriptor:
                source = _Source(descriptor, located.file, self.dtype, located.stride)
                source.fill(target, located.begin + begin * self.dtype.itemsize)
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)  # else backward would not notice that the values changed
        return out

    def full(self, storages: dict[Any, torch.Tensor] | None = None) -> torch.Tensor:
        """Return the whole tensor, on the CPU.

        Args:
            storages: Memory that was read before, to which this tensor's is added: what shares memory in the file
                then does so here. None: the tensor gets memory of its own.
        """
        if self.storage is None or storages is None or not self.storage.bytes:
            new = torch.empty_permuted(self.shape, _order(self.stride), dtype=self.dtype, device="cpu")
            return self.read((0,) * len(self.shape), self.shape, new)
        memory = dataclasses.replace(self.storage, offset=0)
        if memory not in storages:
            storages[memory] = torch.empty(memory.bytes, dtype=torch.uint8, device="cpu")
            with memory.file.opened() as descriptor:
                read_into(descriptor, memory.file.path, _bytes_of(storages[memory]), memory.begin)
        view = torch.empty(0, dtype=self.dtype, device="cpu")
        return view.set_(storages[memory].untyped_storage(), self.storage.offset, self.shape, self.stride)


@dataclasses.dataclass(frozen=True)
class _Source:
    """An open file that has elements of one dtype in these strides."""

    descriptor: int
    file: StoredFile
    dtype: torch.dtype
    stride: tuple[int, ...]

    def fill(self, target: torch.Tensor, begin: int) -> None:
        """Read the box of ``target``'s shape whose first element is at byte ``begin``."""
        reach = 1 + sum((size - 1) * stride for size, stride in zip(target.shape, self.stride, strict=True))
        if self._lies_as(target, reach):
            self._read(_bytes_of(target.as_strided((reach,), (1,))), begin)
            return
        dim, count = self._split(target, reach)
        if dim is None:
            staging = torch.empty(reach, dtype=self.dtype, device="cpu")
            self._read(_bytes_of(staging), begin)
            target.copy_(staging.as_strided(target.shape, self.stride))
            return
        step = self.stride[dim] * self.dtype.itemsize
        for first in range(0, target.shape[dim], count):
            part = target.narrow(dim, first, min(count, target.shape[dim] - first))
            self.fill(part, begin + first * step)

    def _lies_as(self, target: torch.Tensor, reach: int) -> bool:
        """Whether the bytes in the file are those of ``target``, one after the other."""
        if target.device.type != "cpu" or target.dtype != self.dtype or reach != target.numel():
            return False
        if target.is_conj() or target.is_neg():  # its memory has other values than it shows
            return False
        strides = zip(target.shape, target.stride(), self.stride, strict=True)
        return all(size == 1 or here == there for size, here, there in strides)

    def _split(self, target: torch.Tensor, reach: int) -> tuple[int | None, int]:
        """The dim along which to go in steps, and how many indices at a time; None: all fits into the buffer."""
        large = reach * self.dtype.itemsize > _STAGING_BYTES
        dims = [dim for dim, size in enumerate(target.shape) if size > 1]
        if not dims:
            return None, 0
        dim = max(dims, key=lambda dim: self.stride[dim])
        row_bytes = target.numel() // target.shape[dim] * self.dtype.itemsize
        if reach != target.numel() and row_bytes >= _LONG_ROW_BYTES:
            return dim, 1
        if not large:
            return None, 0
        count = _STAGING_BYTES // max(1, self.stride[dim] * self.dtype.itemsize)
        return dim, max(1, min(count, target.shape[dim] // 2))

    def _read(self, memory: memoryview, begin: int) -> None:
        read_into(self.descriptor, self.file.path, memory, begin)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor, in elements."""
    strides = itertools.accumulate(reversed([max(1, size) for size in shape[1:]]), operator.mul, initial=1)
    return tuple(reversed(list(strides))) if shape else ()


def is_tensor(value: Any) -> bool:
    """Whether ``value`` is a tensor, in memory or in a file."""
    return isinstance(value, (torch.Tensor, StoredTensor))


def materialized(value: Any, memo: dict[Any, Any] | None = None) -> Any:
    """A deep copy of nested data with all tensors in memory.

    Args:
        value: Nested data.
        memo: What was copied before: memory that is shared in the file stays shared in all copies made with one memo.
    """
    memo = {} if memo is None else memo
    for _, leaf in values_where(lambda leaf: isinstance(leaf, StoredTensor), value, Place()):
        if id(leaf) not in memo:
            memo[id(leaf)] = leaf.full(memo)
    return copied(value, memo)


def _order(stride: tuple[int, ...]) -> list[int]:
    return sorted(range(len(stride)), key=lambda dim: -stride[dim])


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
