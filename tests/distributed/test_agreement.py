"""What the ranks set up is compared before it is laid out; the first difference is named on all of them."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch
from torch import nn

from fabric_lite import CollectiveError, DDPStrategy, Fabric, notices, seed_everything
from fabric_lite import agreement as module_under_test
from fabric_lite.testing import RankPool


def model(odd: bool, kind: str) -> nn.Module:
    net: Any = nn.Sequential(nn.Linear(4, 8 + (odd and kind == "shape")), nn.ReLU())
    if odd and kind == "name":
        net.add_module("extra", nn.Linear(1, 1))
    if odd and kind == "dtype":
        net.double()
    if odd and kind == "frozen":
        net[0].weight.requires_grad_(False)
    if odd and kind == "buffer":
        net.register_buffer("mask", torch.ones(3))
    if odd and kind == "order":
        net[0].bias = None
        net[0].register_parameter("early", nn.Parameter(torch.ones(8)))
    return net  # type: ignore[no-any-return]


def optimizer(parameters: Any, odd: bool, kind: str) -> torch.optim.Optimizer:
    if odd and kind == "optimizer":
        return torch.optim.AdamW(parameters, lr=0.1)
    return torch.optim.SGD(parameters, lr=0.2 if odd and kind == "lr" else 0.1)


def error_of_setup(kind: str, strategy: str) -> list[str]:
    fabric = Fabric(accelerator="cpu", strategy=strategy)
    odd = fabric.global_rank == 1
    net = model(odd, kind)
    step = optimizer(net.parameters(), odd, kind)
    with pytest.raises(CollectiveError) as error:
        fabric.setup(net, step)
    # Nothing is half done: with a model that agrees it works.
    net = model(False, kind)
    fabric.setup(net, optimizer(net.parameters(), False, kind))
    return str(error.value).splitlines()


DIFFERENCES: dict[str, tuple[str, str]] = {
    "shape": (
        "ranks 0, 2: parameter '0.weight': (8, 4) torch.float32",
        "rank 1: parameter '0.weight': (9, 4) torch.float32",
    ),
    "name": ("ranks 0, 2: optimizer 0 (SGD): 1 groups", "rank 1: parameter 'extra.weight': (1, 1) torch.float32"),
    "dtype": (
        "ranks 0, 2: parameter '0.weight': (8, 4) torch.float32",
        "rank 1: parameter '0.weight': (8, 4) torch.float64",
    ),
    "frozen": (
        "ranks 0, 2: parameter '0.weight': (8, 4) torch.float32",
        "rank 1: parameter '0.weight': (8, 4) torch.float32, frozen",
    ),
    "order": ("ranks 0, 2: parameter '0.bias': (8,) torch.float32", "rank 1: parameter '0.early': (8,) torch.float32"),
    "buffer": ("ranks 0, 2: optimizer 0 (SGD): 1 groups", "rank 1: buffer 'mask': (3,) torch.float32"),
    "optimizer": ("ranks 0, 2: optimizer 0 (SGD): 1 groups", "rank 1: optimizer 0 (AdamW): 1 groups"),
    "lr": ("ranks 0, 2: optimizer 0 (SGD), group 0, lr: 0.1", "rank 1: optimizer 0 (SGD), group 0, lr: 0.2"),
}


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_a_difference_is_named_on_all_ranks_and_nothing_is_set_up(ranks: RankPool, kind: str) -> None:
    first, second, third = ranks.run(error_of_setup, kind, "ddp", ranks=3)
    assert first == second == third
    assert [line.strip() for line in first[2:4]] == list(DIFFERENCES[kind])


def test_a_sharded_setup_is_compared_too(ranks: RankPool) -> None:
    first, second = ranks.run(error_of_setup, "shape", "fsdp")
    assert first == second
    assert "rank 1: parameter '0.weight': (9, 4) torch.float32" in first[3]


def said_at_setup(own_seed: bool) -> str:
    fabric = Fabric(accelerator="cpu", strategy="ddp")
    seed_everything(fabric.global_rank if own_seed else 3, workers=False)
    notices._said.clear()
    output = io.StringIO()
    with contextlib.redirect_stderr(output):
        fabric.setup(nn.Linear(2, 2))
        fabric.setup(nn.Linear(2, 2))
    return output.getvalue()


def test_seeds_that_differ_are_said_once_on_rank_zero(ranks: RankPool) -> None:
    assert ranks.run(said_at_setup, True) == ["fabric_lite: the ranks differ in seed: 0 on rank 0, 1 on rank 1\n", ""]
    assert ranks.run(said_at_setup, False) == ["", ""]


def gathers_of_a_setup() -> int:
    fabric = Fabric(accelerator="cpu", strategy="ddp")
    fabric.setup(nn.Linear(2, 2))
    from fabric_lite.mesh import sequence_numbers

    before = sum(sequence_numbers().values())
    module_under_test.check_agreement(nn.Linear(2, 2), [], {})
    return sum(sequence_numbers().values()) - before


def test_ranks_that_agree_gather_one_hash(ranks: RankPool) -> None:
    assert ranks.run(gathers_of_a_setup) == [1, 1]


def spread_by_hand() -> bool:
    fabric = Fabric(accelerator="cpu", strategy="ddp")
    net: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2 + fabric.global_rank))
    net._ddp_params_and_buffers_to_ignore = ["1.weight", "1.bias"]
    fabric.setup(net)
    return True


def test_parameters_that_ddp_leaves_alone_may_differ(ranks: RankPool) -> None:
    assert ranks.run(spread_by_hand) == [True, True]


def own_buffers_and_metrics() -> bool:
    fabric = Fabric(accelerator="cpu", strategy=DDPStrategy(broadcast_buffers=False))
    net = nn.Linear(2, 2)
    net.register_buffer("bank", torch.zeros(3 + fabric.global_rank))
    fabric.setup(net)
    if fabric.is_global_zero:
        fabric.setup(nn.Linear(2, 2).requires_grad_(False))
    fabric.barrier()
    return True


def test_buffers_that_nobody_sends_may_differ_and_rank_zero_may_set_up_a_frozen_model_alone(ranks: RankPool) -> None:
    assert ranks.run(own_buffers_and_metrics) == [True, True]
