"""Saving and loading large files, also while the system does not return, is movement for the hang watch."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_lite.checkpoint import load, save, stored_files
from fabric_lite.checkpoint.part_writing import bytes_of
from fabric_lite.movement import MovingFile, busy, movement_count


def moves() -> bool:
    """Whether the hang watch, which looks now and once more, sees movement."""
    return movement_count() != movement_count()


def test_what_is_busy_moves_until_it_has_ended() -> None:
    assert not moves()
    with busy():
        assert moves()
        with busy():
            pass
        assert moves()
    assert not moves()


def seen_inside(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[bool]:
    """What the hang watch sees in each call of a function from now on."""
    function: Callable[..., Any] = getattr(owner, name)
    seen: list[bool] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(moves())
        return function(*args, **kwargs)

    patch.setattr(owner, name, watched)
    return seen


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_disk_that_takes_long_to_sync_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    seen = seen_inside(monkeypatch, os, "fsync")
    save(tmp_path / "new" / "a", {"weights": torch.ones(3)}, state_dict_type=kind)
    assert len(seen) >= 3
    assert all(seen)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_uploads_and_downloads_are_no_hang(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = type(fsspec.filesystem("memory"))
    up, down = seen_inside(monkeypatch, store, "put_file"), seen_inside(monkeypatch, store, "get_file")
    copied = seen_inside(monkeypatch, store, "cp_file")
    path = f"memory://movement/{kind}"
    save(path, {"weights": torch.ones(3)}, state_dict_type=kind)
    load(path)
    for seen in (up, down, copied):
        assert seen
        assert all(seen)


def movements_in(function: Callable[..., Any], *args: Any) -> int:
    before = movement_count()
    function(*args)
    return movement_count() - before


def test_each_block_of_a_large_file_is_movement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fabric_lite.movement._BLOCK_BYTES", 1000)
    monkeypatch.setattr(stored_files, "_LONGEST_READ", 1000)
    monkeypatch.setattr(stored_files, "_STEP", 1000)
    state = {"weights": torch.ones(100_000, dtype=torch.uint8)}
    assert movements_in(save, tmp_path / "a", state) > 100
    # Once for the checksums, and once for the values.
    assert movements_in(load, tmp_path / "a") > 200


def test_a_moving_file_has_what_was_written() -> None:
    file, data = io.BytesIO(), torch.arange(5000)
    assert MovingFile(file).write(bytes_of(data[:0])) == 0
    assert MovingFile(file).write(bytes_of(data)) == data.nbytes
    moving = MovingFile(file)
    assert moving.seek(8, io.SEEK_CUR) == data.nbytes + 8
    moving.write(b"more")
    moving.flush()
    assert file.getvalue() == data.numpy().tobytes() + bytes(8) + b"more"
