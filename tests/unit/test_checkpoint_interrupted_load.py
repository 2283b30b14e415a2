"""A disk that fails in the middle of a load, after everything was checked, leaves all objects as they were."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_lite.checkpoint import load, load_raw, save, way_back
from fabric_lite.checkpoint.stored import StoredTensor
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
    monkeypatch.setattr(way_back, "_room", lambda: 0)
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
