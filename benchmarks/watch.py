"""What the hang watch costs a step of 5 ms on two ranks.

    OMP_NUM_THREADS=1 python benchmarks/watch.py
    OMP_NUM_THREADS=1 python benchmarks/watch.py --json benchmarks/results/watch.json

Blocks without it, with the default limit of 600 s and with one of 4 s, where it looks fifty times as often, take turns.
Processor time counts all threads of a rank; it is steadier than the time that passes. What the kernel has counted for
the watch's thread alone is exact on a busy machine too.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from measure import parser, ratio, show, write

from fabric_lite import Fabric
from fabric_lite.mesh import sequence_numbers
from fabric_lite.testing import RankPool
from fabric_lite.watch import HangWatch

WITHOUT = "no watch"
LIMITS = {WITHOUT: 0.0, "limit 600 s": 600.0, "limit 4 s": 4.0}
STEP_SECONDS = 0.005


class Still:
    """Something set up that never moves."""

    def movement(self) -> list[int]:
        return [0]


def measure(blocks: int, calls: int) -> dict[str, Any]:
    """On each rank: by way, the time that passes and the processor time of a step, in microseconds; collectives."""
    fabric = Fabric(accelerator="cpu", devices=2)
    width = 256
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(4)])
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    x = torch.randn(64, width)

    def step() -> None:
        end = time.perf_counter() + STEP_SECONDS
        while time.perf_counter() < end:  # a step of 5 ms on any machine, but for its collectives
            torch.mm(x, x.T)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()

    for _ in range(10):
        step()
    names, still = list(LIMITS), Still()
    passed: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    entered: dict[str, float] = {}
    thread = dict.fromkeys(names, (0.0, 0.0))  # of how many seconds it ran how many
    for block in range(blocks):
        turn = block % len(names)
        for name in names[turn:] + names[:turn]:
            watch = HangWatch(fabric.global_rank, 2, LIMITS[name], still.movement) if LIMITS[name] else None
            fabric.barrier()
            before = sum(sequence_numbers().values())
            start, start_processor, start_thread = time.perf_counter(), time.process_time(), watch_seconds()
            for _ in range(calls):
                step()
            seconds = time.perf_counter() - start
            thread[name] = (thread[name][0] + watch_seconds() - start_thread, thread[name][1] + seconds)
            passed[name].append(seconds / calls * 1e6)
            processor[name].append((time.process_time() - start_processor) / calls * 1e6)
            entered[name] = (sum(sequence_numbers().values()) - before) / calls
            if watch is not None:
                watch.close()
    return {"passed": passed, "processor": processor, "collectives": entered, "thread": thread}


def watch_seconds() -> float:
    """How long the watch's thread has run on a processor. Linux only."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    numbers = [number for number, name in names.items() if name.startswith("fabric_lite watch")]
    return sum(int(Path(f"/proc/self/task/{number}/schedstat").read_text().split()[0]) for number in numbers) / 1e9


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--blocks", type=int, default=12, help="blocks of each way (default 12)")
    options.add_argument("--calls", type=int, default=200, help="steps in a block (default 200)")
    options.add_argument("--quick", action="store_true", help="only see that it runs")
    given = options.parse_args()
    blocks, calls = (2, 5) if given.quick else (given.blocks, given.calls)
    with RankPool(timeout_seconds=600) as pool:
        measured = pool.run(measure, blocks, calls)[0]
    rows = []
    for name in LIMITS:
        ran, seconds = measured["thread"][name]
        row: dict[str, Any] = {"way": name, "collectives_a_step": measured["collectives"][name]}
        row["thread_share"] = ran / seconds
        for kind in ("passed", "processor"):
            middle, low, high = ratio(measured[kind], name, WITHOUT)
            row[kind] = {"us": statistics.median(measured[kind][name]), "ratio": middle, "from": low, "to": high}
        rows.append(row)
    show(
        "A step on two ranks",
        [
            "",
            "share of the watch's thread",
            "processor time",
            "ratio (95 %)",
            "time that passes",
            "ratio (95 %)",
            "collectives",
        ],
        [
            [row["way"], f"{100 * row['thread_share']:.4f} %"]
            + [
                cell
                for kind in ("processor", "passed")
                for cell in (
                    f"{row[kind]['us']:.0f} us",
                    f"{row[kind]['ratio']:.4f} ({row[kind]['from']:.4f}-{row[kind]['to']:.4f})",
                )
            ]
            + [f"{row['collectives_a_step']:.2f}"]
            for row in rows
        ],
    )
    write(given.json, {"rows": rows})


if __name__ == "__main__":
    main()
