"""Reading a checkpoint folder: the manifest says what is where, and every byte has a checksum."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import torch

from fabric_lite.checkpoint.archive import not_found
from fabric_lite.checkpoint.manifest import DTYPES, Chunk, Manifest, TensorEntry, decode, is_part_name
from fabric_lite.checkpoint.stored import Located, Piece, StoredTensor, row_major
from fabric_lite.checkpoint.stored_files import OpenFolder, crc32_of, read_bytes
from fabric_lite.errors import CheckpointDamagedError, CheckpointError

__all__ = ["CheckpointFolder", "read_folder", "verify_folder"]

_LENGTH_BYTES = 8  # what stands before the header of a safetensors file


class CheckpointFolder:
    """A folder of :func:`fabric_lite.checkpoint.save`.

    It is opened now and stays the one that is read, also when its name gets a new content.

    Raises:
        CheckpointNotFoundError: There is no such folder.
        CheckpointError: It is no finished checkpoint, or its manifest is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._folder = OpenFolder(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise not_found(path) from error
        except OSError as error:
            raise CheckpointError("This checkpoint could not be read.", given=f"{path}: {error}") from error
        self.manifest = Manifest.read(path)
        if not self._folder.is_current():
            raise CheckpointError("This checkpoint was replaced while it was opened.", given=path, fix="load it again")

    @property
    def source(self) -> object:
        """What every tensor in it refers to until it has been read."""
        return self._folder

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        """Compare the parts with the manifest.

        Args:
            share: (0, 2) reads the one half of the data, (1, 2) the other: each byte needs only one rank that reads it.

        Raises:
            CheckpointError: A part is missing, is too many, or is damaged.
        """
        parts = {name for name in self._folder.names() if is_part_name(name)}
        extra = parts - set(self.manifest.parts)
        if extra:
            raise _damaged(self._path / min(extra), "the manifest does not list this part")
        chunks = [chunk for entry in self.manifest.tensors for chunk in entry.chunks]
        self._check_parts(chunks, share)
        for chunk in chunks[share[0] :: share[1]]:
            file = self._folder.file(chunk.part)
            with file.opened() as descriptor:
                if crc32_of(descriptor, file.path, chunk.begin, chunk.end) != chunk.crc32:
                    raise _damaged(file.path, f"{chunk.name}, in bytes {chunk.begin} to {chunk.end}")

    def content(self) -> Any:
        """Return what is in the folder, with a StoredTensor for each tensor; CheckpointError if it is damaged."""
        stored = [self._stored(entry) for entry in self.manifest.tensors]
        return decode(self.manifest.content, stored.__getitem__)

    def _check_parts(self, chunks: list[Chunk], share: tuple[int, int]) -> None:
        """Sizes of all parts, and the headers of this share of them; the data must follow without a gap."""
        ends: dict[str, list[tuple[int, int]]] = {name: [] for name in self.manifest.parts}
        for chunk in chunks:
            ends[chunk.part].append((chunk.begin, chunk.end))
        for number, (name, part) in enumerate(self.manifest.parts.items()):
            file = self._folder.file(name)
            with file.opened() as descriptor:
                size = os.fstat(descriptor).st_size
                if size != part.bytes:
                    raise _damaged(file.path, f"{size} bytes, and {part.bytes} in the manifest")
                if number % share[1] != share[0]:
                    continue
                begin = _LENGTH_BYTES + struct.unpack("<Q", read_bytes(descriptor, file.path, 0, _LENGTH_BYTES))[0]
                if begin > size or crc32_of(descriptor, file.path, 0, begin) != part.crc32:
                    raise _damaged(file.path, "its header")
            for first, past in sorted(ends[name]):
                if first != begin:
                    raise _damaged(file.path, f"bytes {begin} to {first} are not of one tensor")
                begin = past
            if begin != size:
                raise _damaged(file.path, f"bytes {begin} to {size} belong to no tensor")

    def _stored(self, entry: TensorEntry) -> StoredTensor:
        pieces = []
        for chunk in entry.chunks:
            located = Located(self._folder.file(chunk.part), chunk.begin, row_major(chunk.shape))
            pieces.append(Piece.at(chunk.offset, chunk.shape, located))
        return StoredTensor(DTYPES[entry.dtype], torch.Size(entry.shape), pieces, row_major(entry.shape))


def read_folder(path: Path) -> Any:
    """Return what a checkpoint folder holds, with a StoredTensor for each tensor; its parts are not compared.

    Raises what :class:`CheckpointFolder` and its methods raise.
    """
    return CheckpointFolder(path).content()


def verify_folder(path: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Compare all of a checkpoint folder, or a share of it, with its checksums: :meth:`CheckpointFolder.verify`."""
    CheckpointFolder(path).verify(share)


def _damaged(path: Path, where: str) -> CheckpointError:
    return CheckpointDamagedError("This checkpoint is damaged.", given=f"{path}: {where}", fix="an earlier checkpoint")
