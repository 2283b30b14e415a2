"""A disk that fails when a checkpoint is put in place: nothing that was whole is lost, and the error says so."""

from __future__ import annotations

import errno
import functools
from pathlib import Path

import pytest

from fabric_lite.checkpoint import commit, load, save
from fabric_lite.errors import CheckpointError

OLD, NEW = {"value": "old"}, {"value": "new"}


def failing_fsync(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the names in ``folder`` not get onto the disk."""
    fsync = commit.fsync_folder

    def failing(path: Path) -> None:
        if path == folder:
            raise OSError(errno.EIO, "Input/output error")
        fsync(path)

    monkeypatch.setattr(commit, "fsync_folder", failing)


@pytest.mark.parametrize("in_one_step", [True, False])
@pytest.mark.parametrize(("old", "new"), [("sharded", "sharded"), ("sharded", "full"), ("full", "sharded")])
def test_names_that_do_not_get_onto_the_disk_leave_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, in_one_step: bool
) -> None:
    path = tmp_path / "a"
    save(path, OLD, state_dict_type=old)
    with monkeypatch.context() as patch:
        failing_fsync(patch, tmp_path)
        if not in_one_step:
            put = commit._put_in_place
            patch.setattr(commit, "_put_in_place", functools.partial(put, in_one_step=lambda *_: False))
        with pytest.raises(CheckpointError, match=r"what was there before is as it was[\s\S]*Input/output error"):
            save(path, NEW, state_dict_type=new)
        assert load(path) == OLD
        # Which names the disk has is not known: the new content stays too, until the next save.
        assert [load(left) for left in tmp_path.glob(".fabric-save-*")] == [NEW]
    save(path, NEW, state_dict_type=new)
    assert load(path) == NEW
    assert [left.name for left in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_new_name_that_does_not_get_onto_the_disk_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with monkeypatch.context() as patch:
        failing_fsync(patch, tmp_path)
        with pytest.raises(CheckpointError, match="what was there before is as it was"):
            save(tmp_path / "a", NEW, state_dict_type=kind)
    assert not (tmp_path / "a").exists()


def test_a_file_that_a_rename_has_replaced_is_said_to_be_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a", OLD)
    failing_fsync(monkeypatch, tmp_path)
    with pytest.raises(CheckpointError, match=r"the new one is in place[\s\S]*Input/output error"):
        save(tmp_path / "a", NEW)
    assert load(tmp_path / "a") == NEW
