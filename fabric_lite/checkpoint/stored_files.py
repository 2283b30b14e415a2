"""The files of a checkpoint that is being loaded: they stay the same ones when a new checkpoint takes their name."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import stat
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from fabric_lite.errors import CheckpointDamagedError, CheckpointError
from fabric_lite.movement import note_movement

__all__ = ["FileOfFolder", "OpenFile", "OpenFolder", "StoredFile", "Window", "crc32_of", "read_bytes", "read_into"]

_STEP = 1 << 22
_LONGEST_READ = 1 << 26  # bytes, so that a slow disk is seen to get on


class StoredFile(Protocol):
    """A file of a checkpoint: ``path`` is for messages, ``opened`` gives a descriptor for as long as it is needed."""

    @property
    def path(self) -> Path: ...

    def opened(self) -> contextlib.AbstractContextManager[int]: ...


class OpenFile:
    """A file that stays open until nothing refers to it: what was checked is what is read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        yield self._descriptor


class OpenFolder:
    """A folder that stays open until nothing refers to it: no file of a newer checkpoint is taken for one of its own.

    Raises OSError if there is no such folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        if os.open in os.supports_dir_fd:
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)

    def is_current(self) -> bool:
        """Whether the name still leads to this folder."""
        if self._descriptor is None:
            return True
        return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))

    def names(self) -> list[str]:
        """The names in it."""
        return sorted(os.listdir(self.path if self._descriptor is None else self._descriptor))

    def file(self, name: str) -> FileOfFolder:
        """Return its file of this name; whether there is one is seen when it is opened."""
        return FileOfFolder(self, name)

    def open(self, name: str) -> int:
        """Return a descriptor of the regular file of this name.

        Raises:
            CheckpointError: The name leads out of the folder, or the file is a link or anything else, or is missing.
        """
        if os.path.basename(name) != name or name in ("", ".", "..") or "\\" in name:
            raise CheckpointError(
                "A checkpoint names a file outside of its folder.",
                given=f"{self.path}: {name!r:.80}",
                fix="a checkpoint from a source that you trust",
            )
        # Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
        flags = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
        try:
            if (self.path / name).is_symlink():
                raise _irregular(self.path / name)
            if self._descriptor is None:
                descriptor = os.open(self.path / name, flags)
            else:
                descriptor = os.open(name, flags, dir_fd=self._descriptor)
        except OSError as error:
            raise _unreadable(self.path / name, error) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise _irregular(self.path / name)
        return descriptor


@dataclasses.dataclass(frozen=True)
class FileOfFolder:
    """A file of an open folder; opened for each read, for a folder may have more files than a process may open."""

    folder: OpenFolder
    name: str

    @property
    def path(self) -> Path:
        return self.folder.path / self.name

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        descriptor = self.folder.open(self.name)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


class Window(io.RawIOBase):
    """Some bytes of an open file as a file of their own."""

    def __init__(self, descriptor: int, path: Path, begin: int, length: int) -> None:
        super().__init__()
        self._descriptor, self._path, self._begin, self._length = descriptor, path, begin, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        memory = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        read_into(self._descriptor, self._path, memory, self._begin + self._position)
        self._position += len(memory)
        return len(memory)


def read_into(descriptor: int, path: Path, memory: memoryview, begin: int) -> None:
    """Fill ``memory`` with the bytes of a file from ``begin`` on.

    Raises:
        CheckpointError: The file ends before, or the disk fails.
    """
    done = 0
    while done < len(memory):
        try:
            count = _read_at(descriptor, memory[done : done + _LONGEST_READ], begin + done)
        except OSError as error:
            raise _unreadable(path, error) from error
        if count == 0:
            raise CheckpointDamagedError(
                "A file of this checkpoint is damaged: it is cut short.",
                given=f"{path}: it ends at byte {begin + done}",
                fix="an earlier checkpoint",
            )
        done += count
        note_movement()  # the other ranks wait, for as long as the disk takes


def read_bytes(descriptor: int, path: Path, begin: int, count: int) -> bytes:
    """Return ``count`` bytes of a file; CheckpointError if it has not that many."""
    if begin + count > os.fstat(descriptor).st_size:
        count = max(0, os.fstat(descriptor).st_size - begin) + 1  # no memory for a length that is a lie
    memory = bytearray(count)
    read_into(descriptor, path, memoryview(memory), begin)
    return bytes(memory)


def crc32_of(descriptor: int, path: Path, begin: int, end: int, checksum: int = 0) -> int:
    """The CRC-32 of the bytes of a file from ``begin`` to ``end``, going on from that of what comes before them.

    Raises CheckpointError if the file ends before.
    """
    buffer = memoryview(bytearray(min(_STEP, max(end - begin, 0))))
    while begin < end:
        part = buffer[: min(_STEP, end - begin)]
        read_into(descriptor, path, part, begin)
        checksum, begin = zlib.crc32(part, checksum), begin + len(part)
    return checksum


def _read_at(descriptor: int, memory: memoryview, begin: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [memory], begin)
    os.lseek(descriptor, begin, os.SEEK_SET)  # Windows, where nothing reads at a place in one call
    data = os.read(descriptor, min(len(memory), _STEP))
    memory[: len(data)] = data
    return len(data)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointDamagedError(
            "A file of this checkpoint is missing.", given=path, fix="the whole folder, or an earlier checkpoint"
        )
    return CheckpointError("This checkpoint could not be read.", given=f"{path}: {error}")


def _irregular(path: Path) -> CheckpointError:
    return CheckpointDamagedError(
        "A checkpoint folder holds regular files only.",
        given=f"{path}: a link, or no file",
        fix="the files themselves in the folder",
    )
