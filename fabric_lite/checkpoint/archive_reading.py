"""Reading the file: checksums first, then what is in it, its tensors left in the file until they are asked for."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import os
import pickle
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fabric_lite.checkpoint.archive import (
    MANIFEST,
    damaged,
    manifest_of,
    not_found,
    records_of,
)
from fabric_lite.checkpoint.memory import is_out_of_memory
from fabric_lite.checkpoint.plain import Place, tensors_in
from fabric_lite.checkpoint.seal import begin_of_data, checksum_around, is_seal, sealed_checksum
from fabric_lite.checkpoint.stored import Located, Piece, Storage, StoredTensor
from fabric_lite.checkpoint.stored_files import OpenFile, StoredFile, Window, crc32_of, read_bytes
from fabric_lite.collectives import rank
from fabric_lite.errors import CheckpointDamagedError, CheckpointError

__all__ = ["ArchiveFile", "errors_of", "located_tensor", "read_archive"]

_TRUST = "load(..., weights_only=False) if you trust whoever wrote it"
# How a file begins: a zip, a pickle, or the number before a pickle of a protocol without a first byte of its own.
_BEGINNINGS = (b"PK", b"\x80", f"L{torch.serialization.MAGIC_NUMBER}L\n".encode())
_TAR, _TAR_AT = b"ustar", 257  # torch before 0.1.10; the bytes that tell a tar come after the first file's name


class ArchiveFile:
    """A file of :func:`fabric_lite.checkpoint.save`, of plain ``torch.save`` or of Lightning Fabric.

    It is opened now and stays the one that is read, also when its name gets a new content.

    Args:
        path: The file.
        weights_only: None and True run no code of the file. False lets it run any, and warns.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CheckpointError: It could not be opened, or begins as no checkpoint does.
    """

    def __init__(self, path: Path, weights_only: bool | None = None) -> None:
        self._path = path
        self._weights_only = weights_only is not False
        if not self._weights_only and rank() == 0:
            warnings.warn(
                f"weights_only=False lets {path} run any code while it is loaded; only do this with files you trust.",
                stacklevel=2,
            )
        with errors_of(path), path.open("rb") as file:
            _check_beginning(path, file.read(_TAR_AT + len(_TAR)))
            self._file = OpenFile(path, file)

    @property
    def source(self) -> object:
        """What every tensor in it refers to until it has been read."""
        return self._file

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        """Compare the file with its manifest. Files of others have none and are not checked.

        Args:
            share: (0, 2) reads the one half of the records, (1, 2) the other: each needs only one rank that reads it.

        Raises:
            CheckpointError: It is damaged, or is of a newer format.
        """
        with errors_of(self._path, _TRUST), self._file.opened() as descriptor:
            if not _is_zip(descriptor):
                return  # the format of torch before 1.6, or no checkpoint: torch.load tells
            with zipfile.ZipFile(self._stream(descriptor)) as archive:
                manifest = manifest_of(archive, self._path)
                records = records_of(archive, self._path)
                comment = archive.comment
            if manifest is not None:
                self._compare(descriptor, records, manifest["records"], share)
            if (manifest is not None and manifest.get("sealed")) or is_seal(comment):
                self._check_seal(descriptor, records, manifest, comment, share)

    def content(self) -> Any:
        """Return what is in the file. Plain tensors are left in it; those of other kinds are mapped into memory.

        Raises:
            CheckpointError: It is damaged, or no checkpoint, or can't be read without running code.
        """
        with errors_of(self._path, _TRUST), self._file.opened() as descriptor:
            in_place = _is_zip(descriptor) and self._is_in_place(descriptor)
            if in_place and self._weights_only:
                content = self._left_in_file(descriptor)
                if content is not None:
                    return content
            # The file that was checked, and not one that has its name by now.
            own = Path(f"/proc/self/fd/{descriptor}")
            source = own if in_place and own.exists() else self._stream(descriptor)
            return torch.load(source, map_location="cpu", weights_only=self._weights_only, mmap=source is own)

    def _compare(
        self, descriptor: int, infos: dict[str, zipfile.ZipInfo], listed: dict[str, Any], share: tuple[int, int]
    ) -> None:
        unlisted = set(infos) - set(listed) - {MANIFEST}
        if unlisted:
            raise damaged(self._path, f"record {min(unlisted)} is not in the manifest")
        for number, (name, record) in enumerate(listed.items()):
            info = infos.get(name)
            sound = info is not None and info.file_size == record["bytes"]
            if info is not None and sound and number % share[1] == share[0]:
                begin = _data_begin(descriptor, self._path, info)
                sound = crc32_of(descriptor, self._path, begin, begin + info.file_size) == record["crc32"]
            if not sound:
                tensors = [tensor["key"] for tensor in record.get("tensors", [])]
                raise damaged(self._path, ", ".join(tensors) if tensors else f"record {name}")

    def _check_seal(
        self,
        descriptor: int,
        records: dict[str, zipfile.ZipInfo],
        manifest: Any,
        comment: bytes,
        share: tuple[int, int],
    ) -> None:
        if manifest is None:
            raise damaged(self._path, f"it has lost its {MANIFEST}")
        if not is_seal(comment):
            raise damaged(self._path, "it has lost its seal, at the end")
        if share[0] != 0:
            return
        checksum = checksum_around(
            records.values(),
            os.fstat(descriptor).st_size,
            functools.partial(read_bytes, descriptor, self._path),
            functools.partial(crc32_of, descriptor, self._path),
        )
        if sealed_checksum(comment) != b"%08x" % checksum:
            raise damaged(self._path, "a header, or the zip's directory")

    def _is_in_place(self, descriptor: int) -> bool:
        """Whether the bytes of the tensors lie in the file as they lie in memory."""
        with zipfile.ZipFile(self._stream(descriptor)) as archive:
            records = records_of(archive, self._path)
            if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
                return False
            order = archive.read(records["byteorder"]).decode() if "byteorder" in records else sys.byteorder
        return order == sys.byteorder

    def _left_in_file(self, descriptor: int) -> Any:
        """What is in the file, with a StoredTensor for each tensor; None if it has other kinds of tensors."""
        with zipfile.ZipFile(self._stream(descriptor)) as archive:
            infos = {name: info for name, info in records_of(archive, self._path).items() if info.file_size}
        records = {_data_begin(descriptor, self._path, info): info.file_size for info in infos.values()}
        try:
            content = torch.load(self._stream(descriptor), map_location="meta", weights_only=True)
        except NotImplementedError:  # quantized tensors can't be on the meta device
            return None
        memo: dict[int, Any] = {}
        tensors = list(tensors_in(content, Place()))
        data = {_data_begin(descriptor, self._path, info) for name, info in infos.items() if name.startswith("data/")}
        for place, tensor in tensors:
            storage = _storage_of(tensor, self._file, 0)
            if storage is None or (storage.bytes and records.get(storage.begin, -1) < storage.bytes):
                return None
            if not _fits(tensor, storage):
                raise damaged(self._path, f"{place} reaches beyond its bytes")
            memo[id(tensor)] = _stored_as(tensor, storage)
            data.discard(storage.begin)
        if data:  # a tensor in a set, or an object's attribute, would stay on the meta device
            return None
        return copy.deepcopy(content, memo)

    def _stream(self, descriptor: int) -> io.BufferedReader:
        return io.BufferedReader(Window(descriptor, self._path, 0, os.fstat(descriptor).st_size))


def read_archive(path: Path, weights_only: bool | None = None) -> Any:
    """Return what a checkpoint file holds after its checksums were compared; its tensors stay in the file.

    Raises what :class:`ArchiveFile` and its methods raise.
    """
    archive = ArchiveFile(path, weights_only)
    archive.verify()
    return archive.content()


def located_tensor(file: StoredFile, begin: int, length: int) -> StoredTensor | None:
    """Return the one tensor that ``torch.save`` wrote into these bytes of a file; None if it is no plain tensor.

    Raises:
        CheckpointError: The bytes are damaged, or can't be read without running code.
    """
    with errors_of(file.path), file.opened() as descriptor:
        stream = io.BufferedReader(Window(descriptor, file.path, begin, length))
        tensor = torch.load(stream, map_location="meta", weights_only=True)
    storage = _storage_of(tensor, file, begin) if isinstance(tensor, torch.Tensor) else None
    if storage is None or storage.begin + storage.bytes > begin + length or not _fits(tensor, storage):
        return None
    return _stored_as(tensor, storage)


def _storage_of(tensor: torch.Tensor, file: StoredFile, begin: int) -> Storage | None:
    """Where the memory of a tensor that torch has put on the meta device lies; None if it is no plain tensor."""
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.is_quantized or vars(tensor):
        return None
    if tensor.requires_grad or tensor.is_conj() or tensor.is_neg():
        return None
    storage = tensor.untyped_storage()
    offset = getattr(storage, "_checkpoint_offset", None)
    return None if offset is None else Storage(file, begin + offset, storage.nbytes(), int(tensor.storage_offset()))


def _fits(tensor: torch.Tensor, storage: Storage) -> bool:
    if tensor.numel() == 0:
        return True
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (storage.offset + reach) * tensor.itemsize <= storage.bytes


def _stored_as(tensor: torch.Tensor, storage: Storage) -> StoredTensor:
    located = Located(storage.file, storage.begin + storage.offset * tensor.itemsize, tensor.stride())
    piece = Piece.at((0,) * tensor.dim(), tensor.shape, located)
    return StoredTensor(tensor.dtype, tensor.shape, [piece], tensor.stride(), storage)


def _check_beginning(path: Path, beginning: bytes) -> None:
    """torch takes any file for a pickle, and advises to run its code."""
    if beginning.startswith(_BEGINNINGS) or beginning[_TAR_AT:] == _TAR:
        return
    raise CheckpointDamagedError(
        "This file is no checkpoint, or its beginning is damaged.",
        given=f"{path}: it begins with {beginning[:16]!r}" if beginning else f"{path}: it is empty",
        fix="a file or folder of fabric.save(), a file of torch.save(), or a safetensors file named NAME.safetensors",
    )


def _is_zip(descriptor: int) -> bool:
    return os.fstat(descriptor).st_size > 1 and read_bytes(descriptor, Path(), 0, 2) == b"PK"


def _data_begin(descriptor: int, path: Path, info: zipfile.ZipInfo) -> int:
    return begin_of_data(info, functools.partial(read_bytes, descriptor, path))


@contextlib.contextmanager
def errors_of(path: Path, way_out: str = "a checkpoint without code in it") -> Iterator[None]:
    """What can go wrong while a file is read, as a CheckpointError that names it; but a lack of memory as it is.

    Args:
        path: The file.
        way_out: What to do if it holds code.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise not_found(path) from error
    except OSError as error:
        raise CheckpointError("This checkpoint could not be read.", given=f"{path}: {error}") from error
    except pickle.UnpicklingError as error:
        # torch's message goes on with advice on its own functions
        reason = str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0]
        raise CheckpointDamagedError(
            "This file can't be read without running code from it, or it is damaged.",
            given=f"{path}: {reason}",
            fix=way_out,
        ) from error
    except Exception as error:  # torch.load raises any type for a file that is cut short or is something else
        if is_out_of_memory(error):
            raise
        raise damaged(
            path, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        ) from error
