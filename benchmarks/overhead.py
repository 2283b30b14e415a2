"""What a step and a batch cost over the loop written by hand.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py
    OMP_NUM_THREADS=1 python benchmarks/overhead.py --json benchmarks/results/overhead.json

Lightning Fabric and Accelerate are measured in the same blocks where they are installed (pip install -e '.[peers]').
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from measure import added, interleaved, parser, show, write

from fabric_lite import Fabric
from fabric_lite.testing import RankPool

COMPUTE = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
HAND, OURS, LIGHTNING, ACCELERATE = "by hand", "fabric_lite", "Lightning Fabric", "Accelerate"
Step = Callable[[], Any]


def make() -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor, torch.Tensor]:
    """A tiny MLP, whose step takes some 180 us: any overhead shows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    return model, torch.optim.SGD(model.parameters(), lr=1e-3), torch.randn(16, 32), torch.randint(0, 10, (16,))


def by_hand(precision: str, wrap: Callable[[nn.Module], Any] = lambda model: model) -> Step:
    model, optimizer, x, y = make()
    target, dtype = wrap(model), COMPUTE.get(precision)
    scaler = torch.amp.GradScaler("cpu") if precision == "16-mixed" else None

    def step() -> None:
        if dtype is None:
            output = target(x)
        else:
            with torch.autocast("cpu", dtype):
                output = target(x)
            output = output.float()
        loss = cross_entropy(output, y)
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return step


def with_fabric(fabric: Any) -> Step:
    model, optimizer, x, y = make()
    model, optimizer = fabric.setup(model, optimizer)

    def step() -> None:
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()

    return step


def with_accelerate(precision: str) -> Step:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # it allows one precision per process
    names = {"bf16-mixed": "bf16", "16-mixed": "fp16", "32-true": "no"}
    accelerator = Accelerator(cpu=True, mixed_precision=names[precision])
    model, optimizer, x, y = make()
    model, optimizer = accelerator.prepare(model, optimizer)

    def step() -> None:
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()

    return step


def peers(precision: str) -> dict[str, Step]:
    """The peers that are installed and run this precision on CPU."""
    found: dict[str, Step] = {}
    if importlib.util.find_spec("lightning_fabric"):
        from lightning_fabric import Fabric as Lightning

        with contextlib.suppress(ValueError):  # it has no 16-mixed on CPU
            found[LIGHTNING] = with_fabric(Lightning(accelerator="cpu", devices=1, precision=precision))
    if importlib.util.find_spec("accelerate") and precision != "16-mixed":  # refused on CPU
        found[ACCELERATE] = with_accelerate(precision)
    return found


def measure_steps(blocks: int, calls: int) -> list[dict[str, Any]]:
    rows = []
    for precision in ("32-true", "bf16-mixed", "16-mixed"):
        ours = Fabric(accelerator="cpu", devices=1, precision=precision)
        candidates = {HAND: by_hand(precision), OURS: with_fabric(ours), **peers(precision)}
        rows.append(figures(f"step, one device, {precision}", interleaved(candidates, blocks=blocks, calls=calls)))
    return rows


class Batches:
    """The same batch over and over, and how long the loop took for a batch, after the first ones.

    A new model and what was set up a moment ago make the first dozen steps slower than all others, in any loop.
    """

    def __init__(self, count: int, batch: Any) -> None:
        self.count, self.batch, self.us = count, batch, 0.0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        warm = self.count // 4
        for _ in range(warm):
            yield self.batch
        start = time.perf_counter()
        try:
            for _ in range(self.count - warm):
                yield self.batch
        finally:  # a loop that counts does not ask for a batch after the last one
            self.us = (time.perf_counter() - start) / (self.count - warm) * 1e6


def epoch_by_hand() -> Callable[[Batches], None]:
    model, optimizer, _, _ = make()

    def run(batches: Batches) -> None:
        for x, y in batches:
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def epoch_of_trainer(pl: Any, **options: Any) -> Callable[[Batches], None]:
    """Of a module that logs its loss, as most do; without callbacks, loggers and bar."""

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make()[0]

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            loss = cross_entropy(self.model(x), y)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    def run(batches: Batches) -> None:
        off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        pl.Trainer(max_epochs=1, accelerator="cpu", devices=1, **off, **options).fit(Model(), batches)

    return run


def measure_trainer(blocks: int, calls: int) -> list[dict[str, Any]]:
    from fabric_lite import trainer

    candidates = {HAND: epoch_by_hand(), OURS: epoch_of_trainer(trainer)}
    if importlib.util.find_spec("lightning"):
        import lightning.pytorch

        candidates[LIGHTNING] = epoch_of_trainer(lightning.pytorch, enable_model_summary=False)
    _, _, *batch = make()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for block in range(-1, blocks):
        names = list(candidates)
        turn = block % len(names)
        for name in names[turn:] + names[:turn]:
            batches = Batches(calls, batch)
            candidates[name](batches)
            assert batches.us > 0
            if block >= 0:  # the first one is warm-up
                times[name].append(batches.us)
    return [figures("step of a Trainer (and Lightning's), 32-true", times)]


def measure_loader(blocks: int) -> list[dict[str, Any]]:
    data = TensorDataset(torch.randn(512, 32), torch.randint(0, 10, (512,)))

    def epoch(loader: Any) -> Step:
        def run() -> None:
            for _ in loader:
                pass

        return run

    fabric = Fabric(accelerator="cpu", devices=1)
    make_loader = lambda: DataLoader(data, batch_size=8)  # noqa: E731
    candidates = {HAND: epoch(make_loader()), OURS: epoch(fabric.setup_dataloaders(make_loader()))}
    if importlib.util.find_spec("lightning_fabric"):
        from lightning_fabric import Fabric as Lightning

        candidates[LIGHTNING] = epoch(Lightning(accelerator="cpu", devices=1).setup_dataloaders(make_loader()))
    if importlib.util.find_spec("accelerate"):
        from accelerate import Accelerator

        candidates[ACCELERATE] = epoch(Accelerator(cpu=True).prepare(make_loader()))
    times = interleaved(candidates, blocks=blocks, calls=2)
    return [figures("loader, per batch", {name: [value / 64 for value in times[name]] for name in times})]


def ddp_times(blocks: int, calls: int) -> dict[str, list[float]]:
    """On each of two ranks."""
    fabric = Fabric(accelerator="cpu", devices=2)
    candidates = {HAND: by_hand("32-true", DistributedDataParallel), OURS: with_fabric(fabric)}
    return interleaved(candidates, blocks=blocks, calls=calls)


def measure_ddp(blocks: int, calls: int) -> list[dict[str, Any]]:
    pool = RankPool(timeout_seconds=600)
    try:
        return [figures("step, DDP, 2 ranks, 32-true", pool.run(ddp_times, blocks, calls, ranks=2)[0])]
    finally:
        pool.close()


def figures(what: str, times: dict[str, list[float]]) -> dict[str, Any]:
    differences = added(times, HAND)
    return {
        "what": what,
        "by_hand_us": sorted(times[HAND])[len(times[HAND]) // 2],
        "added_us": {name: value[0] for name, value in differences.items() if name != HAND},
        "ratio": {name: value[1] for name, value in differences.items() if name != HAND},
    }


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--blocks", type=int, default=60, help="blocks of each candidate (default 60)")
    options.add_argument("--calls", type=int, default=200, help="steps in a block (default 200)")
    given = options.parse_args()
    torch.set_num_threads(1)
    rows = [
        *measure_steps(given.blocks, given.calls),
        *measure_trainer(given.blocks, given.calls),
        *measure_loader(given.blocks),
        *measure_ddp(given.blocks, max(1, given.calls // 4)),
    ]
    names = [OURS, LIGHTNING, ACCELERATE]
    show(
        "Added to the hand-written loop, microseconds (and ratio): medians over interleaved blocks",
        ["", HAND, *names],
        [
            [row["what"], f"{row['by_hand_us']:.0f} us"]
            + [f"{row['added_us'][n]:+.1f} ({row['ratio'][n]:.2f}x)" if n in row["ratio"] else "-" for n in names]
            for row in rows
        ],
    )
    write(given.json, {"rows": rows})


if __name__ == "__main__":
    main()
