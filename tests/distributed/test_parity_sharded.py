"""Every layout trains as one process does on the same global batch, in every precision.

Plain pytest runs every pair of values of any two columns, for a few steps; ``pytest -m full`` runs all cells for more
and prints the largest differences.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from fabric_lite.testing import RankPool
from tests.distributed.layouts import LAYOUTS, loss_of, make_gpt, pairs_of, pairwise, run_under, token_batches
from tests.models import full

PRECISIONS = {"64-true": torch.float64, "32-true": None, "bf16-true": torch.bfloat16}
COMPUTE = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
STEPS, FEW_STEPS = 20, 8  # of the complete table, and of the pairs
MAX_NORM = 0.5

# Largest absolute difference of any parameter after 20 steps. Adam divides by the root of second moments, which makes
# the last bits of small gradients larger.
BARS = {
    ("64-true", "sgd"): 1e-12,
    ("32-true", "sgd"): 1e-5,
    ("64-true", "adamw"): 1e-10,
    ("32-true", "adamw"): 1e-4,
}
# The half types: how many times as far from the float64 run as the half run of one process is.
HALF_BAR = 2.0
# After the first rounding two half runs are two runs: their norms are as alike as those of two nearby models.
HALF_NORM_BAR = 5e-2

CELLS = [
    cell
    for cell in itertools.product(
        ["single", "ddp 2", "fsdp 2", "hsdp 2x2", "tensor parallel 2", "2-D 2x2"],
        ["64-true", "32-true", "bf16-mixed", "bf16-true", "16-mixed"],
        [1, 3],
        [None, MAX_NORM],
        ["sgd", "adamw"],
    )
    if cell[4] == "sgd" or (cell[1], cell[4]) in BARS
]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training run gives: parameters in float64, the norm of each step, and how often the loss scale fell."""

    parameters: torch.Tensor
    norms: torch.Tensor
    skipped: int


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([full(parameter).double().flatten() for parameter in model.parameters()])


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-5)


def with_fabric(
    layout: str, precision: str, steps: int, accumulate: int, clip: float | None, optimizer_name: str
) -> Run:
    share, fabric = LAYOUTS[layout].share, LAYOUTS[layout].fabric(precision=precision)
    model = make_gpt()
    optimizer = make_optimizer(optimizer_name, model)
    fabric.setup(model, optimizer)
    data, norms = iter(token_batches(steps * accumulate)), []
    for _ in range(steps):
        for number in range(accumulate):
            tokens, targets = map(share, next(data))
            with fabric.no_backward_sync(model, enabled=number < accumulate - 1):
                fabric.backward(loss_of(model(tokens), targets) / accumulate)
        if clip is not None:
            norms.append(fabric.clip_gradients(model, optimizer, max_norm=clip))
        optimizer.step()
        optimizer.zero_grad()
    scale = fabric.state_dict()["loss_scaler"]["scale"] if precision == "16-mixed" else 1.0
    result = Run(flat(model), torch.tensor([float(norm) for norm in norms], dtype=torch.float64), skips(scale))
    fabric.close()
    return result


@functools.cache
def one_process(precision: str, steps: int, accumulate: int, clip: float | None, optimizer_name: str) -> Run:
    """The oracle: plain PyTorch over the whole global batch."""
    model = make_gpt().to(PRECISIONS.get(precision))
    optimizer = make_optimizer(optimizer_name, model)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")
    data, norms = iter(token_batches(steps * accumulate)), []
    for _ in range(steps):
        for _ in range(accumulate):
            tokens, targets = next(data)
            with torch.autocast("cpu", COMPUTE[precision]) if precision in COMPUTE else contextlib.nullcontext():
                logits = model(tokens)
            logits = logits.float() if precision in COMPUTE else logits
            scaler.scale(loss_of(logits, targets) / accumulate).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    found = torch.tensor([float(norm) for norm in norms], dtype=torch.float64)
    return Run(flat(model), found, skips(scaler.get_scale()))


def skips(scale: float) -> int:
    """How often the loss scale, at first 2 ** 16, was halved; 1 stands for no scaler."""
    return 0 if scale == 1 else round(16 - torch.tensor(scale).log2().item())


def distances(precision: str, result: Run, *oracle: Any) -> tuple[float, float]:
    """How far parameters and norms are from the oracle's, in the units in which this precision's bars are."""
    expected = one_process(precision, *oracle)
    gaps = (result.norms - expected.norms).abs()
    if (precision, "sgd") in BARS:
        return float((result.parameters - expected.parameters).abs().max()), float(max(gaps, default=0.0))
    exact = one_process("64-true", *oracle).parameters
    own = (expected.parameters - exact).norm()
    assert own > 0  # there is rounding to compare with
    return float((result.parameters - exact).norm() / own), float(max(gaps / expected.norms, default=0.0))


MEASURED: dict[tuple[str, str, str], tuple[float, float]] = {}


def check(ranks: RankPool, cell: tuple[Any, ...], steps: int) -> None:
    layout, precision, accumulate, clip, optimizer_name = cell
    oracle = (steps, accumulate, clip, optimizer_name)
    results = run_under(ranks, layout, with_fabric, precision, *oracle)
    first, expected = results[0], one_process(precision, *oracle)
    for other in results[1:]:
        assert torch.equal(other.parameters, first.parameters)
        assert torch.equal(other.norms, first.norms)
    # The cell says something: the model has learned, clipping has clipped, and no step was left out.
    assert (first.parameters - flat(make_gpt())).norm() > 0.5
    assert first.skipped == expected.skipped == 0
    assert len(first.norms) == (0 if clip is None else steps)
    assert all(first.norms > MAX_NORM)

    apart, norms_apart = distances(precision, first, *oracle)
    key = (layout, precision, optimizer_name)
    before = MEASURED.get(key, (0.0, 0.0))
    MEASURED[key] = (max(apart, before[0]), max(norms_apart, before[1]))
    bar = BARS.get((precision, optimizer_name))
    assert apart <= (HALF_BAR if bar is None else bar)
    assert norms_apart <= (HALF_NORM_BAR if bar is None else bar)


def label(cell: tuple[Any, ...]) -> str:
    layout, precision, accumulate, clip, optimizer_name = cell
    return f"{layout}, {precision}, {optimizer_name}, accumulate {accumulate}, clip {clip}"


@pytest.mark.parametrize("cell", pairwise(CELLS), ids=label)
def test_training_equals_one_process(ranks: RankPool, cell: tuple[Any, ...]) -> None:
    check(ranks, cell, FEW_STEPS)


@pytest.mark.full
@pytest.mark.parametrize("cell", CELLS, ids=label)
def test_training_equals_one_process_in_every_cell(ranks: RankPool, cell: tuple[Any, ...]) -> None:
    check(ranks, cell, STEPS)


@pytest.mark.full
def test_the_largest_differences_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    if not MEASURED:
        pytest.skip("shows what the cells before it have measured")
    with capsys.disabled():
        print("\nLargest differences from one process: parameters / norms. Half types: distance from the float64 run")
        print("in units of the one-process half run's own / relative difference of norms.")
        for (layout, precision, optimizer_name), (apart, norms_apart) in sorted(MEASURED.items()):
            print(f"{layout:18} {precision:11} {optimizer_name:6} {apart:9.2e} / {norms_apart:9.2e}")


def test_the_chosen_cells_have_every_pair_of_values() -> None:
    chosen = pairwise(CELLS)
    assert set(chosen) <= set(CELLS)
    assert set().union(*map(pairs_of, chosen)) == set().union(*map(pairs_of, CELLS))
    assert len(chosen) < len(CELLS) / 3
    assert pairwise([(1, 1), (1, 2), (2, 1)]) == [(1, 1), (1, 2), (2, 1)]  # every pair of the only two columns
