"""Checkpoints in a store: the same ones come back, and a store that fails leaves the old one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_lite.checkpoint import CheckpointNotFoundError, load, save
from fabric_lite.checkpoint.remote import RemotePath
from fabric_lite.checkpoint.saving import checked_path
from fabric_lite.errors import CheckpointError
from fabric_lite.testing import RankPool
from tests.faults.saves import state_of
from tests.faults.test_checkpoint_broken import objects, same, values

fsspec = pytest.importorskip("fsspec")
from fsspec.implementations.local import LocalFileSystem  # noqa: E402 (after the check that it is there)
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402

KINDS = ["full", "sharded"]


class Shared(LocalFileSystem):  # type: ignore[misc]
    """A store that several processes see, and that is no local path for fabric_lite."""

    protocol = "shared"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("shared://")))


class Failing(MemoryFileSystem):  # type: ignore[misc]
    """A store that goes away after so many changes, and comes back when it is told."""

    protocol = "failing"
    changes_left = 1 << 30

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("failing://")))

    def _change(self) -> None:
        type(self).changes_left -= 1
        if self.changes_left < 0:
            raise ConnectionError("the store is gone")

    def put_file(self, *args: Any, **kwargs: Any) -> Any:
        self._change()
        return super().put_file(*args, **kwargs)

    def cp_file(self, *args: Any, **kwargs: Any) -> Any:
        self._change()
        return super().cp_file(*args, **kwargs)

    def rm(self, *args: Any, **kwargs: Any) -> Any:
        self._change()
        return super().rm(*args, **kwargs)


@pytest.fixture(autouse=True)
def stores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Empty ones, and a folder for temporary files of which nothing is to be left."""
    register()
    MemoryFileSystem.store.clear()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    MemoryFileSystem.store.clear()
    Failing.changes_left = 1 << 30
    # What the ranks and torch keep there is theirs.
    assert [name for name in temporary.glob("fabric_lite_*") if "ranks" not in name.name] == []


def register() -> None:
    fsspec.register_implementation("shared", Shared, clobber=True)
    fsspec.register_implementation("failing", Failing, clobber=True)


def names() -> list[str]:
    """All objects, without what is after the names of folders."""
    return sorted(path.split(".fabric-")[0] for path in MemoryFileSystem.store)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_into_a_store_comes_back(kind: str) -> None:
    save("memory://runs/a/last", objects(7.0), state_dict_type=kind)
    current = objects(5.0)
    load("memory://runs/a/last", current)
    assert same(values(objects(7.0)), values(current))
    del current


@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", KINDS)
def test_a_checkpoint_replaces_another_of_any_kind_and_leaves_nothing_of_it(old: str, new: str) -> None:
    for number, kind in enumerate((old, new, old)):
        save("memory://runs/last", {"number": number, "weight": torch.ones(3)}, state_dict_type=kind)
        assert load("memory://runs/last")["number"] == number
    files = 1 if old == "full" else 3  # a pointer, a part, a manifest
    assert names() == ["/runs/last"] * files


def test_an_asynchronous_save_reaches_the_store() -> None:
    handle = save("memory://runs/last", {"number": 1}, state_dict_type="sharded", async_=True)
    assert handle is not None
    handle.result()
    assert load("memory://runs/last") == {"number": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_in_a_store_is_named_by_the_name_there(kind: str) -> None:
    save("memory://runs/last", {"weight": torch.arange(100.0)}, state_dict_type=kind)
    data = torch.arange(100.0).view(torch.uint8).numpy().tobytes()
    store = fsspec.filesystem("memory")
    (name,) = [name for name in MemoryFileSystem.store if data in store.cat_file(name)]
    store.pipe_file(name, store.cat_file(name).replace(data, data[:-1] + b"x"))
    with pytest.raises(CheckpointError, match=r"(?s)memory://runs/last.*weight"):
        load("memory://runs/last")


def test_what_is_not_in_a_store_is_not_found() -> None:
    with pytest.raises(CheckpointNotFoundError, match="memory://runs/none"):
        load("memory://runs/none")


def test_a_pointer_leads_nowhere_else() -> None:
    save("memory://secret/a", {"number": 1}, state_dict_type="sharded")
    fsspec.filesystem("memory").pipe_file("/runs/last", b'{"fabric_lite pointer to": "../secret/a"}')
    with pytest.raises(CheckpointError, match="pointer to nothing"):
        load("memory://runs/last")


def test_a_folder_of_the_store_is_not_replaced() -> None:
    fsspec.filesystem("memory").pipe_file("/runs/data/precious", b"1")
    for kind in KINDS:
        with pytest.raises(CheckpointError, match="taken by a folder"):
            save("memory://runs/data", {"number": 1}, state_dict_type=kind)
    assert names() == ["/runs/data/precious"]


@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", KINDS)
def test_a_store_that_goes_away_at_any_change_leaves_the_old_or_the_new_checkpoint(old: str, new: str) -> None:
    """It takes no more changes, also none that would clean up: as if the process had been killed."""
    url, found = "failing://runs/last", []
    for changes in range(20):
        MemoryFileSystem.store.clear()
        save(url, {"number": 1, "weight": torch.ones(3)}, state_dict_type=old)
        Failing.changes_left = changes
        raised = False
        try:
            save(url, {"number": 2, "weight": torch.ones(3)}, state_dict_type=new)
        except CheckpointError as error:
            raised = "the store is gone" in str(error)
        is_over, Failing.changes_left = Failing.changes_left >= 0, 1 << 30
        found.append(load(url)["number"])
        assert (found[-1] == 1) == raised
        save(url, {"number": 3}, state_dict_type="full")
        assert names() == ["/runs/last"]
        if is_over:
            break
    assert is_over
    assert found == sorted(found)
    assert set(found) == {1, 2}


def saved(url: str, kind: str, number: int) -> None:
    register()
    save(url, state_of(number, ranks=2), state_dict_type=kind)


def loaded(url: str, ranks: int) -> list[float]:
    register()
    state = state_of(0, ranks)
    rest = load(url, state)
    assert rest == {}
    return [state["number"], *(getattr(one, "full_tensor", lambda one=one: one)().mean() for one in state["weights"])]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_save_into_a_store_and_one_or_two_load(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    url = f"shared://{tmp_path}/runs/last"
    for number in (1, 2):
        ranks.run(saved, url, kind, number)
        assert ranks.run(loaded, url, 2) == [[number] * 3] * 2
    assert load(url)["number"] == 2
    assert len([path for path in (tmp_path / "runs").rglob("*") if path.is_file()]) == (1 if kind == "full" else 4)


def failed(url: str) -> str:
    """Save where rank 1 can't upload."""
    register()
    if torch.distributed.get_rank() == 1:
        Shared.put_file = lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no way"))
    try:
        save(url, state_of(2, ranks=2), state_dict_type="sharded")
    except CheckpointError as error:
        return str(error)
    finally:
        Shared.put_file = LocalFileSystem.put_file
    return "no error"


def test_a_rank_that_can_not_upload_fails_the_save_on_all_and_the_old_one_stays(
    ranks: RankPool, tmp_path: Path
) -> None:
    url = f"shared://{tmp_path}/runs/last"
    ranks.run(saved, url, "sharded", 1)
    messages = ranks.run(failed, url)
    assert all("no way" in message for message in messages)
    assert ranks.run(loaded, url, 2) == [[1] * 3] * 2
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_local_path_with_a_scheme_is_a_local_path() -> None:
    assert checked_path("file:///tmp/a") == Path("/tmp/a")
    assert checked_path("local:///tmp/a") == Path("/tmp/a")
    assert checked_path("s3://bucket/a") == RemotePath("s3://bucket/a")
