"""How much memory there is, and whether an error says that there was too little."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["is_out_of_memory", "memory_bytes", "read_system_file"]

_GROUPS = Path("/sys/fs/cgroup")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, or torch for any of its devices, had no memory left; for the CPU torch has no type of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)
    )


def memory_bytes() -> int:
    """The memory of this machine, or what the container gets of it: its file cache counts there too."""
    names = getattr(os, "sysconf_names", {})
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in names else 8 << 30
    return min([whole, *_limits()])


def _limits() -> Iterator[int]:
    """The limits of the control groups that this process is in, of both versions of Linux's, in bytes."""
    for line in read_system_file("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (_GROUPS / "memory", "memory.limit_in_bytes") if controllers else (_GROUPS, "memory.max")
        group = top / path.lstrip("/")
        # In a container the path may be that of the host, and the top its own group.
        for folder in [group, *group.parents]:
            limit = read_system_file(folder / name).strip()
            if limit.isdigit():
                yield int(limit)
            if folder == top:
                break


def read_system_file(path: str | Path) -> str:
    """A file of the system's own; "" if it has none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
