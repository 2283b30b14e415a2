"""A disk that fails in the middle of a load, after everything was checked, leaves all objects as they were."""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_lite.checkpoint import load, load_raw, memory, save, way_back
from fabric_lite.checkpoint.stored import StoredTensor
from fabric_lite.checkpoint.way_back import WayBack
from fabric_lite.collectives import rank
from fabric_lite.errors import CheckpointError
from fabric_lite.testing import RankPool
from tests.faults.test_checkpoint_broken import objects, same, values

PLAIN = {"epoch": 7, "history": [7.0] * 3, "more": 1}


def state(number: float = 5.0) -> dict[str, Any]:
    """More than one module and optimizer, and parameters and values in the user's own containers."""
    first, second = objects(number), objects(number)
    parameters = [nn.Parameter(torch.full((3,), number)) for _ in range(2)]
    return {**first, "model 2": second["model"], "optimizer 2": second["optimizer"], "list": parameters}


def saved(path: Path, kind: str) -> None:
    save(path, {**state(7.0), "plain": PLAIN}, state_dict_type=kind)


def fail_after(reads: int, patch: pytest.MonkeyPatch) -> None:
    """Let so many tensors of the checkpoint be read, and no more."""
    read, left = StoredTensor.read, iter(range(reads))

    def failing(tensor: StoredTensor, *arguments: Any) -> Any:
        ours = any(piece.locate().file.path.name == "old values" for piece in tensor.pieces)
        if not ours and next(left, None) is None:
            raise CheckpointError("This checkpoint could not be read.", given="Input/output error")
        return read(tensor, *arguments)

    patch.setattr(StoredTensor, "read", failing)


def failing_loads(path: Path, on_rank: int = 0) -> tuple[int, bool, bool]:
    """Load with a disk that fails after 0, 1, 2, ... reads; how often it failed, whether nothing had changed, and all
    had in the end."""
    untouched = True
    for reads in itertools.count():
        current = state()
        before = values(current)
        with pytest.MonkeyPatch.context() as patch:
            if rank() == on_rank:
                fail_after(reads, patch)
            try:
                load(path, current)
            except CheckpointError as error:
                untouched = untouched and "could not be read" in str(error) and same(before, values(current))
                continue
        return reads, untouched, same(values({**state(7.0), "plain": PLAIN}), values(current))
    raise AssertionError


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_wherever_the_disk_fails_everything_stays_as_it_was(tmp_path: Path, kind: str) -> None:
    saved(tmp_path / "a", kind)
    failures, untouched, loaded = failing_loads(tmp_path / "a")
    assert failures > 20
    assert untouched
    assert loaded


def test_where_the_disk_of_one_rank_fails_the_objects_of_all_stay_as_they_were(tmp_path: Path, ranks: RankPool) -> None:
    ranks.run(saved, tmp_path / "a", "sharded")
    results = ranks.run(failing_loads, tmp_path / "a", 1)
    assert results[0] == results[1]
    failures, untouched, loaded = results[0]
    assert failures > 20
    assert untouched
    assert loaded


def test_without_room_for_the_old_values_the_error_says_what_may_be_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "a", "full")
    monkeypatch.setattr(way_back, "_room", lambda _: 0)
    model = objects(5.0)["model"]
    fail_after(1, monkeypatch)
    with pytest.raises(CheckpointError, match=r"model.*some of its old values and some of its new ones"):
        load(tmp_path / "a", {"model": model})
    monkeypatch.undo()
    load(tmp_path / "a", {"model": model})
    assert same(model.state_dict(), objects(7.0)["model"].state_dict())


class Refusing(dict[str, Any]):
    """A user's container that takes no new values."""

    def __setitem__(self, key: str, value: Any) -> None:
        raise RuntimeError("read only")

    def update(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("read only")


def test_a_container_that_refuses_its_values_undoes_the_whole_load(tmp_path: Path) -> None:
    saved(tmp_path / "a", "full")
    current = state()
    before = values(current)
    with pytest.raises(CheckpointError, match="read only"):
        load(tmp_path / "a", {**current, "plain": Refusing(epoch=5)})
    assert same(before, values(current))


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved["param_groups"][0].update(params=[[1]]),
        lambda saved: saved["param_groups"][0].update(params=[None]),
        lambda saved: saved.update(state=[1]),
        lambda saved: saved.update(state={0: 1}),
        lambda saved: saved["param_groups"].append(3),
        lambda saved: saved["param_groups"][0].pop("params"),
    ],
)
def test_a_planted_optimizer_state_is_an_error_of_the_checkpoint(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    planted = optimizer.state_dict()
    change(planted)
    save(tmp_path / "a", {"optimizer": planted})
    before = values({"optimizer": optimizer})
    with pytest.raises(CheckpointError):
        load(tmp_path / "a", {"optimizer": optimizer})
    assert same(before, values({"optimizer": optimizer}))
    with pytest.raises(CheckpointError):
        load_raw(tmp_path / "a", optimizer)


def test_a_file_that_is_mapped_is_the_one_that_was_checked(tmp_path: Path) -> None:
    """Quantized tensors can't stay in the file; their file is opened once more, which must not be by its name."""
    from fabric_lite.checkpoint.archive_reading import ArchiveFile

    for name, number in (("a", 1), ("b", 2)):
        torch.save({"number": number, "set": {torch.full((3,), float(number))}}, tmp_path / name)
    archive = ArchiveFile(tmp_path / "a")
    (tmp_path / "b").rename(tmp_path / "a")
    content = archive.content()
    assert content["number"] == 1
    assert next(iter(content["set"])).eq(1).all()


def disk_is_full(patch: pytest.MonkeyPatch) -> None:
    """Let the disk of temporary files be full."""

    def made(*, buffering: int = -1, **_: Any) -> Any:
        return open("/dev/full", "r+b" if buffering == 0 else "wb", buffering)

    patch.setattr(tempfile, "TemporaryFile", made)


def loads_on_a_full_disk(path: Path, on_rank: int) -> bool:
    current = state()
    with pytest.MonkeyPatch.context() as patch:
        if rank() == on_rank:
            disk_is_full(patch)
        load(path, current)
    return same(values({**state(7.0), "plain": PLAIN}), values({**current, "plain": PLAIN}))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full disk")
def test_a_load_does_without_the_old_values_where_the_disk_for_them_is_full(tmp_path: Path, ranks: RankPool) -> None:
    saved(tmp_path / "a", "full")
    assert loads_on_a_full_disk(tmp_path / "a", on_rank=0)
    assert ranks.run(loads_on_a_full_disk, tmp_path / "a", 1, ranks=2) == [True, True]


class NoMemory:
    """What a rank that has no memory left for a copy meets."""

    def of(self, tensor: torch.Tensor) -> Any:
        raise MemoryError("no memory left")


def fails_to_keep(path: Path, on_rank: int) -> tuple[str, bool]:
    current = state()
    before = values(current)
    with pytest.MonkeyPatch.context() as patch:
        if rank() == on_rank:
            patch.setattr(way_back, "Blocks", NoMemory)
        with pytest.raises((CheckpointError, MemoryError)) as raised:
            load(path, current)
    return str(raised.value), same(before, values(current))


def test_a_rank_that_can_not_keep_the_old_values_fails_together_with_the_others(
    tmp_path: Path, ranks: RankPool
) -> None:
    saved(tmp_path / "a", "full")
    for message, untouched in ranks.run(fails_to_keep, tmp_path / "a", 1, ranks=2):
        assert "no memory left" in message
        assert untouched


def test_tied_weights_are_kept_once() -> None:
    model = nn.Sequential(nn.Linear(50, 50, bias=False), nn.Linear(50, 50, bias=False))
    model[1].weight = model[0].weight
    weights = [model[0].weight, model[1].weight]
    with WayBack(weights) as kept:
        pairs = kept.kept(weights)
        assert pairs is not None
        assert len(pairs) == 1
        assert kept.kept(weights) == []
        before = model[0].weight.detach().clone()
        nn.init.zeros_(model[0].weight)
        WayBack.put_back(pairs)
    assert torch.equal(before, model[1].weight)


def test_what_a_container_may_use_bounds_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.memory_bytes()
    own = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    (tmp_path / "memory").mkdir()
    for limit, expected in (("max\n", None), ("4096\n", 4096)):
        own.write_text(limit)
        (tmp_path / "memory" / "memory.limit_in_bytes").write_text(limit)
        found = memory.memory_bytes()
        assert found == expected if expected else found >= whole
    assert way_back._room(tmp_path) == 1024


def test_old_values_are_not_kept_in_a_file_system_that_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(way_back, "_file_system", lambda _: "tmpfs")
    tensors = [torch.ones(3)]
    with WayBack(tensors) as kept:
        assert kept.kept(tensors) is None
    monkeypatch.undo()
    if Path("/dev/shm").is_dir() and sys.platform.startswith("linux"):
        assert way_back._file_system(Path("/dev/shm")) == "tmpfs"
    with WayBack(tensors) as kept:
        assert kept.kept(tensors) is not None


def test_a_module_without_memory_is_said_to_have_none(tmp_path: Path) -> None:
    save(tmp_path / "a", {"model": nn.Linear(2, 2), "parameter": torch.ones(2)})
    with torch.device("meta"):
        model, parameter = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
    for current in ({"model": model}, {"parameter": parameter}):
        with pytest.raises(CheckpointError, match=r"meta device[\s\S]*Given: [\s\S]*to_empty"):
            load(tmp_path / "a", current)
