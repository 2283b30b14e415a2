"""The layouts that the large tables run over, a small GPT that fits all of them, and a choice of cells by pairs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fabric_lite import DDPStrategy, Fabric, Strategy
from fabric_lite.strategies import FSDPStrategy, SingleDeviceStrategy
from fabric_lite.testing import RankPool

VOCABULARY, CONTEXT, WIDTH, HEAD_WIDTH = 32, 8, 16, 8
SEQUENCES = 4  # of a global batch: one each for the largest layout


class Attention(nn.Module):
    """Causal attention; a rank may hold some of the heads, so their number is read off the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.project = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [
            layer(x).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        ]
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.project(mixed.transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.second_norm, self.up, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.first_norm(x))
        return x + self.down(functional.gelu(self.up(self.second_norm(x))))


class GPT(nn.Module):
    """``(batch, context)`` tokens to ``(batch, context, vocabulary)`` logits; the root reads a weight directly."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def make_gpt(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT()


def token_batches(count: int, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Global batches: tokens ``(sequences, context)`` of a noisy walk, which can be learned, and their next tokens."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (count, SEQUENCES, CONTEXT + 1), generator=generator)
    walks = steps.cumsum(-1) % VOCABULARY
    return [(walk[:, :-1], walk[:, 1:]) for walk in walks]


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def split_over_two_axes(model: nn.Module, mesh: Any) -> nn.Module:
    """The usual plan of tensor parallelism: columns, then rows; norms, embeddings and head stay plain."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    columns, rows = ("query", "key", "value", "up"), ("project", "down")
    plan: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in (*columns, *rows):
            plan[name] = RowwiseParallel() if name.rpartition(".")[2] in rows else ColwiseParallel()
    return parallelize_module(model, mesh["tensor_parallel"], plan)


def _model_parallel(data: int, tensor: int) -> Strategy:
    from fabric_lite.strategies import ModelParallelStrategy

    return ModelParallelStrategy(split_over_two_axes, data_parallel_size=data, tensor_parallel_size=tensor)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to lay a model out.

    Args:
        ranks: How many.
        shares: Into how many shares a global batch is dealt.
        strategy: Makes the strategy.
    """

    ranks: int
    shares: int
    strategy: Callable[[], Strategy]

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """This rank's part of a global batch."""
        rank = torch.distributed.get_rank() if self.ranks > 1 else 0
        return batch.chunk(self.shares)[rank * self.shares // self.ranks]

    def fabric(self, **options: Any) -> Fabric:
        return Fabric(accelerator="cpu", devices=self.ranks, strategy=self.strategy(), **options)


LAYOUTS = {
    "single": Layout(1, 1, SingleDeviceStrategy),
    "ddp 2": Layout(2, 2, DDPStrategy),
    "fsdp 2": Layout(2, 2, FSDPStrategy),
    "fsdp 4": Layout(4, 4, FSDPStrategy),
    "fsdp_cpu_offload 2": Layout(2, 2, lambda: FSDPStrategy(cpu_offload=True)),
    "hsdp 2x2": Layout(4, 4, lambda: FSDPStrategy(replicas=2)),
    "tensor parallel 2": Layout(2, 1, lambda: _model_parallel(1, 2)),
    "2-D 2x2": Layout(4, 2, lambda: _model_parallel(2, 2)),
}


def run_under(ranks: RankPool, layout: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(layout, *arguments)`` on each rank of that layout; a single device is this process."""
    count = LAYOUTS[layout].ranks
    return [function(layout, *arguments)] if count == 1 else ranks.run(function, layout, *arguments, ranks=count)


def pairwise(cells: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """A small choice of ``cells`` in which every pair of values of any two columns occurs that occurs at all."""
    cells = list(cells)
    missing = {pair for cell in cells for pair in pairs_of(cell)}
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: len(pairs_of(cell) & missing))
        chosen.append(best)
        missing -= pairs_of(best)
    return chosen


def pairs_of(cell: Sequence[Any]) -> set[Any]:
    return set(itertools.combinations(enumerate(cell), 2))
