"""The manifest of a checkpoint folder: what is in it, where each piece of each tensor lies, and all checksums.

    ckpt/
      manifest.json               everything about the checkpoint; nothing is read that it does not list
      part-00000.safetensors      the data that rank 0 wrote, in the safetensors format
      part-00001.safetensors      what rank 1 wrote, if it had anything to write

No file of it is a pickle. The manifest carries a CRC-32 of itself, of the header of each part and of each piece of
data, so that every byte of the folder is covered by one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from fabric_lite.checkpoint.archive import CheckpointNotFoundError
from fabric_lite.checkpoint.boxes import tiling_fault
from fabric_lite.checkpoint.plain_json import decode, encode
from fabric_lite.checkpoint.remote import Folder
from fabric_lite.errors import CheckpointDamagedError, CheckpointError
from fabric_lite.movement import busy

__all__ = [
    "DTYPES",
    "FORMAT",
    "MANIFEST",
    "Chunk",
    "Manifest",
    "Part",
    "TensorEntry",
    "decode",
    "encode",
    "is_own_manifest",
    "is_part_name",
    "open_regular",
    "part_name",
]

FORMAT = 1
MANIFEST = "manifest.json"
_BEGIN = b'{"checksum":'  # of every manifest
_PART = re.compile(r"part-[0-9]{5}\.safetensors")
_LENGTH_BYTES = 8  # what stands before the header of a safetensors file

# What a tensor of a folder can be, by the name in the manifest.
DTYPES: dict[str, torch.dtype] = {
    name: dtype
    for name, dtype in ((str(value)[6:], value) for value in vars(torch).values() if isinstance(value, torch.dtype))
    if re.fullmatch(r"bool|uint(8|16|32|64)|int(8|16|32|64)|bfloat16|float\d+(_\w+)?|complex\d+", name)
}


def part_name(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"part-{rank:05d}.safetensors"


def is_part_name(name: str) -> bool:
    """Whether a file of this name in a checkpoint folder is a part of it."""
    return _PART.fullmatch(name) is not None


def is_own_manifest(path: Path) -> bool:
    """Whether this file begins as :meth:`Manifest.write` begins it. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(_BEGIN)) == _BEGIN


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a link or anything else is refused.

    Raises:
        CheckpointError: It is not a regular file.
        OSError: It could not be opened.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise CheckpointDamagedError(
            "A checkpoint folder holds regular files only.", given=f"{path}: a link or no file"
        )
    return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)), "rb")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One box of a tensor, in one run of bytes of one part, in row-major order, little-endian.

    Args:
        part: The name of the part's file.
        name: The name of the piece in that file, for other readers of safetensors.
        offset: Where the box's first element stands in the whole tensor, per dim.
        shape: The box's shape.
        begin: Its first byte in the file.
        end: One past its last byte.
        crc32: Checksum of these bytes.
    """

    part: str
    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    begin: int
    end: int
    crc32: int

    @classmethod
    def from_json(cls, value: Any, fault: Fault) -> Chunk:
        _fields(cls, value, fault)
        if not isinstance(value["part"], str) or not is_part_name(value["part"]):
            fault(f"{value['part']!r:.80} is no name of a part")
        if not isinstance(value["name"], str):
            fault(f"{value['name']!r:.80} is no name of a tensor")
        begin, end = _count(value["begin"], fault), _count(value["end"], fault)
        if not _LENGTH_BYTES <= begin < end:
            fault(f"a piece of {value['name']!r:.80} has the bytes from {begin} to {end}")
        offset, shape = _counts(value["offset"], fault), _counts(value["shape"], fault)
        return cls(value["part"], value["name"], offset, shape, begin, end, _count(value["crc32"], fault))


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor: dtype (a key of ``DTYPES``), whole shape, and the chunks that tile it; none if it is empty."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @classmethod
    def from_json(cls, value: Any, fault: Fault) -> TensorEntry:
        _fields(cls, value, fault)
        if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPES:
            fault(f"{value['dtype']!r:.80} is no dtype")
        chunks = tuple(Chunk.from_json(chunk, fault) for chunk in _list(value["chunks"], fault))
        entry = cls(value["dtype"], _counts(value["shape"], fault), chunks)
        entry.check(fault)
        return entry

    def check(self, fault: Fault) -> None:
        """Each chunk has the bytes of its box, and together they have each element once."""
        itemsize = DTYPES[self.dtype].itemsize
        for chunk in self.chunks:
            if chunk.end - chunk.begin != math.prod(chunk.shape) * itemsize:
                fault(f"a piece of {chunk.name!r:.80} has another number of bytes than its shape")
        wrong = tiling_fault([(chunk.offset, chunk.shape) for chunk in self.chunks], self.shape)
        if wrong is not None:
            fault(f"the pieces of {_name(self.chunks)} {wrong}")


@dataclasses.dataclass(frozen=True)
class Part:
    """One file: its size, and the checksum of its header, which is all that stands before the data."""

    bytes: int
    crc32: int

    @classmethod
    def from_json(cls, value: Any, fault: Fault) -> Part:
        _fields(cls, value, fault)
        return cls(_count(value["bytes"], fault), _count(value["crc32"], fault))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint folder but the data of its tensors.

    Args:
        format: The version of the format; ``FORMAT`` or lower.
        fabric_lite: The version that wrote it; None from a checkout that is not installed.
        torch: torch's version then.
        world_size: How many ranks wrote it.
        strategy: The strategy's name then, if one was known.
        precision: The precision's name then, if one was known.
        content: The state as :func:`encode` returns it, its tensors numbered.
        tensors: The tensors, by number.
        parts: The files, by name; no other one belongs to the checkpoint.
    """

    format: int
    fabric_lite: str | None
    torch: str
    world_size: int
    strategy: str | None
    precision: str | None
    content: Any
    tensors: tuple[TensorEntry, ...]
    parts: dict[str, Part]

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read and check the manifest of ``folder``; no other file is looked at.

        Raises:
            CheckpointNotFoundError: There is no such folder.
            CheckpointError: The folder has no manifest, or it is damaged, or is of a newer format.
        """
        path = folder / MANIFEST
        try:
            with open_regular(path) as file:
                data = file.read()
        except (FileNotFoundError, NotADirectoryError) as error:
            if folder.is_dir():
                raise CheckpointDamagedError(
                    "This folder is no checkpoint, or one whose saving did not end.",
                    given=f"{folder} without {MANIFEST}",
                    fix="the folder that was given to fabric.save()",
                ) from error
            raise CheckpointNotFoundError(
                "There is no checkpoint of this name.",
                given=f"{folder}, seen from {Path.cwd()}",
                fix="the path that was given to fabric.save(); on several nodes, one that all of them see",
            ) from error
        except OSError as error:
            raise CheckpointError("This checkpoint could not be read.", given=f"{path}: {error}") from error
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from error
        manifest = Manifest.from_json(value, path)
        # Other letters can stand for the same values: \u00e9 and \u00E9.
        if _text(value) != data:
            raise _damaged(path, "its checksum fits, and it is not written as it was")
        return manifest

    def write(self, folder: Folder) -> None:
        """Write it into ``folder`` and onto the disk. Raises OSError, and CheckpointError for a store."""
        with (folder / MANIFEST).open("xb") as file:
            file.write(_text(self.to_json()))
            file.flush()
            with busy():
                os.fsync(file.fileno())

    def to_json(self) -> dict[str, Any]:
        """Return values that ``json.dumps`` takes, the checksum of all the others first."""
        body = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        body["tensors"] = [dataclasses.asdict(entry) for entry in self.tensors]
        body["parts"] = {name: dataclasses.asdict(part) for name, part in self.parts.items()}
        return {"checksum": _checksum(body), **body}

    @staticmethod
    def from_json(value: Any, path: Path) -> Manifest:
        """Return the manifest in what ``json.loads`` returned; ``path`` is for the errors.

        Raises:
            CheckpointError: It is damaged, or is of a newer format.
        """

        fault = _fault_in(path)
        if not isinstance(value, dict) or type(value.get("format")) is not int:
            fault("it has no format")
        if value["format"] > FORMAT:
            raise CheckpointError(
                "This checkpoint was written by a newer fabric_lite.",
                given=f"{path}, format {value['format']}, by version {value.get('fabric_lite')}",
                fix="a newer fabric_lite",
            )
        body = {key: item for key, item in value.items() if key != "checksum"}
        _fields(Manifest, body, fault)
        if _checksum(body) != value.get("checksum"):
            fault("its checksum does not fit")
        for name in ("fabric_lite", "strategy", "precision"):
            if body[name] is not None and not isinstance(body[name], str):
                fault(f"{name} is {body[name]!r:.80}")
        if not isinstance(body["torch"], str) or not isinstance(body["parts"], dict):
            fault("torch is no version, or parts are no object")
        _count(body["world_size"], fault)
        body["tensors"] = tuple(TensorEntry.from_json(entry, fault) for entry in _list(body["tensors"], fault))
        body["parts"] = {name: Part.from_json(part, fault) for name, part in body["parts"].items()}
        manifest = Manifest(**body)
        manifest._check_parts(fault)
        return manifest

    def check(self, path: Path) -> None:
        """Check that tensors and parts fit together; ``path`` is for the CheckpointError."""
        fault = _fault_in(path)
        for entry in self.tensors:
            entry.check(fault)
        self._check_parts(fault)

    def _check_parts(self, fault: Fault) -> None:
        for name in self.parts:
            if not is_part_name(name):
                fault(f"{name!r:.80} is no name of a part")
        for chunk in (chunk for entry in self.tensors for chunk in entry.chunks):
            if chunk.part not in self.parts or chunk.end > self.parts[chunk.part].bytes:
                fault(f"a piece of {chunk.name!r:.80} lies in no part")


Fault = Callable[[str], NoReturn]


def _checksum(body: dict[str, Any]) -> int:
    """CRC-32 of a manifest's values; their order counts."""
    return zlib.crc32(_text(body))


def _text(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _fields(kind: type, value: Any, fault: Fault) -> None:
    names = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(value, dict) or value.keys() != names:
        found = ", ".join(map(str, value)) if isinstance(value, dict) else repr(value)
        fault(f"the fields of a {kind.__name__} are {found:.200}")


def _list(value: Any, fault: Fault) -> list[Any]:
    if not isinstance(value, list):
        fault(f"{value!r:.80} is no list")
    return value


def _count(value: Any, fault: Fault) -> int:
    if type(value) is not int or value < 0:
        fault(f"{value!r:.80} is no whole number")
    return value


def _counts(value: Any, fault: Fault) -> tuple[int, ...]:
    return tuple(_count(item, fault) for item in _list(value, fault))


def _name(chunks: Iterable[Chunk]) -> str:
    return next((repr(chunk.name) for chunk in chunks), "a tensor")


def _fault_in(path: Path) -> Fault:
    def fault(what: str) -> NoReturn:
        raise _damaged(path, what)

    return fault


def _damaged(path: Path, where: str) -> CheckpointError:
    return CheckpointDamagedError(
        "A checkpoint's manifest is damaged.", given=f"{path}: {where}", fix="an earlier checkpoint"
    )
