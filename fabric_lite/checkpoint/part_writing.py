"""Writing one file in the safetensors format: header, then all data in one pass, checksums computed on the way.

The format is 8 bytes of header length (little-endian), a JSON header, and the raw little-endian data without gaps.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Generic, TypeVar

import torch

from fabric_lite.checkpoint.boxes import Box
from fabric_lite.checkpoint.manifest import DTYPES
from fabric_lite.errors import FabricTypeError
from fabric_lite.movement import note_movement

__all__ = [
    "STAGING_BYTES",
    "Beside",
    "Blocks",
    "Piece",
    "Written",
    "bytes_of",
    "dtype_name",
    "row_major_boxes",
    "write_blocks",
    "write_part",
]

STAGING_BYTES = 16 << 20
_LEAST_BESIDE = 1 << 18  # bytes from which on a thread is worth its start
_ALIGNMENT = 8
_SAFETENSORS = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}


Value = TypeVar("Value")


class Beside(Generic[Value]):
    """A call in a thread of its own.

    Not one of ``concurrent.futures``: those take no more work once the interpreter waits for its last threads, and a
    save that runs in one of these has still to end well.
    """

    def __init__(self, function: Callable[..., Value], *args: Any) -> None:
        self._call = function, args
        self._value: list[Value] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fabric_lite checksum")
        self._thread.start()

    def result(self) -> Value:
        """Wait for its end; return its value or raise its error."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value[0]

    def _run(self) -> None:
        function, args = self._call
        try:
            self._value.append(function(*args))
        except BaseException as error:
            self._error = error


@dataclasses.dataclass(frozen=True)
class Piece:
    """One box of a tensor, to be written.

    Args:
        name: Its name in the file; no other piece of the file has it.
        dtype: A dtype in ``DTYPES``.
        shape: The box's shape.
        load: Returns the tensor of that dtype and shape, on any device; called when its turn has come, and let go of
            after it.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Written:
    """What was written: its first byte in the file, one past its last, and their checksum."""

    begin: int
    end: int
    crc32: int


def dtype_name(dtype: torch.dtype, what: str) -> str:
    """The name of ``dtype`` in a manifest; FabricTypeError, which names ``what``, if it can't be in one."""
    name = str(dtype)[6:]
    if name not in DTYPES:
        raise FabricTypeError(
            f"{what} has a dtype that a checkpoint folder can't hold.",
            given=dtype,
            fix='another dtype, or state_dict_type="full"',
        )
    return name


def write_part(
    file: BinaryIO, pieces: Sequence[Piece], metadata: dict[str, str] | None = None
) -> tuple[int, list[Written]]:
    """Write ``pieces`` into an empty file.

    No more than one staging buffer of ``STAGING_BYTES`` is needed beside what ``load`` returns.

    Args:
        file: Open for writing, at its start.
        pieces: What to write; larger elements come first in the file, so that all data is aligned.
        metadata: Strings for the header, under ``__metadata__``.

    Returns:
        The checksum of the header, and what was written of each piece, in the order of ``pieces``.
    """
    order = sorted(range(len(pieces)), key=lambda index: -pieces[index].dtype.itemsize)
    start = _start([pieces[index] for index in order], metadata)
    file.write(start)
    written: dict[int, Written] = {}
    position, staging = len(start), Blocks()
    for index in order:
        checksum = write_blocks(file, staging.of(pieces[index].load()))
        written[index] = Written(position, position + pieces[index].nbytes, checksum)
        position = written[index].end
    return zlib.crc32(start), [written[index] for index in range(len(pieces))]


def _start(pieces: Sequence[Piece], metadata: dict[str, str] | None) -> bytes:
    """All that stands before the data, as long as its alignment asks for."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.nbytes
        header[piece.name] = _described(piece) | {"data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_blocks(file: BinaryIO, blocks: Iterable[memoryview]) -> int:
    """Write blocks at the file's position; return the checksum of all of them."""
    checksum = 0
    for block in blocks:
        note_movement()  # the other ranks wait, for as long as the disk takes
        if len(block) < _LEAST_BESIDE:
            checksum = zlib.crc32(block, checksum)
            file.write(block)
            continue
        following = Beside(zlib.crc32, block, checksum)  # beside the writing: both release the lock
        try:
            file.write(block)
        finally:
            checksum = following.result()
    return checksum


def _described(piece: Piece) -> dict[str, Any]:
    """Dtype and shape for the header. A dtype that safetensors lacks is bytes, with one more dim for those of one."""
    name = str(piece.dtype)[6:]
    if name in _SAFETENSORS:
        return {"dtype": _SAFETENSORS[name], "shape": list(piece.shape)}
    return {"dtype": "U8", "shape": [*piece.shape, piece.dtype.itemsize]}


class Blocks:
    """A tensor's bytes in row-major order, block after block; the memory itself where it is in that order already.

    One staging buffer, made when it is first needed, serves all other tensors.
    """

    def __init__(self) -> None:
        self._staging: torch.Tensor | None = None

    def of(self, tensor: torch.Tensor) -> Iterator[memoryview]:
        """Yield the blocks, each of at most ``STAGING_BYTES``; a block is used before the next one is asked for."""
        if tensor.numel() == 0:
            return
        tensor = tensor.detach()
        if tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
            memory = bytes_of(tensor)
            for start in range(0, len(memory), STAGING_BYTES):
                yield memory[start : start + STAGING_BYTES]
            return
        if self._staging is None:
            self._staging = torch.empty(STAGING_BYTES, dtype=torch.uint8)
        for offset, shape in row_major_boxes(tuple(tensor.shape), STAGING_BYTES // tensor.itemsize):
            box = tensor[tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))]
            staged = self._staging.view(tensor.dtype)[: box.numel()].view(shape)
            staged.copy_(box)
            yield bytes_of(staged)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; not by ``view``, which not all dtypes and shapes have."""
    flat = torch.empty(0, dtype=torch.uint8)
    begin = tensor.storage_offset() * tensor.itemsize
    flat.set_(tensor.untyped_storage(), begin, (tensor.numel() * tensor.itemsize,), (1,))
    return flat.numpy().data


def row_major_boxes(shape: tuple[int, ...], elements: int) -> Iterator[Box]:
    """Cut a tensor's shape into boxes, offset and shape, of at most ``elements`` that follow each other in memory."""
    if math.prod(shape) <= elements:
        yield (0,) * len(shape), shape
        return
    row = math.prod(shape[1:])
    if row > elements:
        for index in range(shape[0]):
            for offset, inner in row_major_boxes(shape[1:], elements):
                yield (index, *offset), (1, *inner)
        return
    rows = elements // row
    for start in range(0, shape[0], rows):
        yield (start,) + (0,) * (len(shape) - 1), (min(rows, shape[0] - start), *shape[1:])
