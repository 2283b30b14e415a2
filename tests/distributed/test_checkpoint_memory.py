"""What loading takes: a rank holds what it keeps and one tensor more, whatever the size of the checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_lite.checkpoint import load, save
from fabric_lite.testing import RankPool

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")

MIB = 1 << 20
WIDTH = 2048  # a weight of float32 has 16 MiB
LAYERS = 5
LARGEST = WIDTH * WIDTH * 4
# Buffers, the allocator's slack, and the pages of code that first run here.
SLACK = 32 * MIB


@pytest.fixture
def fresh_ranks() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def values(layer: int, kind: int, width: int) -> torch.Tensor:
    """Different for each tensor, row and column, and exact in float32."""
    rows, columns = torch.arange(width).unsqueeze(1), torch.arange(width)
    return (rows * 7 + columns + 1000 * layer + 100 * kind).float()


def written(folder: Path, kind: str, layers: int, width: int) -> Path:
    """A checkpoint of this process alone, with two moments for each weight: three times the weights in all."""
    model = {f"{layer}.weight": values(layer, 0, width) for layer in range(layers)}
    moments = {
        layer: {"step": torch.tensor(3.0), "exp_avg": values(layer, 1, width), "exp_avg_sq": values(layer, 2, width)}
        for layer in range(layers)
    }
    group = torch.optim.AdamW([nn.Parameter(torch.ones(1))]).state_dict()["param_groups"][0]
    optimizer = {"state": moments, "param_groups": [{**group, "params": list(range(layers))}]}
    path = folder / f"{layers}-{width}-{kind}"
    save(path, {"model": model, "optimizer": optimizer}, state_dict_type=kind)
    return path


def sharded_state(layers: int, width: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}


def resident(field: str) -> int:
    """``VmRSS``, what is in memory now, or ``VmHWM``, the most that ever was, in bytes; mapped files count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def load_measured(small: Path, large: Path) -> list[tuple[int, bool]]:
    """What loading takes at its peak above what was there before, and whether all values are right; once and again."""
    load(small, sharded_state(1, 64))  # imports, and whatever else happens once
    state = sharded_state(LAYERS, WIDTH)
    found = []
    for _ in range(2):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, so it sees what sampling would miss
        before = resident("VmRSS")
        load(large, state)
        peak = resident("VmHWM") - before
        found.append((peak, all(is_right(state, layer) for layer in range(LAYERS))))
        for tensor in [*state["model"].parameters(), *_moments(state)]:
            tensor.detach().zero_()
    return found


def _moments(state: dict[str, Any]) -> list[torch.Tensor]:
    return [value for entry in state["optimizer"].state.values() for value in entry.values()]


def is_right(state: dict[str, Any], layer: int) -> bool:
    weight = state["model"][layer].weight
    moments = state["optimizer"].state[weight]
    half = WIDTH // 2
    mine = slice(weight.device_mesh.get_rank() * half, (weight.device_mesh.get_rank() + 1) * half)
    found = [weight.detach(), moments["exp_avg"], moments["exp_avg_sq"]]
    return all(torch.equal(one.to_local(), values(layer, kind, WIDTH)[mine]) for kind, one in enumerate(found))


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_loading_takes_the_own_moments_and_one_tensor(fresh_ranks: RankPool, tmp_path: Path, kind: str) -> None:
    small, large = written(tmp_path, kind, 1, 64), written(tmp_path, kind, LAYERS, WIDTH)
    size = 3 * LAYERS * LARGEST
    assert large.is_dir() == (kind == "sharded")
    assert sum(path.stat().st_size for path in (large.iterdir() if large.is_dir() else [large])) > size
    found = fresh_ranks.run(load_measured, small, large, ranks=2)
    new_moments = 2 * LAYERS * LARGEST // 2
    limit = new_moments + LARGEST + SLACK
    assert limit < 0.6 * size
    for (first, first_right), (again, again_right) in found:
        assert first_right
        assert again_right
        assert new_moments <= first <= limit, f"{first / MIB:.0f} MiB of {limit / MIB:.0f}"
        # The moments are there: nothing but one tensor is needed.
        assert again <= LARGEST + SLACK, f"{again / MIB:.0f} MiB of {(LARGEST + SLACK) / MIB:.0f}"
