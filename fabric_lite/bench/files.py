"""What a rank leaves for the benchmark that has started it, and what it is told to load."""

from __future__ import annotations

from pathlib import Path

__all__ = ["OBSERVER", "figures_file", "record_file"]

# A class by its name: who starts the ranks need not import torch, which they do.
OBSERVER = "fabric_lite.bench.observer:StepObserver"


def figures_file(folder: str | Path, rank: int) -> Path:
    """What a rank has measured, as JSON."""
    return Path(folder) / f"figures_{rank}.json"


def record_file(folder: str | Path, rank: int) -> Path:
    """What a rank has computed: plain data with tensors."""
    return Path(folder) / f"record_{rank}.pt"
