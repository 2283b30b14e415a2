"""Writing so that a name always holds the old checkpoint or the new: temporary name, fsync, rename, fsync.

A file and a folder are committed alike. Where something is replaced that a rename can't replace at once, the two
exchange their names in one step of the system; where the file system has no such step, the old one stands under
``.fabric-old-NAME`` until the new one is in place, and :func:`recovered` finds it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import secrets
import socket
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from fabric_lite.checkpoint.exchange import exchange
from fabric_lite.checkpoint.manifest import MANIFEST, is_own_manifest, is_part_name
from fabric_lite.checkpoint.remote import Folder, RemotePath, Target, uploaded_file, uploaded_folder
from fabric_lite.errors import CheckpointError
from fabric_lite.movement import busy

try:
    import fcntl
except ImportError:  # Windows has no advisory locks; there a process id alone tells a live save
    fcntl = None  # type: ignore[assignment]

__all__ = ["committed_file", "committed_folder", "fsync_folder", "is_temporary", "recovered", "remove"]

# The place (see _place), the process, and a number. Earlier versions left the place out.
_TEMPORARY = re.compile(r"\.fabric-save-(?:([0-9a-f]{8})-)?(\d+)-[0-9a-f]{8}\.tmp")
# What was made on another machine is left alone that long after it was last written to: not all shared file systems
# pass on the locks, and the clocks differ.
_ELSEWHERE_SECONDS = 3600.0
_KEPT = ".fabric-old-"
# What torch.distributed.checkpoint and Lightning Fabric put into their folders.
_DCP_MARK = ".metadata"
_DCP_FILE = re.compile(r"\.metadata|meta\.pt|[^/]+\.distcp")
# The temporary names that threads of this process write under: between making a file and locking it, it looks as if it
# was left by an earlier process with the same id.
_being_written: set[str] = set()


def is_temporary(name: str) -> bool:
    """Whether this is the name of an unfinished save."""
    return _TEMPORARY.fullmatch(name) is not None


def recovered(path: Path) -> Path:
    """Return where the checkpoint ``path`` stands: elsewhere only after a crash in the middle of replacing it."""
    target = Path(os.path.realpath(path))
    kept = _kept(target)
    return kept if not os.path.lexists(target) and os.path.lexists(kept) else path


@contextlib.contextmanager
def committed_file(target: Target) -> Iterator[BinaryIO]:
    """Open a new file for reading and writing that becomes ``target`` when the block ends well.

    Folders above it are created; permissions are those of any new file. Where ``target`` is a link, what it points to
    is replaced or made, as ``open`` would, and the link stays. A block that raises leaves ``target`` as it was and no
    file behind. What earlier processes left in the folder when they were killed is removed.

    Raises:
        CheckpointError: ``target`` is there and is neither a regular file nor a checkpoint's folder, or is a link
            that leads back to itself.
        OSError: The folder or the disk did not allow it.
    """
    if isinstance(target, RemotePath):
        with uploaded_file(target) as uploaded:
            yield uploaded
        return
    with _prepared(target) as (place, temporary):
        # 0o666 is what open() asks for: the umask decides.
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        file = os.fdopen(descriptor, "w+b")
        try:
            _lock(file.fileno())
            yield file
            file.flush()
            with busy():
                os.fsync(file.fileno())
            if os.name == "nt":  # there only a closed file can be renamed
                file.close()
            _put_in_place(temporary, place)
        except BaseException as error:
            with contextlib.suppress(OSError):  # it would write again what could not be written
                file.close()
            _remove_unless_unsettled(temporary, error)
            raise
        file.close()


@contextlib.contextmanager
def committed_folder(target: Target) -> Iterator[Folder]:
    """Make a new folder that becomes ``target`` when the block ends well; one rank alone calls it.

    Who writes into it makes its files durable; the folder itself is made so here. All else is as for
    :func:`committed_file`.
    """
    if isinstance(target, RemotePath):
        with uploaded_folder(target) as folder:
            yield folder
        return
    with _prepared(target) as (place, temporary):
        temporary.mkdir()
        try:
            with _locked_folder(temporary):
                yield temporary
                fsync_folder(temporary)
                _put_in_place(temporary, place)
        except BaseException as error:
            _remove_unless_unsettled(temporary, error)
            raise


def fsync_folder(folder: Path) -> None:
    """Put the names in ``folder`` onto the disk."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with busy():
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that can't sync a folder
            raise
    finally:
        os.close(descriptor)


def remove(target: Path) -> bool:
    """Delete a checkpoint, which is there as a whole until it is gone; the next save sweeps what a crash leaves.

    Returns:
        Whether it was deleted; a folder that holds anything but a checkpoint's files is left as it is.

    Raises:
        OSError: The folder did not allow it.
    """
    path = recovered(target)
    if not stat.S_ISREG(os.lstat(path).st_mode) and not _has_names_of_checkpoint(path):
        return False
    temporary = _temporary_beside(target)
    os.rename(path, temporary)
    fsync_folder(target.parent)
    _remove(temporary)
    return True


def _temporary_beside(target: Path) -> Path:
    return target.parent / f".fabric-save-{_place()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


@contextlib.contextmanager
def _prepared(target: Path) -> Iterator[tuple[Path, Path]]:
    """The name to replace, free or a checkpoint's, and a temporary name beside it, which this process alone writes."""
    target = Path(os.path.realpath(target))
    _check_replaceable(target)
    _make(target.parent)
    _sweep(target.parent)
    temporary = _temporary_beside(target)
    _being_written.add(temporary.name)
    try:
        yield target, temporary
    finally:
        _being_written.discard(temporary.name)


def _make(folder: Path) -> None:
    """Make a folder and those above it, and put their names onto the disk: a checkpoint in them is to be found."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        fsync_folder(each.parent)


def _check_replaceable(target: Path) -> None:
    if not os.path.lexists(target) or stat.S_ISREG(os.lstat(target).st_mode) or _is_checkpoint_folder(target):
        return
    raise CheckpointError(
        "This name is taken by something that is no checkpoint: not a file, nor a folder with a checkpoint's files "
        "only.",
        given=target,
        fix="another name for the checkpoint",
    )


def _is_checkpoint_folder(path: Path) -> bool:
    """Whether this is a folder that is empty, or has the files of a checkpoint and nothing else."""
    if not _has_names_of_checkpoint(path):
        return False
    # Web sites and browser extensions have a manifest.json as well.
    manifest = path / MANIFEST
    return not manifest.exists() or is_own_manifest(manifest)


def _has_names_of_checkpoint(path: Path) -> bool:
    """Whether this is a folder of regular files, none of which has a name that no checkpoint's file has."""
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        return False
    with os.scandir(path) as entries:
        files = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    if not all(files.values()):
        return False
    if all(name == MANIFEST or is_part_name(name) for name in files):
        return True
    return _DCP_MARK in files and all(_DCP_FILE.fullmatch(name) for name in files)


def _put_in_place(temporary: Path, target: Path, in_one_step: Callable[[Path, Path], bool] = exchange) -> None:
    """Let ``target`` be the new checkpoint in one step, or in two where ``in_one_step`` can't, and remove the old."""
    _check_replaceable(target)  # again: it has been a while
    kept = _kept(target)
    is_free, is_folder = not os.path.lexists(target), target.is_dir() or temporary.is_dir()
    if is_free or not is_folder:
        os.replace(temporary, target)
        _settle(target, functools.partial(os.rename, target, temporary) if is_free else None)
    elif in_one_step(temporary, target):
        _settle(target, functools.partial(in_one_step, temporary, target))
        _remove(temporary)
    else:
        _remove(kept)
        if os.path.lexists(kept):  # something that is not ours has got into it
            os.rename(kept, _temporary_beside(target))
        os.rename(target, kept)
        try:
            os.rename(temporary, target)
        except BaseException:
            os.rename(kept, target)
            raise
        _settle(target, functools.partial(_in_two_steps_back, temporary, target, kept))
    _remove(kept)  # of this save, or of an earlier one that was killed in between


class _UnsettledError(CheckpointError):
    """The disk did not take the names: which of them a power cut would leave is not known, so both contents stay."""


def _settle(target: Path, take_back: Callable[[], object] | None) -> None:
    """Put the names beside ``target`` onto the disk; if it does not take them, undo what was done to them.

    ``take_back`` is None where what was there before is gone.
    """
    try:
        fsync_folder(target.parent)
    except OSError as error:
        is_back = False
        with contextlib.suppress(OSError):  # then the new one stays in place, and the error says so
            is_back = take_back is not None and take_back() is not False
        stands = "what was there before is as it was" if is_back else "the new one is in place"
        raise _UnsettledError(
            f"The disk failed while the checkpoint was put in place; {stands}, unless this machine loses its power.",
            given=f"{target}: {type(error).__name__}: {error}",
            fix="see the system's log; save again, here or on another disk",
        ) from error


def _in_two_steps_back(temporary: Path, target: Path, kept: Path) -> None:
    os.rename(target, temporary)
    os.rename(kept, target)


def _remove_unless_unsettled(temporary: Path, error: BaseException) -> None:
    """Remove what an unfinished save wrote; the next save removes what has to stay for now."""
    if not isinstance(error, _UnsettledError):
        _remove(temporary)


def _kept(target: Path) -> Path:
    return target.parent / f"{_KEPT}{target.name}"


def _remove(path: Path) -> None:
    """Remove a file or a checkpoint's folder; a folder that has got other things in it stays."""
    # What can't be removed is in nobody's way: the checkpoint is in place, or its error is being raised, and the next
    # save tries again.
    with contextlib.suppress(OSError):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
        elif _has_names_of_checkpoint(path):  # ours by its own name, also with a manifest that is half written
            # The manifest goes first: without it nobody takes the rest for a checkpoint.
            for name in sorted(os.listdir(path), key=lambda name: (name not in (MANIFEST, _DCP_MARK), name)):
                os.unlink(path / name)
            os.rmdir(path)


@contextlib.contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    if os.name == "nt":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
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
    """Remove what killed saves left in ``folder``; not what is being written, nor anything that is not ours."""
    with os.scandir(folder) as entries:
        left = [entry.name for entry in entries if is_temporary(entry.name) and _is_plain(entry)]
    for name in left:
        match = _TEMPORARY.fullmatch(name)
        assert match is not None
        if name in _being_written:
            continue
        if match[1] in (None, _place()):
            if _is_alive(int(match[2])):
                continue
        elif not _is_old(folder / name):
            continue
        # Under the same process id, or from a container that an earlier version ran in, the lock tells a live save.
        with contextlib.suppress(OSError):  # swept by somebody else, or not ours to sweep: no harm to this save
            # Without O_NONBLOCK, a pipe that has taken the name since would wait for a writer.
            flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
            descriptor = os.open(folder / name, flags)
            try:
                if _lock(descriptor):
                    _remove(folder / name)
            finally:
                os.close(descriptor)


def _is_plain(entry: os.DirEntry[str]) -> bool:
    return entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)


@functools.cache
def _place() -> str:
    """Eight digits for the machine, and the container, in which the ids of processes have their meaning."""
    processes = "/proc/self/ns/pid"
    container = os.stat(processes).st_ino if os.path.exists(processes) else 0
    return f"{zlib.crc32(f'{socket.gethostname()} {container}'.encode()):08x}"


def _is_old(path: Path) -> bool:
    """Whether nothing has been written there for long."""
    try:
        inside = [path / name for name in os.listdir(path)] if path.is_dir() else []
        latest = max(os.lstat(each).st_mtime for each in [path, *inside])
    except OSError:  # somebody else sweeps it
        return False
    return time.time() - latest > _ELSEWHERE_SECONDS


def _is_alive(process: int) -> bool:
    """Whether another process with this id runs here; this process itself does not count, its saves are known."""
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
