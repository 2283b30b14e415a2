"""The file: what ``torch.save`` writes, with a manifest as one more record of the same zip.

The manifest (``fabric_lite.json``) lists every record with its size and CRC-32, and the tensors that live in it. So
one rename commits data and manifest together, and plain ``torch.load(path, weights_only=True)`` reads the file.
What lies around the records has a checksum in the zip's comment: :mod:`fabric_lite.checkpoint.seal`.
"""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

from fabric_lite.errors import CheckpointDamagedError, CheckpointError

__all__ = [
    "FORMAT",
    "MANIFEST",
    "CheckpointNotFoundError",
    "damaged",
    "manifest_of",
    "not_found",
    "read_manifest",
    "records_of",
]

FORMAT = 1
MANIFEST = "fabric_lite.json"


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint under this name."""


def not_found(path: Path) -> CheckpointNotFoundError:
    """The error for a name under which there is nothing."""
    return CheckpointNotFoundError(
        "There is no checkpoint of this name.",
        given=f"{path}, seen from {Path.cwd()}",
        fix="the path that was given to fabric.save(); on several nodes, one that all of them see",
    )


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


def manifest_of(archive: zipfile.ZipFile, path: Path) -> dict[str, Any] | None:
    """Return the manifest in an open file; None if it has none.

    Raises:
        CheckpointError: It is damaged, or of a newer format.
    """
    found = records_of(archive, path).get(MANIFEST)
    if found is None:
        return None
    if found.compress_type != zipfile.ZIP_STORED:  # a small file could unpack to any size
        raise damaged(path, f"{MANIFEST} is compressed")
    try:
        manifest: dict[str, Any] = json.loads(archive.read(found))
    except (ValueError, RuntimeError, EOFError, struct.error, zipfile.BadZipFile) as error:
        raise damaged(path, f"{MANIFEST}: {type(error).__name__}: {error}") from error
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise damaged(path, f"{MANIFEST} has no format")
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            "This checkpoint was written by a newer fabric_lite.",
            given=f"{path}, format {manifest['format']}, by version {manifest.get('fabric_lite')}",
            fix="a newer fabric_lite, or plain torch.load(path, weights_only=True)",
        )
    return manifest


def records_of(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the records of an open file by their names, without the folder that torch puts around them.

    Raises:
        CheckpointError: Two have one name: then a checksum of the one says nothing of the other, which is read.
    """
    records: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.split("/", 1)[-1]
        if name in records:
            raise damaged(path, f"there are two records of the name {name}")
        records[name] = info
    return records


def damaged(path: Path, where: str) -> CheckpointError:
    """The error for a file that is not as it was written."""
    return CheckpointDamagedError(
        "This file is damaged, or is no checkpoint.", given=f"{path}: {where}", fix="an earlier checkpoint"
    )
