"""What kind of checkpoint is at a path, and its reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from fabric_lite.checkpoint.archive_reading import ArchiveFile
from fabric_lite.checkpoint.commit import recovered
from fabric_lite.checkpoint.dcp_reading import METADATA, DcpFolder
from fabric_lite.checkpoint.folder_reading import CheckpointFolder
from fabric_lite.checkpoint.safetensors import SafetensorsFile
from fabric_lite.errors import CheckpointError, FabricValueError

__all__ = ["StoredCheckpoint", "opened"]


class StoredCheckpoint(Protocol):
    """A checkpoint that is open for reading."""

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        """Compare it with its checksums, where it has any.

        Args:
            share: (0, 2) reads the one half of the data, (1, 2) the other: each byte needs only one rank that reads it.

        Raises:
            CheckpointError: It is damaged.
        """

    def content(self) -> Any:
        """Return what is in it as plain data, with a StoredTensor for each tensor.

        Raises:
            CheckpointError: It is damaged, or can't be read without running code.
        """


def opened(path: Path, weights_only: bool | None = None) -> StoredCheckpoint:
    """Open the checkpoint at ``path``.

    Args:
        path: A file of :func:`fabric_lite.checkpoint.save`, of ``torch.save`` or of Lightning Fabric, a
            ``.safetensors`` file, a folder of ours, or one of ``torch.distributed.checkpoint``.
        weights_only: None and True run no code. False lets a file of ``torch.save`` run any; no other one can.

    Raises:
        CheckpointNotFoundError: There is nothing of this name.
        CheckpointError: It is no checkpoint, or damaged.
        FabricValueError: ``weights_only=False`` for something else than a file of ``torch.save``.
    """
    path = recovered(path)
    is_folder = path.is_dir()
    if path.exists() and not is_folder and not path.is_file():  # opening a pipe would wait for a writer
        raise CheckpointError(
            "A checkpoint is a regular file or a folder.",
            given=f"{path}: a pipe, a socket or a device",
            fix="a path on disk; what comes out of a pipe is to be written to a file first",
        )
    is_flat = not is_folder and path.suffix == ".safetensors"
    if weights_only is False and (is_folder or is_flat):
        raise FabricValueError(
            "weights_only=False is for one file of torch.save; nothing else may hold code.",
            given=f"{path}, a {'folder' if is_folder else 'safetensors file'}",
            fix="leave weights_only out",
        )
    if is_flat:
        return SafetensorsFile(path)
    if not is_folder:
        return ArchiveFile(path, weights_only)
    return DcpFolder(path) if (path / METADATA).exists() else CheckpointFolder(path)
