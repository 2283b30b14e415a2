"""What a benchmark and a run record tell of the machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["available_memory", "memory_of_machine", "processor"]


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_of_machine() -> int | None:
    """Bytes; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not everywhere
        return None


def available_memory(groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be had without swapping, by the container's limit where that is less; None where nobody tells.

    Args:
        groups: Where control groups are mounted, of version 2 or 1.
    """
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    rooms = [
        next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None),
        _room(groups, "memory.max", "memory.current", "inactive_file"),
        _room(groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ]
    return min((room for room in rooms if room is not None), default=None)


def _room(group: Path, limit: str, used: str, cache: str) -> int | None:
    """Bytes up to the group's limit; None where it has none. The names are those that this version gives them."""
    try:
        most, now = (int((group / name).read_text()) for name in (limit, used))
    except (OSError, ValueError):  # no such group, or "max"
        return None
    # What was read from files and is not in use counts as used, yet it goes as soon as somebody needs the memory: after
    # a large data set was read, a container looks full without it. The files are read one after the other, so the
    # differences may come out below 0.
    return max(most - max(now - _of_stat(group, cache), 0), 0)


def _of_stat(group: Path, name: str) -> int:
    """A figure of the group's ``memory.stat``; 0 where it does not tell."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
