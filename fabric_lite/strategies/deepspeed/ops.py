"""DeepSpeed's C++ operators, which are compiled when they are first needed: said, and never waited for in vain.

torch's compiler of extensions takes a lock file, and whoever finds it waits until it goes. It stays for ever when the
process that holds it is killed, and then every later run waits, without a word.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fabric_lite.errors import StrategyError
from fabric_lite.movement import busy
from fabric_lite.notices import rank_zero_info

try:
    import fcntl
except ImportError:  # Windows, where nothing of it is called
    fcntl = None  # type: ignore[assignment]

__all__ = ["await_lock", "build_ops"]

WAIT_SECONDS = 900.0  # one operator took 194 s on a machine with three jobs for each core
_LOOK_SECONDS = 0.2
_ONE_AT_A_TIME = "fabric_lite.lock"
_ONE_MACHINE = {"btrfs", "ext2", "ext3", "ext4", "overlay", "tmpfs", "xfs", "zfs"}


def build_ops(offload: bool, device: torch.device) -> None:
    """Compile or load the operators that a run needs, each in turn, before DeepSpeed does.

    Args:
        offload: Whether steps are made on the CPU.
        device: Of the run.

    Raises:
        StrategyError: One cannot be built, or somebody else does not come to an end with it.
    """
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, ShareMemCommBuilder

    wanted = ([ShareMemCommBuilder] if device.type == "cpu" else []) + ([CPUAdamBuilder] if offload else [])
    for kind in wanted:
        builder = kind()
        # DeepSpeed does without the first one where it cannot be built.
        if builder.is_compatible(verbose=False):
            _build(builder)


def _build(builder: Any) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    if builder.name in type(builder)._loaded_ops:
        return
    folder = Path(_get_build_directory(builder.name, False))
    if not (folder / f"{builder.name}.so").exists():
        rank_zero_info(f"compiling DeepSpeed ops: {builder.name}, into {folder}; once, for minutes")
    await_lock(folder / "lock")
    try:
        with busy():
            builder.load(verbose=False)
    except Exception as error:  # whatever a compiler can say
        raise StrategyError(
            f"DeepSpeed's operator {builder.name} could not be built.",
            given=f"{type(error).__name__}: {str(error)[-2000:]}",
            fix="g++ and ninja on the PATH, and a folder that can be written to in TORCH_EXTENSIONS_DIR",
        ) from error


def await_lock(lock: Path, wait_seconds: float = WAIT_SECONDS) -> None:
    """Return when nobody builds in the folder of ``lock``; a lock that its holder has left behind is removed.

    It has been left behind if no process of this machine has the file open: the kernel says so, of those in other
    containers too. On a file system that other machines may share that says nothing, and nobody says it of a file of
    another user. There it is waited for in any case, and never removed.

    Raises:
        StrategyError: It was still there after ``wait_seconds``.
    """
    end = time.monotonic() + wait_seconds
    is_told = False
    with busy():
        while lock.exists():
            with _alone(lock.parent) as is_alone:
                is_held = _remove_left_behind(lock) if is_alone else True
            if is_held is None and not is_told:
                is_told = True
                rank_zero_info(f"waiting for {lock}: who holds it cannot be seen from here; {_by_hand(lock)}")
            if time.monotonic() > end and lock.exists():
                raise StrategyError(
                    "Another process compiles DeepSpeed's operators, and does not come to an end.",
                    given=f"{lock} since more than {wait_seconds:.0f} s, held by "
                    f"{_holders(lock) or 'nobody who can be seen from here'}",
                    fix=f"{_by_hand(lock)}; or another folder in TORCH_EXTENSIONS_DIR",
                )
            time.sleep(_LOOK_SECONDS)


def _by_hand(lock: Path) -> str:
    return f"rm {lock} if nobody compiles there any more, on no machine and in no container that shares the folder"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether in the block nobody else looks at the folder's lock to remove it.

    All ranks of a node meet the same lock at once: one would remove the new lock of another, which has removed the old
    one and begun to build.
    """
    with contextlib.ExitStack() as stack:
        is_alone = False
        # Nothing can be removed either where nothing can be written; and another process may be at it.
        with contextlib.suppress(OSError):
            file = stack.enter_context((folder / _ONE_AT_A_TIME).open("ab"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stack.callback(fcntl.flock, file, fcntl.LOCK_UN)
            is_alone = True
        yield is_alone


def _remove_left_behind(lock: Path) -> bool | None:
    """Remove the lock if nobody holds it. Whether somebody does; None: that cannot be known."""
    try:
        # Open, so that no other file can get its number.
        descriptor = os.open(lock, os.O_RDONLY)
    except OSError:
        return None if lock.exists() else False
    try:
        is_held = _is_held(descriptor)
        if is_held is False:
            time.sleep(_LOOK_SECONDS)  # who comes to an end closes the file first, and removes it then
            is_held = _is_held(descriptor)
        if is_held is False and _is_at(lock, descriptor):
            rank_zero_info(f"removed {lock}, which a build that was killed has left behind")
            lock.unlink(missing_ok=True)
        return is_held
    finally:
        os.close(descriptor)


def _is_held(descriptor: int) -> bool | None:
    """Whether anybody else has the file open, in whichever container; None: it cannot be known.

    A lease to write is granted for a file that nobody else has open, see fcntl(2).
    """
    if not _is_of_this_machine(descriptor):
        return None
    # Who opens the file meanwhile sends a signal to the owner of the lease, of which the default one would end us.
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one at ``path``."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holders(lock: Path) -> Sequence[int]:
    """The processes that have the file open, as the one has that builds, as far as they can be seen."""
    try:
        wanted = lock.stat()
    except OSError:
        return []
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for descriptor in (process / "fd").iterdir():
                seen = os.stat(descriptor)
                if (seen.st_dev, seen.st_ino) == (wanted.st_dev, wanted.st_ino):
                    found.append(int(process.name))
                    break
        except OSError:  # it has ended, or is of another user
            continue
    return found


def _is_of_this_machine(descriptor: int) -> bool:
    """Whether the open file is on a file system that no other machine shares."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return False
    device = os.fstat(descriptor).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.splitlines():
        mount, _, system = line.partition(" - ")
        if mount.split()[2] == number:
            return system.split()[0] in _ONE_MACHINE
    return False
