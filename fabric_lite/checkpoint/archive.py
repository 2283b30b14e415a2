"""The file: what ``torch.save`` writes, with a manifest as one more record of the same zip.

The manifest (``fabric_lite.json``) lists every record with its size and CRC-32, and the tensors that live in it. So
one rename commits data and manifest together, and plain ``torch.load(path, weights_only=True)`` reads the file.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from fabric_lite.errors import CheckpointError

__all__ = ["FORMAT", "MANIFEST", "CheckpointNotFoundError", "damaged", "manifest_of", "read_manifest"]

FORMAT = 1
MANIFEST = "fabric_lite.json"


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint under this name."""


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


def damaged(path: Path, where: str) -> CheckpointError:
    """The error for a file that is not as it was written."""
    return CheckpointError(
        "This file is damaged, or is no checkpoint.", given=f"{path}: {where}", fix="an earlier checkpoint"
    )
