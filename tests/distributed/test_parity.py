"""Every layout, precision, accumulation and clipping equals the loop written by hand, bit for bit."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fabric_lite import Fabric
from fabric_lite.precision import PRECISIONS
from fabric_lite.testing import RankPool
from tests.models import batches, make_net, weights

DTYPES = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}
COMPUTE = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
STEPS = 6


def optimizer_of(model: nn.Module, precision: str) -> torch.optim.Optimizer:
    # Adam's epsilon is nothing in float16: the pure half precisions are compared under SGD.
    if precision == "16-true":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def with_fabric(devices: int, precision: str, accumulate: int, clip: float | None) -> list[torch.Tensor]:
    fabric = Fabric(accelerator="cpu", devices=devices, precision=precision)
    model = make_net()
    optimizer = optimizer_of(model, precision)
    model, optimizer = fabric.setup(model, optimizer)
    for step, x in enumerate(batches(STEPS * accumulate)):
        x = x.chunk(devices)[fabric.global_rank]
        last = (step + 1) % accumulate == 0
        with fabric.no_backward_sync(model, enabled=not last):
            fabric.backward(model(x).pow(2).mean() / accumulate)
        if last:
            if clip is not None:
                fabric.clip_gradients(model, optimizer, max_norm=clip)
            optimizer.step()
            optimizer.zero_grad()
    fabric.release(model, optimizer)
    return weights(model)


def by_hand(devices: int, precision: str, accumulate: int, clip: float | None) -> list[torch.Tensor]:
    rank = torch.distributed.get_rank() if devices > 1 else 0
    model = make_net().to(DTYPES.get(precision, torch.float32))
    optimizer = optimizer_of(model, precision)
    target: Any = DistributedDataParallel(model) if devices > 1 else model
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")
    for step, x in enumerate(batches(STEPS * accumulate)):
        x = x.chunk(devices)[rank].to(DTYPES.get(precision, torch.float32))
        last = (step + 1) % accumulate == 0
        with target.no_sync() if devices > 1 and not last else contextlib.nullcontext():
            with torch.autocast("cpu", COMPUTE[precision]) if precision in COMPUTE else contextlib.nullcontext():
                output = target(x)
            if precision in COMPUTE:
                output = output.float()
            scaler.scale(output.pow(2).mean() / accumulate).backward()
        if last:
            if clip is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize(
    ("devices", "precision", "accumulate", "clip"), list(itertools.product([1, 2], PRECISIONS, [1, 4], [None, 0.1]))
)
def test_training_equals_the_hand_written_loop(
    ranks: RankPool, devices: int, precision: str, accumulate: int, clip: float | None
) -> None:
    arguments = (devices, precision, accumulate, clip)
    if devices == 1:
        ours, theirs = [with_fabric(*arguments)], [by_hand(*arguments)]
    else:
        ours, theirs = ranks.run(with_fabric, *arguments), ranks.run(by_hand, *arguments)
    start = make_net()
    for mine, other in zip(ours, theirs, strict=True):
        for one, two, initial in zip(mine, other, start.parameters(), strict=True):
            assert one.dtype == two.dtype
            assert torch.equal(one, two)
            assert not torch.equal(one.float(), initial.detach())


def clip_norms(devices: int) -> list[float]:
    fabric = Fabric(accelerator="cpu", devices=devices)
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    fabric.setup(model, optimizer)
    norms = []
    for norm_type in (1.0, 2.0, float("inf")):
        optimizer.zero_grad()
        fabric.backward(model(batches(1)[0].chunk(devices)[fabric.global_rank]).pow(2).mean())
        norm = fabric.clip_gradients(model, optimizer, max_norm=0.1, norm_type=norm_type)
        assert type(norm) is torch.Tensor
        optimizer.step()
        norms.append(float(norm))
    fabric.release(model, optimizer)
    return norms


def test_the_norm_is_that_of_one_process_on_all_ranks(ranks: RankPool) -> None:
    first, second = ranks.run(clip_norms, 2)
    assert first == second
    assert first == pytest.approx(clip_norms(1), rel=1e-6)


def clip_with_a_nan_on_one_rank() -> tuple[str, bool]:
    fabric = Fabric(accelerator="cpu", devices=2)
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    before = weights(model)
    factor = float("nan") if fabric.global_rank == 1 else 1.0
    fabric.backward(model(batches(1)[0]).mean() * factor)
    with pytest.raises(RuntimeError, match="non-finite") as error:
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    return str(error.value), all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_a_norm_that_is_not_finite_raises_on_all_ranks(ranks: RankPool) -> None:
    assert all(untouched for _, untouched in ranks.run(clip_with_a_nan_on_one_rank))


def test_clipping_by_value_returns_nothing() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    fabric.backward(model(torch.ones(2, 4)).sum() * 100)
    assert fabric.clip_gradients(model, optimizer, clip_val=0.5) is None
    assert max(float(parameter.grad.abs().max()) for parameter in model.parameters()) == 0.5  # type: ignore[union-attr]
