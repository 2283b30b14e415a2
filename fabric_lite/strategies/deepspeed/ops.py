"""DeepSpeed's C++ operators, which are compiled when they are first needed: said, and never waited for in vain.

torch's compiler of extensions takes a lock file, and whoever finds it waits until it goes. It stays for ever when the
process that holds it is killed, and then every later run waits, without a word.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fabric_lite.errors import StrategyError
from fabric_lite.movement import busy
from fabric_lite.notices import rank_zero_info

__all__ = ["await_lock", "build_ops"]

WAIT_SECONDS = 900.0  # one operator took 194 s on a machine with three jobs for each core
_LOOK_SECONDS = 0.2
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

    It has been left behind if no process of this machine has the file open. On a file system that other machines may
    share, that says nothing, so there it is waited for in any case, and never removed.

    Raises:
        StrategyError: It was still there after ``wait_seconds``.
    """
    end = time.monotonic() + wait_seconds
    with busy():
        while lock.exists():
            if _is_of_this_machine(lock) and not _holders(lock) and lock.exists():
                rank_zero_info(f"removed {lock}, which a build that was killed has left behind")
                lock.unlink(missing_ok=True)
                return
            if time.monotonic() > end:
                raise StrategyError(
                    "Another process compiles DeepSpeed's operators, and does not come to an end.",
                    given=f"{lock} since more than {wait_seconds:.0f} s, held by {_holders(lock) or 'nobody here'}",
                    fix=f"rm {lock} if nobody compiles any more, or another folder in TORCH_EXTENSIONS_DIR",
                )
            time.sleep(_LOOK_SECONDS)


def _holders(lock: Path) -> Sequence[int]:
    """The processes of this machine that have the file open, as the one has that builds."""
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


def _is_of_this_machine(path: Path) -> bool:
    """Whether ``path`` is on a file system that no other machine shares, of a user whose processes can be seen."""
    try:
        status = path.stat()
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return False
    number = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    for line in mounts.splitlines():
        mount, _, system = line.partition(" - ")
        if mount.split()[2] == number:
            return system.split()[0] in _ONE_MACHINE and os.geteuid() in (0, status.st_uid)
    return False
