"""What kind of checkpoint is at a path, and its reader."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from fabric_lite.checkpoint.archive_reading import ArchiveFile
from fabric_lite.checkpoint.commit import recovered
from fabric_lite.checkpoint.dcp_reading import METADATA, DcpFolder
from fabric_lite.checkpoint.folder_reading import CheckpointFolder
from fabric_lite.checkpoint.remote import RemotePath, Target, fetched
from fabric_lite.checkpoint.safetensors import SafetensorsFile
from fabric_lite.errors import CheckpointError, FabricError, FabricValueError

__all__ = ["StoredCheckpoint", "checked_content", "opened"]


class StoredCheckpoint(Protocol):
    """A checkpoint that is open for reading."""

    @property
    def source(self) -> object:
        """What every tensor in it refers to until it has been read."""

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


class _Fetched:
    """A checkpoint of a store: a local copy is opened, which is there for as long as anything of it is used."""

    def __init__(self, path: RemotePath, weights_only: bool | None) -> None:
        self._url = path.url
        self._folder = tempfile.mkdtemp(prefix="fabric_lite_")
        with self._named():
            self._checkpoint = opened(fetched(path, Path(self._folder)), weights_only)
        weakref.finalize(self._checkpoint.source, shutil.rmtree, self._folder, ignore_errors=True)

    @property
    def source(self) -> object:
        return self._checkpoint.source

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        del share  # each rank has a copy of its own
        with self._named():
            self._checkpoint.verify()

    def content(self) -> Any:
        with self._named():
            return self._checkpoint.content()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors name the checkpoint as the user did, not its copy, which is of no use then."""
        try:
            yield
        except BaseException as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            if isinstance(error, FabricError):
                parent = self._url.rstrip("/").rsplit("/", 1)[0]
                error.args = (str(error).replace(self._folder, parent),)
            raise


def opened(path: Target, weights_only: bool | None = None) -> StoredCheckpoint:
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
    if isinstance(path, RemotePath):
        return _Fetched(path, weights_only)
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


def checked_content(path: Target, share: tuple[int, int] = (0, 1)) -> Any:
    """Open a checkpoint, compare this share of it with its checksums, and return what is in it.

    Raises:
        CheckpointNotFoundError: There is nothing of this name.
        CheckpointDamagedError: It is damaged, or is no checkpoint.
        CheckpointError: It could not be read.
        OSError: The same, of the name itself.
    """
    checkpoint = opened(path)
    checkpoint.verify(share)
    return checkpoint.content()
