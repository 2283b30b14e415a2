"""Timing side by side: blocks of each candidate in turn, so that a machine that drifts hits all of them alike."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
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


def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a small table."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    print(f"\n{title}")
    for row in [header, ["-" * width for width in widths], *rows]:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


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
