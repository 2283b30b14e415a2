"""Writing a file so that its name always holds the old content or the new: temporary name, fsync, rename, fsync."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fabric_lite.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows has no advisory locks; there a process id alone tells a live save
    fcntl = None  # type: ignore[assignment]

__all__ = ["committed_file", "is_temporary"]

_TEMPORARY = re.compile(r"\.fabric-save-(\d+)-[0-9a-f]{8}\.tmp")


def is_temporary(name: str) -> bool:
    """Whether this is the name of an unfinished save."""
    return _TEMPORARY.fullmatch(name) is not None


@contextlib.contextmanager
def committed_file(target: Path) -> Iterator[BinaryIO]:
    """Open a new file for reading and writing that becomes ``target`` when the block ends well.

    Folders above it are created; permissions are those of any new file. Where ``target`` is a link, the file that it
    points to is the one that is replaced or made, as ``open`` would, and the link stays. A block that raises leaves
    ``target`` as it was and no file behind. What earlier processes left in the folder when they were killed is removed.

    Raises:
        CheckpointError: ``target`` is there and is no regular file, or is a link that leads back to itself.
        OSError: The folder or the disk did not allow it.
    """
    target = Path(os.path.realpath(target))
    if os.path.lexists(target) and not stat.S_ISREG(os.lstat(target).st_mode):
        raise CheckpointError(
            "This name is taken by something that is not a file.", given=target, fix="another name for the checkpoint"
        )
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    temporary = folder / f".fabric-save-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    # 0o666 is what open() asks for: the umask decides.
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            _lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name != "nt":
                os.replace(temporary, target)
        if os.name == "nt":  # there only a closed file can be renamed
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_folder(folder)


def _fsync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that can't sync a folder
            raise
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Mark a file as being written; False if another process is writing it, or if that can't be told."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked by a live save, or a file system without locks: then nothing there is swept
        return False
    return True


def _sweep(folder: Path) -> None:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if is_temporary(entry.name) and entry.is_file(follow_symlinks=False)]
    for name in names:
        match = _TEMPORARY.fullmatch(name)
        assert match is not None
        if _is_alive(int(match[1])):
            continue
        # Under the same process id, or from another machine or container, the lock tells a live save.
        with contextlib.suppress(OSError):  # swept by somebody else, or not ours to sweep: no harm to this save
            descriptor = os.open(folder / name, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                if _lock(descriptor):
                    os.unlink(folder / name)
            finally:
                os.close(descriptor)


def _is_alive(process: int) -> bool:
    """Whether another process with this id runs here; this process itself does not count, its saves hold locks."""
    if process == os.getpid():
        return False
    if os.name == "nt":  # kill(pid, 0) would end the process there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
