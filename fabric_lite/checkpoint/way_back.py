"""The values that a load overwrites, kept until it has ended well.

Everything in a checkpoint is compared with its checksums before anything changes, so that only a disk that fails
afterward can interrupt a load. Even then the objects are to be as they were. A copy of them in memory would double
what a load takes; so the old values go into a nameless temporary file, tensor by tensor. It is never synced: as a rule
it lives and ends in the system's cache, and costs a copy: of the processor's time 0.25 to 0.4 s a GiB, where a copy in
memory takes 0.15 to 0.4 s, since it needs new pages as well, and one in a file of memory (memfd) 0.6 to 0.7 s. Where it
would not (more than a quarter of the memory that this machine, or its container, has for its ranks, or than half of the
free space for temporary files) nothing is kept, since the load would take twice as long, and an interrupted one says
what is mixed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fabric_lite.checkpoint.layout import is_sharded
from fabric_lite.checkpoint.memory import memory_bytes, read_system_file
from fabric_lite.checkpoint.part_writing import Blocks
from fabric_lite.checkpoint.stored import Located, Piece, StoredTensor, row_major
from fabric_lite.checkpoint.stored_files import OpenFile
from fabric_lite.collectives import world_size
from fabric_lite.errors import CheckpointError
from fabric_lite.movement import note_movement

__all__ = ["WayBack", "mixed"]

_RANKS_OF_A_MACHINE = 8  # as many as share its memory, at most, where it is not known better
_IN_MEMORY = {"tmpfs", "ramfs"}


class WayBack:
    """Keeps the values of tensors; a context manager. Tensors that share all of their memory are kept once.

    Args:
        tensors: All that is to be kept, tensors and DTensors, of which this rank's part counts.
    """

    def __init__(self, tensors: Sequence[Any]) -> None:
        self._blocks = Blocks()
        self._file: Any = None
        self._stored: OpenFile | None = None
        self._kept: set[Any] = set()
        plain = {_memory(local): local.numel() * local.itemsize for local in map(_local, tensors) if _is_plain(local)}
        with contextlib.suppress(OSError):  # no place for temporary files is no reason not to load
            folder = _folder()
            if folder is not None and 0 < sum(plain.values()) <= _room(folder):
                # Without a buffer: what could not be written is not tried again when it is closed.
                self._file = tempfile.TemporaryFile(prefix="fabric_lite_", dir=folder, buffering=0)  # noqa: SIM115
                self._stored = OpenFile(folder / "old values", self._file)

    def __enter__(self) -> WayBack:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def kept(self, tensors: Sequence[Any]) -> list[tuple[torch.Tensor, Any]] | None:
        """Keep these tensors as they are now; what :meth:`put_back` takes. None if there is no room for that.

        What was kept before is not kept again: what is put back last holds its first values.
        """
        pairs: list[tuple[torch.Tensor, Any]] = []
        for local in map(_local, tensors):
            if local.is_meta:  # it has no values
                continue
            if not _is_plain(local):
                pairs.append((local, local.clone()))
            elif _memory(local) not in self._kept:
                stored = self._written(local)
                if stored is None:
                    return None
                pairs.append((local, stored))
                self._kept.add(_memory(local))
        return pairs

    @staticmethod
    @torch.no_grad()
    def put_back(pairs: list[tuple[torch.Tensor, Any]]) -> None:
        """Give tensors the values that were kept. Raises CheckpointError if they can't be read."""
        for local, old in pairs:
            if isinstance(old, StoredTensor):
                old.read((0,) * local.dim(), local.shape, local)
            else:
                local.copy_(old)

    def _written(self, local: torch.Tensor) -> StoredTensor | None:
        if self._file is None or self._stored is None:
            return None if local.numel() else _empty(local)
        try:
            begin = self._file.seek(0, os.SEEK_END)
            for block in self._blocks.of(local):
                note_movement()
                while block:
                    block = block[self._file.write(block) :]
        except OSError:  # the space has gone since it was counted: this and what follows is not kept
            self._close()
            return None
        shape = tuple(local.shape)
        piece = Piece.at((0,) * local.dim(), shape, Located(self._stored, begin, row_major(shape)))
        return StoredTensor(local.dtype, local.shape, [piece] if local.numel() else [], row_major(shape))

    def _close(self) -> None:
        """Let go of the file, which what was kept in it still holds."""
        file, self._file, self._stored = self._file, None, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


def mixed(places: list[str], error: BaseException) -> CheckpointError:
    """The error for objects of which some values are new and some old."""
    return CheckpointError(
        f"Loading failed in the middle, and what was there before could not be put back: {', '.join(places)} "
        "may have some of its old values and some of its new ones.",
        given=error,
        fix="load it again, or start the run again",
    )


def _empty(local: torch.Tensor) -> StoredTensor:
    return StoredTensor(local.dtype, local.shape, [], row_major(tuple(local.shape)))


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return local.detach()


def _is_plain(local: torch.Tensor) -> bool:
    is_strided = type(local) is torch.Tensor and local.layout == torch.strided
    return is_strided and not local.is_quantized and not local.is_meta


def _memory(local: torch.Tensor) -> Any:
    """Which memory a plain tensor shows, and how."""
    if local.numel() == 0:
        return None
    flags = local.is_conj(), local.is_neg()
    return local.device, local.data_ptr(), local.dtype, local.shape, local.stride(), flags


def _folder() -> Path | None:
    """A folder for temporary files that is on a disk; None if there is none. Raises OSError."""
    folders = [Path(tempfile.gettempdir()), Path("/var/tmp")]
    return next((folder for folder in folders if folder.is_dir() and _file_system(folder) not in _IN_MEMORY), None)


def _file_system(folder: Path) -> str:
    """The kind of file system that a folder is on, as Linux calls it; "" where that can't be told."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}" if hasattr(os, "major") else ""
    for line in read_system_file("/proc/self/mountinfo").splitlines():
        mount, _, system = line.partition(" - ")
        if mount.split()[2] == number:
            return system.split()[0]
    return ""


def _room(folder: Path) -> int:
    """How many bytes this rank may keep in a folder. Raises OSError."""
    ranks = min(world_size(), _RANKS_OF_A_MACHINE)
    return min(memory_bytes() // 4, shutil.disk_usage(folder).free // 2) // ranks
