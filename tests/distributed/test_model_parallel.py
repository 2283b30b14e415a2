"""Tensor parallelism and meshes of two axes: training equals one process, whatever the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from fabric_lite import Fabric
from fabric_lite.strategies import ModelParallelStrategy
from fabric_lite.testing import RankPool

VOCABULARY, WIDTH = 11, 8


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(self.norm(x)))))


class Model(nn.Module):
    """Tokens (batch, time) to logits (batch, time, vocabulary)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(Block(dropout), Block(dropout))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.blocks(self.tokens(tokens))))
        return logits


def make_model(dropout: float = 0.0) -> Model:
    torch.manual_seed(0)
    return Model(dropout)


def tokens(count: int, size: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (size, 4), generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model(x).flatten(0, 1), x.roll(-1, 1).flatten())


def by_columns_and_rows(model: nn.Module, device_mesh: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import parallelize_module

    return parallelize_module(model, device_mesh["tensor_parallel"], styles())


def with_own_fully_shard(model: Any, device_mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    by_columns_and_rows(model, device_mesh)
    for block in model.blocks:
        fully_shard(block, mesh=device_mesh["data_parallel"])
    return model


def styles() -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}


def along_the_sequence(norms: bool = True) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    plan = {
        "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "blocks.*.up": ColwiseParallel(input_layouts=Shard(1)),
        "blocks.*.down": RowwiseParallel(output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return {**plan, "blocks.*.norm": SequenceParallel(), "norm": SequenceParallel()} if norms else plan


PLANS: dict[str, Any] = {
    "function": lambda: by_columns_and_rows,
    "own fully_shard": lambda: with_own_fully_shard,
    "mapping": styles,
    "sequence": along_the_sequence,
}
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def full(tensor: Any) -> torch.Tensor:
    whole: torch.Tensor = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
    return whole


def train(strategy: ModelParallelStrategy | None, ranks: int, optimizer_name: str, accumulate: int, clip: float) -> Any:
    """One process where there is no strategy; else this rank's share of the same batches."""
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy or "auto", precision="64-true")
    model = make_model()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    fabric.setup(model, optimizer)
    share, shares = 0, 1
    if strategy is not None:
        axis = fabric.device_mesh["data_parallel"]
        share, shares = axis.get_local_rank(), axis.size()
    norms = []
    for step, x in enumerate(tokens(4 * accumulate)):
        last = (step + 1) % accumulate == 0
        with fabric.no_backward_sync(model, enabled=not last):
            fabric.backward(loss_of(model, x.chunk(shares)[share]) / accumulate)
        if last:
            norms.append(float(fabric.clip_gradients(model, optimizer, max_norm=clip)))
            optimizer.step()
            optimizer.zero_grad()
    return [full(parameter) for parameter in model.parameters()], norms


def train_planned(plan: str, data: int, tensor: int, optimizer_name: str, accumulate: int, clip: float) -> Any:
    strategy = ModelParallelStrategy(PLANS[plan](), data, tensor)
    return train(strategy, data * tensor, optimizer_name, accumulate, clip)


@pytest.mark.parametrize(
    ("plan", "data", "tensor", "optimizer_name", "accumulate"),
    [
        ("function", 1, 2, "sgd", 1),
        ("mapping", 1, 2, "adamw", 2),
        ("sequence", 1, 2, "sgd", 2),
        ("function", 2, 2, "sgd", 2),
        ("own fully_shard", 2, 2, "adamw", 1),
        ("own fully_shard", 1, 2, "sgd", 1),
        ("sequence", 2, 2, "sgd", 1),
        ("sequence", 2, 1, "adamw", 1),
    ],
)
def test_training_equals_one_process_on_the_global_batch(
    ranks: RankPool, plan: str, data: int, tensor: int, optimizer_name: str, accumulate: int
) -> None:
    expected, norms = train(None, 1, optimizer_name, accumulate, 0.5)
    for found, norms_found in ranks.run(
        train_planned, plan, data, tensor, optimizer_name, accumulate, 0.5, ranks=data * tensor
    ):
        assert norms_found == pytest.approx(norms, rel=1e-12)
        for one, two in zip(found, expected, strict=True):
            # Adam divides by the root of tiny second moments, so the last bits grow.
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12 if optimizer_name == "sgd" else 1e-9)
