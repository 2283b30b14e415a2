"""Modules made without memory and sharded before they have values: each rank gets its part of a plain construction."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from fabric_lite.deferred import record, values_of
from fabric_lite.testing import RankPool
from tests.models import CountCollectives, mesh_of

CPU = torch.device("cpu")


class Tied(nn.Module):
    """Odd sizes, so that the ranks' shards differ; tied weights; a buffer; BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(copy.deepcopy(nn.Linear(6, 6)) for _ in range(3))
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.register_buffer("mask", torch.tril(torch.ones(4, 4)))
        self.apply(self._init_weights)
        self.head.weight = self.tokens.weight

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = torch.relu(block(x)) + x
        return self.head(self.norm(x))


def full(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def shard_and_fill(cast: bool) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(5)
    plain = Tied()
    after = torch.rand(3)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(5)
    with record():
        module = Tied()
    values = values_of(module)
    assert values is not None
    if cast:
        module.to(torch.bfloat16)
        plain.to(torch.bfloat16)
    for block in [*module.blocks, module]:
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with CountCollectives() as counted:
        values.fill(module, CPU)
    drawn = torch.rand(3)
    state = {name: full(tensor) for name, tensor in module.state_dict().items()}
    same = {name: torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items()}
    batch = torch.arange(8) % 11
    expected, output = plain(batch), module(batch)
    output.float().sum().backward()
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {
        "same": same,
        "tied": module.head.weight is module.tokens.weight,
        "collectives": counted.count,
        "drawn": torch.equal(drawn, after),
        "output": torch.equal(output, expected),
        "held": held == {id(parameter) for parameter in module.parameters()},
        "local": sum(parameter.to_local().numel() for parameter in module.parameters()),
        "all": sum(parameter.numel() for parameter in plain.parameters()),
        "names": list(plain.state_dict()) == list(module.state_dict()),
    }


@pytest.mark.parametrize("cast", [False, True])
def test_each_rank_keeps_its_shard_of_the_values_of_a_plain_construction(ranks: RankPool, cast: bool) -> None:
    results = ranks.run(shard_and_fill, cast, ranks=2)
    for result in results:
        assert all(result["same"].values()), result["same"]
        assert result["tied"]
        assert result["drawn"]
        assert result["output"]
        assert result["held"]
        assert result["names"]
        assert result["collectives"] == 0
    assert sum(result["local"] for result in results) == results[0]["all"]


def split_and_fill() -> list[bool]:
    """Tensor parallel by columns and rows, and FSDP over it."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = mesh_of((2, 2), ("shard", "tensor"))
    torch.manual_seed(5)
    plain = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6))
    torch.manual_seed(5)
    with record():
        module = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6))
    values = values_of(module)
    assert values is not None
    parallelize_module(module, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(module, mesh=mesh["shard"])
    values.fill(module, CPU)
    states = zip(plain.state_dict().values(), module.state_dict().values(), strict=True)
    return [torch.equal(one, full(other)) for one, other in states]


def test_values_are_right_under_tensor_parallelism_and_sharding_together(ranks: RankPool) -> None:
    assert ranks.run(split_and_fill, ranks=4) == [[True] * 4] * 4
