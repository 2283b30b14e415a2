"""The file: what ``torch.save`` writes, with a manifest as one more record of the same zip.

The manifest (``fabric_lite.json``) lists every record with its size and CRC-32, and the tensors that live in it. So
one rename commits data and manifest together, and plain ``torch.load(path, weights_only=True)`` reads the file.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils.serialization import config

from fabric_lite.checkpoint.packing import storages
from fabric_lite.checkpoint.plain import Place, tensors_in
from fabric_lite.collectives import world_size
from fabric_lite.errors import CheckpointError

__all__ = ["FORMAT", "MANIFEST", "CheckpointNotFoundError", "damaged", "manifest_of", "read_manifest", "write_archive"]

FORMAT = 1
MANIFEST = "fabric_lite.json"
_LOCAL_HEADER = 30  # bytes of a zip record's fixed header; its last four are the lengths of name and extra field
_CHUNK = 1 << 24

_Records = dict[str, tuple[torch.UntypedStorage, list[dict[str, Any]]]]


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint under this name."""


def write_archive(file: BinaryIO, content: dict[Any, Any]) -> None:
    """Write packed plain data into an empty file that is open for reading and writing.

    The checksums are computed in a thread beside the writing, by zlib instead of torch's slower CRC-32, and also put
    into the zip's directory, so that any zip tool can check the file.
    """
    records = _storage_records(content)
    with ThreadPoolExecutor(1) as thread:
        checksums = thread.submit(lambda: {name: _crc32_of(storage) for name, (storage, _) in records.items()})
        with config.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
            torch.save(content, file)
        crc_by_name = checksums.result()
    with zipfile.ZipFile(file, "a", zipfile.ZIP_STORED) as archive:
        described = _describe(archive, file, records, crc_by_name)
        folder = archive.infolist()[0].filename.split("/", 1)[0]
        archive.writestr(zipfile.ZipInfo(f"{folder}/{MANIFEST}"), json.dumps(_manifest(described)))


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Return the manifest of a file; None for a file that something else wrote.

    Raises:
        CheckpointError: The file or its manifest is damaged.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return None
        try:
            with zipfile.ZipFile(file) as archive:
                return manifest_of(archive, path)
        except zipfile.BadZipFile as error:
            raise damaged(path, str(error)) from error


def _storage_records(content: Any) -> _Records:
    """Each storage under the record name that ``torch.save`` gives it, with a description of its tensors."""
    names: dict[int, str] = {}
    records: _Records = {}
    for place, tensor in tensors_in(content, Place()):
        for storage in storages(tensor):
            name = names.setdefault(storage._cdata, f"data/{len(names)}")
            _, tensors = records.setdefault(name, (storage, []))
            tensors.append({"key": str(place), "dtype": str(tensor.dtype)[6:], "shape": list(tensor.shape)})
    return records


def _describe(
    archive: zipfile.ZipFile, file: BinaryIO, records: _Records, crc_by_name: dict[str, int]
) -> dict[str, dict[str, Any]]:
    """Put the checksums into the zip's directory and return the manifest's entry of each record."""
    described: dict[str, dict[str, Any]] = {}
    for info in archive.infolist():
        name = info.filename.split("/", 1)[1]
        info.CRC = crc_by_name[name] if name in crc_by_name else _crc32_in_file(file, info)
        described[name] = {"bytes": info.file_size, "crc32": info.CRC}
        if name in records:
            described[name]["tensors"] = records[name][1]
    sizes = {name: record["bytes"] for name, record in described.items() if name.startswith("data/")}
    if sizes != {name: storage.nbytes() for name, (storage, _) in records.items()}:
        raise CheckpointError("This torch names the parts of its files in another way.", given=torch.__version__)
    return described


def _manifest(records: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "fabric_lite": _own_version(),
        "torch": str(torch.__version__),
        "world_size": world_size(),
        "records": records,
    }


@functools.cache
def _own_version() -> str | None:
    try:
        return importlib.metadata.version("fabric-lite")
    except importlib.metadata.PackageNotFoundError:  # used from a checkout that is not installed
        return None


def manifest_of(archive: zipfile.ZipFile, path: Path) -> dict[str, Any] | None:
    """Return the manifest in an open file; None if it has none. CheckpointError if it is of a newer format."""
    found = [info for info in archive.infolist() if info.filename.split("/", 1)[-1] == MANIFEST]
    if not found:
        return None
    manifest: dict[str, Any] = json.loads(archive.read(found[0]))
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            "This checkpoint was written by a newer fabric_lite.",
            given=f"{path}, format {manifest['format']}, by version {manifest['fabric_lite']}",
            fix="a newer fabric_lite, or plain torch.load(path, weights_only=True)",
        )
    return manifest


def _crc32_in_file(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER:
        return -1
    name_length, extra_length = struct.unpack("<HH", header[-4:])
    file.seek(name_length + extra_length, 1)
    checksum, left = 0, info.file_size
    while left > 0:
        chunk = file.read(min(left, _CHUNK))
        if not chunk:
            return -1
        checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
    return checksum


def _crc32_of(storage: torch.UntypedStorage) -> int:
    return zlib.crc32(torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data) if storage.nbytes() else 0


def damaged(path: Path, where: str) -> CheckpointError:
    """The error for a file that is not as it was written."""
    return CheckpointError(
        "This file is damaged, or is no checkpoint.", given=f"{path}: {where}", fix="an earlier checkpoint"
    )
