"""What measuring itself costs: a loop with and without what ``fabric-bench`` puts around it, in turn.

    OMP_NUM_THREADS=1 python benchmarks/observer.py
    OMP_NUM_THREADS=1 python benchmarks/observer.py --json benchmarks/results/observer.json
    OMP_NUM_THREADS=1 python benchmarks/observer.py --quick

The bar is 1 % of a step of 5 ms, 50 us. The model is small, so that what is added can be seen. The plain loop runs
twice a block: what these two differ by is what the machine and the place in memory make of nothing.
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
from measure import interleaved, interval, parser, show, write

from fabric_lite import Fabric
from fabric_lite.bench.observer import StepObserver

STEP_MICROSECONDS = 5000.0
FEWEST_BLOCKS = 6  # of fewer, the interval is their range and holds for less than 95 %


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
    options.add_argument("--blocks", type=int, default=21, help="blocks of steps of each, in turn (default 21)")
    options.add_argument("--quick", action="store_true", help="two short blocks: whether it works at all")
    given = options.parse_args()
    blocks, calls = (2, 20) if given.quick else (given.blocks, 200)
    with tempfile.TemporaryDirectory() as folder:
        observer = StepObserver(folder=folder, warmup=1, steps=1 << 30, started_at=time.monotonic())
        times = interleaved(
            {"plain": loop(None), "watched": loop(observer), "plain again": loop(None)}, blocks=blocks, calls=calls
        )
        observer.finish()
    by_block = list(zip(times["watched"], times["plain"], times["plain again"], strict=True))
    added, *added_interval = interval([watched - (plain + again) / 2 for watched, plain, again in by_block])
    nothing, *nothing_interval = interval([again - plain for _, plain, again in by_block])
    share, *share_interval = (value / STEP_MICROSECONDS for value in (added, *added_interval))
    figures = {
        "step_microseconds": {name: statistics.median(values) for name, values in times.items()},
        "added_microseconds": added,
        "added_microseconds_low_high": added_interval,
        "share_of_a_5_ms_step": share,
        "share_of_a_5_ms_step_low_high": share_interval,
        "plain_again_minus_plain_microseconds": nothing,
        "plain_again_minus_plain_microseconds_low_high": nothing_interval,
    }
    show(
        f"A step, in microseconds; {blocks} blocks",
        ["", "median", "95 % interval" if blocks >= FEWEST_BLOCKS else "range"],
        [
            *([name, f"{value:.1f}", ""] for name, value in figures["step_microseconds"].items()),
            ["added", f"{added:.1f}", "{:.1f} to {:.1f}".format(*added_interval)],
            [
                "of a step of 5 ms",
                f"{100 * share:.2f} % (bar 1 %)",
                "{:.2f} to {:.2f} %".format(*(100 * end for end in share_interval)),
            ],
            ["plain again minus plain", f"{nothing:.1f}", "{:.1f} to {:.1f}".format(*nothing_interval)],
        ],
    )
    write(given.json, figures)


if __name__ == "__main__":
    main()
