"""Timing side by side: blocks of each candidate in turn, so that a machine that drifts hits all of them alike."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def interleaved(candidates: Mapping[str, Callable[[], Any]], *, blocks: int, calls: int) -> dict[str, list[float]]:
    """Return microseconds per call of each candidate, one figure a block.

    Each block runs every candidate ``calls`` times; the order turns by one from block to block.
    """
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(calls):
            candidates[name]()
    for block in range(blocks):
        turn = block % len(names)
        for name in names[turn:] + names[:turn]:
            call = candidates[name]
            start = time.perf_counter()
            for _ in range(calls):
                call()
            times[name].append((time.perf_counter() - start) / calls * 1e6)
    return times


def added(times: dict[str, list[float]], baseline: str) -> dict[str, tuple[float, float]]:
    """Return each candidate's median difference to the baseline of its own block, in microseconds, and median ratio."""
    base = times[baseline]
    return {
        name: (
            statistics.median(mine - other for mine, other in zip(values, base, strict=True)),
            statistics.median(mine / other for mine, other in zip(values, base, strict=True)),
        )
        for name, values in times.items()
    }


def ratio(times: Mapping[str, list[float]], name: str, baseline: str) -> tuple[float, float, float]:
    """Return the median of the ratios of blocks that stand side by side, and its 95 % interval."""
    return interval([mine / other for mine, other in zip(times[name], times[baseline], strict=True)])


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and its 95 % interval; of fewer than 6 values that is their range, and holds for less.

    The interval is the one of the sign test: it takes no view of how the noise is distributed.
    """
    values = sorted(values)
    count, outside, tail = len(values), 0, 0.0
    while outside < count // 2 and tail + math.comb(count, outside) / 2**count <= 0.025:
        tail += math.comb(count, outside) / 2**count
        outside += 1
    cut = max(outside - 1, 0)
    return statistics.median(values), values[cut], values[count - 1 - cut]


def start_peak() -> float:
    """Let the peak of this process's resident memory count from now; return what is resident, in MiB. Linux only.

    What the allocator keeps of earlier work is given back first, since otherwise it would hide what comes next.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    return _status_kib("VmRSS") / 1024


def peak() -> float:
    """The most that was resident since :func:`start_peak`, in MiB; pages of mapped files count."""
    return _status_kib("VmHWM") / 1024


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a small table."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    print(f"\n{title}")
    for row in [header, ["-" * width for width in widths], *rows]:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


def parser(description: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    return options


def write(path: Path | None, figures: dict[str, Any]) -> None:
    """Write the figures with date and hardware, if a path was given."""
    if path is None:
        return
    import torch

    about = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "command": " ".join(["python", *map(os.path.basename, sys.argv[:1]), *sys.argv[1:]]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, **figures}, indent=2) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
