"""Reading a ``.safetensors`` file: a flat dict of tensors, or a whole checkpoint if ``fabric-ckpt`` wrote it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn

import torch

from fabric_lite.checkpoint.archive import CheckpointNotFoundError
from fabric_lite.checkpoint.flat import content_of, header_of
from fabric_lite.checkpoint.stored import Located, Piece, StoredTensor, row_major
from fabric_lite.checkpoint.stored_files import OpenFile, read_bytes
from fabric_lite.errors import CheckpointDamagedError, CheckpointError

__all__ = ["SafetensorsFile"]

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class SafetensorsFile:
    """A file in the safetensors format; it is opened now and stays the one that is read.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CheckpointError: It is no file of this format, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self._file = OpenFile(path, file)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointNotFoundError(
                "There is no checkpoint of this name.", given=f"{path}, seen from {Path.cwd()}", fix="an existing file"
            ) from error
        except OSError as error:
            raise CheckpointError("This checkpoint could not be read.", given=f"{path}: {error}") from error
        self.metadata, self._tensors = self._header()

    @property
    def source(self) -> object:
        """What every tensor in it refers to until it has been read."""
        return self._file

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        """Do nothing: the format has no checksums, and its header was checked when it was opened."""

    def content(self) -> Any:
        """Return the tensors by name, each as a StoredTensor; of a file of ``fabric-ckpt`` the whole checkpoint.

        Raises:
            CheckpointError: The description of the checkpoint is damaged, or does not fit the tensors.
        """
        header = header_of(self.metadata)
        return dict(self._tensors) if header is None else content_of(header, self._tensors)

    def _header(self) -> tuple[dict[str, str], dict[str, StoredTensor]]:
        with self._file.opened() as descriptor:
            size = os.fstat(descriptor).st_size
            if size < _LENGTH_BYTES:
                self._fault("it is too short")
            length = int.from_bytes(read_bytes(descriptor, self._path, 0, _LENGTH_BYTES), "little")
            if length > min(_MOST_HEADER_BYTES, size - _LENGTH_BYTES):
                self._fault(f"its header would have {length} bytes")
            text = read_bytes(descriptor, self._path, _LENGTH_BYTES, length)
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            self._fault(f"its header is no JSON ({type(error).__name__}: {error})")
        if not isinstance(header, dict):
            self._fault("its header is no JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self._fault("its __metadata__ is no object of strings")
        data = _LENGTH_BYTES + length
        spans = {name: self._span(name, entry, size - data) for name, entry in header.items()}
        self._check_order(spans, size - data)
        return metadata, {name: self._stored(header[name], data + begin) for name, (begin, _) in spans.items()}

    def _span(self, name: str, entry: Any, data_bytes: int) -> tuple[int, int]:
        """First byte and one past the last of a tensor, counted from where the data begins."""
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            self._fault(f"{name!r:.80} is not described by dtype, shape and data_offsets")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
            self._fault(f"{name!r:.80} has the dtype {entry['dtype']!r:.80}")
        numbers = [entry["shape"], entry["data_offsets"]]
        if not all(isinstance(each, list) and all(type(one) is int and one >= 0 for one in each) for each in numbers):
            self._fault(f"{name!r:.80} has no whole numbers as shape and data_offsets")
        if len(entry["data_offsets"]) != 2:
            self._fault(f"{name!r:.80} has {len(entry['data_offsets'])} data_offsets")
        begin, end = entry["data_offsets"]
        if end > data_bytes:
            self._fault(f"{name!r:.80} reaches beyond the end of the file")
        if end - begin != math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize:
            self._fault(f"{name!r:.80} has {end - begin} bytes, which do not fit its shape and dtype")
        return begin, end

    def _check_order(self, spans: dict[str, tuple[int, int]], data_bytes: int) -> None:
        position = 0
        for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
            if begin != position:
                self._fault(f"{name!r:.80} begins at {begin}, where the one before ends at {position}")
            position = end
        if position != data_bytes:
            self._fault(f"{data_bytes - position} bytes at its end belong to no tensor")

    def _stored(self, entry: dict[str, Any], begin: int) -> StoredTensor:
        shape = tuple(entry["shape"])
        piece = Piece.at((0,) * len(shape), shape, Located(self._file, begin, row_major(shape)))
        return StoredTensor(_DTYPES[entry["dtype"]], torch.Size(shape), [piece], row_major(shape))

    def _fault(self, what: str) -> NoReturn:
        raise CheckpointDamagedError(
            "This file is damaged, or is no safetensors file.", given=f"{self._path}: {what}", fix="an earlier file"
        )
