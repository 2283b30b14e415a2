"""The values that a load overwrites, kept until it has ended well.

Everything in a checkpoint is compared with its checksums before anything changes, so that only a disk that fails
afterwards can interrupt a load. Even then the objects are to be as they were. A copy of them in memory would double
what a load takes; so the old values go into a nameless temporary file, tensor by tensor. It is never synced: as a rule
it lives and ends in the system's cache, and costs a copy. Where it would not (more than a quarter of this machine's
memory, over its ranks, or than half of the free space for temporary files) nothing is kept, since the load would take
twice as long, and an interrupted one says what is mixed.
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
from fabric_lite.checkpoint.part_writing import Blocks
from fabric_lite.checkpoint.stored import Located, Piece, StoredTensor, row_major
from fabric_lite.checkpoint.stored_files import OpenFile
from fabric_lite.collectives import world_size
from fabric_lite.errors import CheckpointError

__all__ = ["WayBack", "mixed"]

_RANKS_OF_A_MACHINE = 8  # as many as share its memory, at most, where it is not known better


class WayBack:
    """Keeps the values of tensors; a context manager.

    Args:
        tensors: All that is to be kept, tensors and DTensors, of which this rank's part counts.
    """

    def __init__(self, tensors: Sequence[Any]) -> None:
        self._blocks = Blocks()
        self._file: Any = None
        self._stored: OpenFile | None = None
        bytes_needed = sum(local.numel() * local.itemsize for local in map(_local, tensors) if _is_plain(local))
        with contextlib.suppress(OSError):  # no place for temporary files is no reason not to load
            if 0 < bytes_needed <= _room():
                self._file = tempfile.TemporaryFile(prefix="fabric_lite_")  # noqa: SIM115 (__exit__ closes it)
                self._stored = OpenFile(Path(tempfile.gettempdir()) / "old values", self._file)

    def __enter__(self) -> WayBack:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._stored = None

    def kept(self, tensors: Sequence[Any]) -> list[tuple[torch.Tensor, Any]] | None:
        """Keep these tensors as they are now; what :meth:`put_back` takes. None if there is no room for that."""
        pairs: list[tuple[torch.Tensor, Any]] = []
        for local in map(_local, tensors):
            if not _is_plain(local):
                pairs.append((local, local.clone()))
                continue
            stored = self._written(local)
            if stored is None:
                return None
            pairs.append((local, stored))
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
        begin = self._file.seek(0, os.SEEK_END)
        try:
            for block in self._blocks.of(local):
                self._file.write(block)
            self._file.flush()
        except OSError:  # the space has gone since it was counted: this and what follows is not kept
            self.__exit__()
            return None
        shape = tuple(local.shape)
        piece = Piece.at((0,) * local.dim(), shape, Located(self._stored, begin, row_major(shape)))
        return StoredTensor(local.dtype, local.shape, [piece] if local.numel() else [], row_major(shape))


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
    return type(local) is torch.Tensor and local.layout == torch.strided and not local.is_quantized


def _room() -> int:
    """How many bytes this rank may keep."""
    names = getattr(os, "sysconf_names", {})
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in names else 8 << 30
    ranks = min(world_size(), _RANKS_OF_A_MACHINE)
    return min(memory // 4, shutil.disk_usage(tempfile.gettempdir()).free // 2) // ranks
