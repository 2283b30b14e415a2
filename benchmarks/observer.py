"""What measuring itself costs: a loop with and without what ``fabric-bench`` puts around it, in turn.

    OMP_NUM_THREADS=1 python benchmarks/observer.py
    OMP_NUM_THREADS=1 python benchmarks/observer.py --json benchmarks/results/observer.json
    OMP_NUM_THREADS=1 python benchmarks/observer.py --quick

The bar is 1 % of a step of 5 ms, 50 us. The model is small, so that what is added can be seen.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

sys.path.insert(0, str(Path(__file__).parent))
from measure import interleaved, parser, show, write

from fabric_lite import Fabric
from fabric_lite.bench.observer import StepObserver

STEP_MICROSECONDS = 5000.0


class Endless(IterableDataset[torch.Tensor]):
    """One batch, over and over: data that lies elsewhere in memory for each loop would be what is measured."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return itertools.repeat(torch.ones(64, 64))


def loop(callbacks: Any) -> Callable[[], None]:
    """One step of a loop."""
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=callbacks)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.01))
    batches = iter(fabric.setup_dataloaders(DataLoader(Endless(), batch_size=None)))

    def step() -> None:
        loss = model(next(batches)).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--blocks", type=int, default=20, help="blocks of steps of each, in turn (default 20)")
    options.add_argument("--quick", action="store_true", help="two short blocks: whether it works at all")
    given = options.parse_args()
    blocks, calls = (2, 20) if given.quick else (given.blocks, 200)
    with tempfile.TemporaryDirectory() as folder:
        observer = StepObserver(folder=folder, warmup=1, steps=1 << 30, started_at=time.monotonic())
        times = interleaved(
            {"plain": loop(None), "watched": loop(observer), "plain again": loop(None)}, blocks=blocks, calls=calls
        )
        observer.finish()
    added = [
        watched - (before + after) / 2
        for watched, before, after in zip(times["watched"], times["plain"], times["plain again"], strict=True)
    ]
    figures = {
        "step_microseconds": {name: statistics.median(values) for name, values in times.items()},
        "added_microseconds": statistics.median(added),
        "share_of_a_5_ms_step": statistics.median(added) / STEP_MICROSECONDS,
    }
    show(
        "A step, in microseconds",
        ["", "median"],
        [
            *([name, f"{value:.1f}"] for name, value in figures["step_microseconds"].items()),
            ["added", f"{figures['added_microseconds']:.1f}"],
            ["of a step of 5 ms", f"{100 * figures['share_of_a_5_ms_step']:.2f} % (bar 1 %)"],
        ],
    )
    write(given.json, figures)


if __name__ == "__main__":
    main()
