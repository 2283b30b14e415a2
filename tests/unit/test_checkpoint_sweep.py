"""What killed saves leave, and what else may stand in the way of the next one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fabric_lite.checkpoint import commit, load, save
from fabric_lite.checkpoint.commit import (
    _put_in_place,
    _temporary_beside,
    committed_file,
    committed_folder,
    is_temporary,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and process ids as POSIX has them")


def ended() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def left_by(folder: Path, process: int, place: str | None = None) -> Path:
    """The name of an unfinished save of a process, here or on another machine."""
    marks = _temporary_beside(folder / "a").name.split("-")
    return folder / "-".join([*marks[:2], place or marks[2], str(process), marks[4]])


def test_what_a_process_of_this_machine_left_is_swept_when_it_has_ended(tmp_path: Path) -> None:
    dead, alive = left_by(tmp_path, ended()), left_by(tmp_path, os.getppid())
    dead.touch()
    alive.touch()
    assert is_temporary(dead.name)
    save(tmp_path / "a", {"value": 1})
    assert (dead.exists(), alive.exists()) == (False, True)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_another_machine_is_writing_is_swept_only_when_it_is_old(tmp_path: Path, kind: str) -> None:
    """The process id means nothing here, and not every shared file system passes on the locks."""
    path = left_by(tmp_path, ended(), place="0123abcd")
    if kind == "folder":
        path.mkdir()
        (path / "part-00000.safetensors").touch()
        os.utime(path, (0, 0))  # making it was long ago, writing into it was not
    else:
        path.touch()
    save(tmp_path / "a", {"value": 1})
    assert path.exists()
    long_ago = time.time() - 7200
    for each in [*path.iterdir(), path] if kind == "folder" else [path]:
        os.utime(each, (long_ago, long_ago))
    save(tmp_path / "a", {"value": 2})
    assert not path.exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_this_process_is_writing_is_not_swept_though_it_is_not_locked_yet(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first asynchronous save and ``run.json``, which one rank writes beside each other into one folder."""
    monkeypatch.setattr(commit, "fcntl", None)  # as if the thread never came to lock it
    if kind == "file":
        with committed_file(tmp_path / "a") as file:
            file.write(b"whole")
            save(tmp_path / "b", {"value": 1})
        assert (tmp_path / "a").read_bytes() == b"whole"
    else:
        with committed_folder(tmp_path / "a"):
            save(tmp_path / "b", {"value": 1})
        assert (tmp_path / "a").is_dir()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_pipe_with_the_name_of_an_unfinished_save_does_not_block_the_next_one(tmp_path: Path) -> None:
    os.mkfifo(left_by(tmp_path, ended()))
    save(tmp_path / "a", {"value": 1})
    assert load(tmp_path / "a") == {"value": 1}


def test_a_foreign_file_among_what_is_left_of_an_old_checkpoint_does_not_block_the_next_save(tmp_path: Path) -> None:
    """NFS keeps a removed file that somebody has open as .nfs and digits."""
    for name, value in (("a", "old"), ("new", "new")):
        save(tmp_path / name, {"value": value}, state_dict_type="sharded")
    kept = tmp_path / ".fabric-old-a"
    kept.mkdir()
    (kept / ".nfs0001").write_text("kept")
    _put_in_place(tmp_path / "new", tmp_path / "a", in_one_step=lambda *_: False)
    assert load(tmp_path / "a") == {"value": "new"}
    assert not kept.exists()
    (moved,) = tmp_path.glob(".fabric-save-*")
    assert (moved / ".nfs0001").read_text() == "kept"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="umask and modes as Linux has them")
def test_folders_above_a_checkpoint_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(tmp_path / "runs" / "today" / "a", {"value": 1})
    finally:
        os.umask(before)
    assert (tmp_path / "runs").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "runs" / "today").stat().st_mode & 0o777 == 0o750
