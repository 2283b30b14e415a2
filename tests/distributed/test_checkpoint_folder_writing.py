"""Sharded tensors in a folder and in one file: each element once, whatever the layout, and with little memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fabric_lite.checkpoint import load, save
from fabric_lite.checkpoint.manifest import Manifest
from fabric_lite.errors import CheckpointError
from fabric_lite.testing import RankPool
from tests.models import mesh_of

MIB = 1 << 20


def whole(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Every element different."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape).to(dtype)


def laid_out(name: str, full: torch.Tensor) -> Any:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    ranks = dist.get_world_size()
    line = dist.device_mesh.init_device_mesh("cpu", (ranks,))
    if name == "partial":
        return DTensor.from_local(full / ranks, line, [Partial()])
    if name in ("rows", "columns", "copies"):
        placement = {"rows": Shard(0), "columns": Shard(1), "copies": Replicate()}[name]
        return distribute_tensor(full, line, [placement])
    grid = mesh_of((2, ranks // 2), ("data", "model"))
    if name == "columns of one axis":  # the ranks of the other axis have the same, on a mesh of their own
        return distribute_tensor(full, grid["model"], [Shard(1)])
    placements = {
        "copies of rows": [Replicate(), Shard(0)],
        "rows of copies": [Shard(0), Replicate()],
        "rows of columns": [Shard(1), Shard(0)],
        "rows of rows": [Shard(0), Shard(0)],
    }[name]
    return distribute_tensor(full, grid, placements)


def save_laid_out(folder: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    state = {"tensor": laid_out(name, whole(shape, dtype)), "plain": torch.full((3,), float(dist.get_rank()))}
    for kind in ("sharded", "full"):
        save(folder / kind, state, state_dict_type=kind)


def check_saved(folder: Path, expected: torch.Tensor) -> None:
    """Both kinds hold the tensor, and the folder has each of its elements once."""
    for kind in ("sharded", "full"):
        saved = load(folder / kind)
        assert torch.equal(saved["tensor"], expected), kind
        assert saved["plain"].tolist() == [0.0, 0.0, 0.0]  # of rank 0
    assert torch.load(folder / "full", weights_only=True)["tensor"].equal(expected)
    chunks = [chunk for entry in Manifest.read(folder / "sharded").tensors for chunk in entry.chunks]
    assert sum(chunk.end - chunk.begin for chunk in chunks) == expected.numel() * expected.itemsize + 12


@pytest.mark.parametrize(
    ("name", "shape", "ranks_"),
    [
        ("rows", (6, 4), 2),
        ("columns", (6, 4), 2),
        ("rows", (5, 3), 2),
        ("columns", (3, 5), 2),
        ("rows", (1, 3), 2),
        ("rows", (0, 3), 2),
        ("rows", (7,), 2),
        ("copies", (3, 2), 2),
        ("copies", (), 2),
        ("partial", (4, 2), 2),
        ("copies of rows", (5, 3), 4),
        ("rows of copies", (5, 3), 4),
        ("rows of columns", (5, 7), 4),
        ("rows of rows", (9, 2), 4),
        ("columns of one axis", (3, 5), 4),
    ],
)
def test_a_tensor_of_any_layout_is_written_whole_and_once(
    ranks: RankPool, tmp_path: Path, name: str, shape: tuple[int, ...], ranks_: int
) -> None:
    ranks.run(save_laid_out, tmp_path, name, shape, torch.float32, ranks=ranks_)
    check_saved(tmp_path, whole(shape))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_a_sharded_tensor_of_any_dtype_is_written_as_it_is(ranks: RankPool, tmp_path: Path, dtype: torch.dtype) -> None:
    ranks.run(save_sharded_bytes, tmp_path, dtype)
    for kind in ("sharded", "full"):
        saved = load(tmp_path / kind)["tensor"]
        assert saved.dtype == dtype
        assert saved.view(torch.uint8).flatten().tolist() == (torch.arange(48) % 2).tolist()


def save_sharded_bytes(folder: Path, dtype: torch.dtype) -> None:
    from torch.distributed.tensor import DTensor, Shard

    mine = (torch.arange(24) % 2).to(torch.uint8).view(dtype)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    tensor = DTensor.from_local(mine, mesh, [Shard(0)])
    for kind in ("sharded", "full"):
        save(folder / kind, {"tensor": tensor}, state_dict_type=kind)


def save_strided(folder: Path, width: int) -> list[list[float]]:
    """Fully sharded over tensor parallel: shards of shards, cut from right to left."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = mesh_of((2, 2), ("data", "model"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    expected = [parameter.detach().tolist() for parameter in model.parameters()]
    parallelize_module(model, mesh["model"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    for kind in ("sharded", "full"):
        save(folder / kind, {"model": model}, state_dict_type=kind)
    return expected


@pytest.mark.parametrize("width", [4, 5, 7])
def test_shards_of_tensor_parallel_shards_are_put_together_right(ranks: RankPool, tmp_path: Path, width: int) -> None:
    expected = ranks.run(save_strided, tmp_path, width, ranks=4)[0]
    for kind in ("sharded", "full"):
        assert [value.tolist() for value in load(tmp_path / kind)["model"].values()] == expected, kind


def save_tied(path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    save(path, {"model": model}, state_dict_type="sharded")


def test_tied_weights_that_are_sharded_are_one_tensor_in_the_folder(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(save_tied, tmp_path / "a")
    assert len(Manifest.read(tmp_path / "a").tensors) == 2
    model = load(tmp_path / "a")["model"]
    assert model["0.weight"].data_ptr() == model["1.weight"].data_ptr() != model["2.weight"].data_ptr()


def failing_save(folder: Path, case: str) -> str:
    state = {"tensor": laid_out("rows", whole((400, 100)))}
    kind = "full" if case.startswith("file") else "sharded"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    failing = dist.get_rank() == int(case[-1])
    try:
        if "too large" in case and failing:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        if "other kind" in case and failing:
            kind = "full"
        save(folder / "a.ckpt", state, state_dict_type=kind)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "nothing"


@pytest.mark.parametrize(
    ("case", "own", "others"),
    [
        ("folder too large on rank 0", "File too large", "failed on rank 0"),
        ("folder too large on rank 1", "File too large", "failed on rank 1"),
        ("file too large on rank 0", "File too large", "failed on rank 0"),
        ("other kind on rank 1", "different kinds", "different kinds"),
    ],
)
def test_a_write_that_fails_on_one_rank_raises_on_both_and_leaves_the_old_checkpoint(
    ranks: RankPool, tmp_path: Path, case: str, own: str, others: str
) -> None:
    save(tmp_path / "a.ckpt", {"value": 1}, state_dict_type="sharded")
    messages = ranks.run(failing_save, tmp_path, case)
    failed = int(case[-1])
    assert own in messages[failed]
    assert others in messages[1 - failed]
    assert load(tmp_path / "a.ckpt") == {"value": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def save_what_only_rank_0_has_sharded(folder: Path, kind: str) -> str:
    tensor = whole((4, 2))
    try:
        save(
            folder / "a.ckpt", {"tensor": [laid_out("partial", tensor), tensor][dist.get_rank()]}, state_dict_type=kind
        )
    except CheckpointError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_a_sum_that_only_one_rank_has_to_make_is_an_error_on_both(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    for message in ranks.run(save_what_only_rank_0_has_sharded, tmp_path, kind):
        assert "The ranks hold different sharded tensors" in message
    assert not list(tmp_path.iterdir())


@pytest.fixture
def fresh_ranks() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def resident(field: str) -> int:
    """``VmRSS``, what is in memory now, or ``VmHWM``, the most that ever was, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def save_measured(folder: Path, kind: str) -> int:
    """What saving 256 MiB over two ranks takes at its peak above what was there before."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = nn.Sequential(*(nn.Linear(2048, 2049, bias=False) for _ in range(16)))
    fully_shard(model, mesh=mesh)
    save(folder / "small", {"model": fully_shard(nn.Linear(4, 4), mesh=mesh)}, state_dict_type=kind)  # imports
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    save(folder / "large", {"model": model}, state_dict_type=kind)
    return resident("VmHWM") - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize(("kind", "limit"), [("sharded", 16 * MIB + 8 * MIB), ("full", 2 * 16 * MIB + 8 * MIB)])
def test_saving_takes_a_buffer_or_two_whatever_the_size_of_the_model(
    fresh_ranks: RankPool, tmp_path: Path, kind: str, limit: int
) -> None:
    peaks = fresh_ranks.run(save_measured, tmp_path, kind)
    assert max(peaks) <= limit, [f"{peak / MIB:.1f} MiB" for peak in peaks]
