"""What ``Fabric(strategy="fsdp")`` costs over ``fully_shard`` written by hand, and how memory falls with the ranks.

    OMP_NUM_THREADS=1 python benchmarks/sharded.py
    OMP_NUM_THREADS=1 python benchmarks/sharded.py --blocks 40 --json benchmarks/results/sharded.json
    OMP_NUM_THREADS=1 python benchmarks/sharded.py --part memory
    OMP_NUM_THREADS=1 python benchmarks/sharded.py --quick

Step time: a GPT of some million parameters, blocks of steps of each candidate in turn in the same processes, one
thread per rank; the ratio is the median over blocks with its 95 % interval. Collectives: of one step, in order, with
the elements that go in. Memory: processes of their own for each row.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent))
from measure import interleaved, parser, peak, ratio, show, start_peak, write

from fabric_lite import Fabric
from fabric_lite.testing import RankPool

OURS, HAND, AUTOCAST, DDP = "fabric_lite", "fully_shard", "fully_shard in autocast", "DDP"
CONTEXT, VOCABULARY, HEADS = 64, 256, 4
Step = Callable[[], Any]


class Block(nn.Module):
    """Causal self-attention, then a perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).movedim(1, 3)
        attended = F.scaled_dot_product_attention(*heads.unbind(1), is_causal=True)
        x = x + self.project(attended.movedim(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """From tokens (batch, time) to logits (batch * time, vocabulary)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        # Flat, since fully_shard warns when its module returns a view, and a linear layer does for 3 dimensions.
        return self.head(self.norm(x).flatten(0, 1))


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison of steps.

    Args:
        precision: ``32-true`` or ``bf16-mixed``.
        accumulate: Micro-batches to a step; gradients are synchronized by the last.
        width: Of the model, which has 4 blocks.
        batch: Sequences of 64 tokens to a micro-batch and rank.
        ranks: On one, nothing waits for another process, so that microseconds show.
    """

    precision: str
    accumulate: int
    width: int
    batch: int
    ranks: int


def make(case: Case) -> tuple[GPT, torch.Tensor]:
    torch.manual_seed(0)
    return GPT(case.width, layers=4), torch.randint(VOCABULARY, (case.batch, CONTEXT + 1))


def loss_of(output: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, tokens[:, 1:].flatten())


def with_fabric(case: Case) -> Step:
    fabric = Fabric(accelerator="cpu", devices=case.ranks, strategy="fsdp", precision=case.precision)
    model, tokens = make(case)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-4))

    def step() -> None:
        for number in range(case.accumulate):
            with fabric.no_backward_sync(model, enabled=number < case.accumulate - 1):
                fabric.backward(loss_of(model(tokens[:, :-1]), tokens) / case.accumulate)
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_hand(case: Case, wrap: Callable[[nn.Module, bool], Any], no_sync: Callable[[Any], Any], autocast: bool) -> Step:
    model, tokens = make(case)
    target, is_bf16 = wrap(model, case.precision == "bf16-mixed"), case.precision == "bf16-mixed"
    optimizer = torch.optim.AdamW(target.parameters(), lr=1e-4)

    def step() -> None:
        for number in range(case.accumulate):
            with no_sync(target) if number < case.accumulate - 1 else contextlib.nullcontext():
                with torch.autocast("cpu", torch.bfloat16) if is_bf16 and autocast else contextlib.nullcontext():
                    output = target(tokens[:, :-1])
                (loss_of(output.float(), tokens) / case.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def shard(model: Any, is_bf16: bool) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if is_bf16 else MixedPrecisionPolicy()
    for part in [*model.blocks, model]:
        fully_shard(part, mp_policy=policy)
    return model


@contextlib.contextmanager
def unsynchronized(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def ddp(model: nn.Module, is_bf16: bool) -> Any:  # noqa: ARG001
    return nn.parallel.DistributedDataParallel(model)


def candidates_of(case: Case) -> dict[str, Step]:
    found = {
        HAND: by_hand(case, shard, unsynchronized, autocast=False),
        OURS: with_fabric(case),
        DDP: by_hand(case, ddp, lambda model: model.no_sync(), autocast=True),
    }
    if case.precision != "32-true":
        found[AUTOCAST] = by_hand(case, shard, unsynchronized, autocast=True)
    return found


class RecordCollectives(TorchDispatchMode):
    """Notes each call into ``torch.distributed``'s backends: its name, and how many elements went in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "c10d_functional", "_c10d_functional"):
            sizes = [leaf.numel() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.calls.append((func.__name__, sum(sizes)))
        return func(*args, **(kwargs or {}))


def step_times(case: Case, blocks: int, calls: int) -> dict[str, Any]:
    """On each rank: microseconds per step by block, of the clock and of the processor, and one step's collectives."""
    candidates = candidates_of(case)
    collectives = {}
    for name, step in candidates.items():
        step()  # DDP rebuilds its buckets after the first
        with RecordCollectives() as recorded:
            step()
        collectives[name] = recorded.calls
    processor: dict[str, list[float]] = {name: [] for name in candidates}

    def several(name: str, step: Step) -> None:
        start = time.process_time()
        for _ in range(calls):
            step()
        processor[name].append((time.process_time() - start) / calls * 1e6)

    blocks_of = {name: functools.partial(several, name, step) for name, step in candidates.items()}
    clock = interleaved(blocks_of, blocks=blocks, calls=1)
    return {
        "clock": {name: [value / calls for value in values] for name, values in clock.items()},
        "processor": {name: values[1:] for name, values in processor.items()},  # the first one warms up
        "collectives": collectives,
    }


def measure_steps(cases: list[Case], blocks: int, calls: int) -> list[dict[str, Any]]:
    rows = []
    with RankPool(timeout_seconds=1200) as pool:
        for case in cases:
            measured = pool.run(step_times, case, blocks, calls, ranks=case.ranks)[0]
            baseline = HAND if case.precision == "32-true" else AUTOCAST
            others = [name for name in measured["clock"] if name != baseline]
            collectives = measured["collectives"]
            rows.append(
                {
                    **dataclasses.asdict(case),
                    "baseline": baseline,
                    **{
                        f"{clock}_milliseconds": {
                            name: statistics.median(values) / 1e3 for name, values in measured[clock].items()
                        }
                        for clock in ("clock", "processor")
                    },
                    **{
                        f"{clock}_ratio_low_high": {name: ratio(measured[clock], name, baseline) for name in others}
                        for clock in ("clock", "processor")
                    },
                    "collectives": {
                        name: {"calls": len(calls), "elements": sum(size for _, size in calls)}
                        for name, calls in collectives.items()
                    },
                    "same_collectives_as_by_hand": collectives[OURS] == collectives[HAND],
                }
            )
    return rows


def local_bytes(tensors: Any) -> int:
    """Bytes of these tensors on this rank."""
    held = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return sum(tensor.numel() * tensor.itemsize for tensor in held)


def memory(candidate: str, ranks: int, width: int, layers: int, exact: bool) -> dict[str, float]:
    """On each rank of a fresh pool: MiB held after a step, and by how much resident memory rose at most.

    Args:
        candidate: The name of a strategy, or ``fully_shard`` by hand.
        ranks: Of the pool.
        width: Of the model.
        layers: Of the model.
        exact: Whether the C library gives blocks of a megabyte and more back when they are freed. By default it keeps
            many, so that resident memory says more about it than about what a step needs.
    """
    if exact:
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy="fsdp" if candidate == HAND else candidate)
    fabric.launch()
    make = set_up_by_hand if candidate == HAND else set_up
    train(fabric, *make(fabric, width=16, layers=2))  # what loading code takes is no part of this
    before = start_peak()
    model, optimizer = make(fabric, width, layers)
    peak_of_setup = peak() - before
    start_peak()
    train(fabric, model, optimizer)
    peak_of_training = peak() - before
    held = {
        "parameters": local_bytes(model.parameters()),
        "gradients": local_bytes(parameter.grad for parameter in model.parameters()),
        "optimizer": local_bytes(value for values in optimizer.state.values() for value in values.values()),
    }
    return {
        **{name: size / 2**20 for name, size in held.items()},
        "held": sum(held.values()) / 2**20,
        "peak of setup": peak_of_setup,
        "peak of training": peak_of_training,
    }


def set_up(fabric: Fabric, width: int, layers: int) -> Any:
    with fabric.init_module(empty_init=fabric.strategy.is_sharded):
        model = GPT(width, layers)
    return fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False))


def train(fabric: Fabric, model: Any, optimizer: Any) -> None:
    """Two steps; the gradients of the second stay."""
    tokens = torch.randint(VOCABULARY, (1, CONTEXT + 1))
    for _ in range(2):
        optimizer.zero_grad()
        fabric.backward(loss_of(model(tokens[:, :-1]), tokens))
        optimizer.step()


def set_up_by_hand(fabric: Fabric, width: int, layers: int) -> Any:  # noqa: ARG001
    model = shard(GPT(width, layers), False)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)


def measure_memory(rank_counts: list[int], width: int, layers: int, as_it_is: bool) -> list[dict[str, Any]]:
    """One row per candidate and number of ranks; ``as_it_is``: with the C library's own ways too."""
    rows = []
    for candidate, ranks in [(name, ranks) for name in ("ddp", HAND, "fsdp") for ranks in rank_counts]:
        row: dict[str, Any] = {"candidate": candidate, "ranks": ranks}
        for exact in (True, False) if as_it_is else (True,):
            with RankPool(timeout_seconds=600) as pool:
                by_rank = pool.run(memory, candidate, ranks, width, layers, exact, ranks=ranks)
            worst = {name: max(values[name] for values in by_rank) for name in by_rank[0]}
            row |= worst if exact else {f"{name}, malloc as it is": worst[name] for name in worst if "peak" in name}
        rows.append(row)
    return rows


def show_steps(rows: list[dict[str, Any]]) -> None:
    names = [HAND, AUTOCAST, OURS, DDP]

    def cells(row: dict[str, Any], clock: str) -> list[str]:
        shown = [row[f"{clock}_milliseconds"].get(name) for name in names]
        ratios = row[f"{clock}_ratio_low_high"]
        return ["-" if value is None else f"{value:.2f}" for value in shown] + [
            "{:.3f} ({:.3f} to {:.3f})".format(*ratios[OURS]),
            f"{ratios[DDP][0]:.2f}",
        ]

    what = [
        f"{row['precision']}, width {row['width']}, {row['ranks']} ranks, {row['accumulate']} micro-batches"
        for row in rows
    ]
    for clock, title in (("clock", "Milliseconds per step"), ("processor", "Milliseconds of processor time per step")):
        show(
            f"{title}, and ratio to fully_shard by hand in the same precision (95 % interval)",
            ["", *names, "fabric_lite / by hand", "DDP / by hand"],
            [[name, *cells(row, clock)] for name, row in zip(what, rows, strict=True)],
        )
    show(
        "Collectives of one step",
        ["", HAND, "elements", OURS, DDP],
        [
            [
                name,
                str(row["collectives"][HAND]["calls"]),
                f"{row['collectives'][HAND]['elements']:,}",
                "the same" if row["same_collectives_as_by_hand"] else "DIFFERENT",
                str(row["collectives"][DDP]["calls"]),
            ]
            for name, row in zip(what, rows, strict=True)
        ],
    )


def show_memory(rows: list[dict[str, Any]], model: str) -> None:
    columns = [name for name in rows[0] if name not in ("candidate", "ranks")]
    show(
        f"MiB on the rank that needs most, AdamW, {model}: held, and peak of resident memory",
        ["", "ranks", *columns],
        [[row["candidate"], str(row["ranks"])] + [f"{row[column]:.1f}" for column in columns] for row in rows],
    )


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--ranks", type=int, default=2, help="ranks of the comparison of steps (default 2)")
    options.add_argument("--blocks", type=int, default=120, help="blocks of each candidate (default 120)")
    options.add_argument("--steps", type=int, default=1, help="steps in a block (default 1)")
    options.add_argument("--part", choices=("steps", "memory"), help="one of the two (default: both)")
    options.add_argument("--quick", action="store_true", help="tiny models and few blocks: whether it runs at all")
    given = options.parse_args()
    if given.quick:
        cases, blocks = [Case("bf16-mixed", 2, 16, 1, given.ranks)], 2
        rank_counts, width, layers = [given.ranks], 32, 2
    else:
        precisions, blocks = ("32-true", "bf16-mixed"), given.blocks
        cases = [Case(name, count, 144, 4, given.ranks) for name in precisions for count in (1, 4)]
        cases += [Case(name, 1, 16, 1, ranks) for name in precisions for ranks in (given.ranks, 1)]
        rank_counts, width, layers = [1, 2, 4], 512, 6
    figures: dict[str, Any] = {}
    if given.part != "memory":
        figures["steps"] = measure_steps(cases, blocks, given.steps)
        show_steps(figures["steps"])
        write(given.json, figures)  # the other part takes minutes more
    if given.part != "steps":
        figures["memory"] = measure_memory(rank_counts, width, layers, as_it_is=not given.quick)
        show_memory(figures["memory"], f"{layers} blocks of width {width}")
        write(given.json, figures)


if __name__ == "__main__":
    main()
