"""The file itself: refusals, the commit, damage, and what can't be trusted."""

from __future__ import annotations

import collections
import multiprocessing
import os
import pickle
import resource
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fabric_lite.checkpoint import CheckpointNotFoundError, load, save
from fabric_lite.checkpoint.archive import read_manifest
from fabric_lite.errors import CheckpointError, FabricTypeError, FabricValueError

Point = collections.namedtuple("Point", "x y")


class Custom:
    pass


class StateOfObjects:
    def state_dict(self) -> dict[str, Any]:
        return {"inner": {"path": Path("x")}}

    def load_state_dict(self, state: Any) -> None:
        raise NotImplementedError


REFUSED = {
    "a PosixPath": (Path("x"), r"str\(value\)"),
    "a Point": (Point(1, 2), r"_asdict\(\)"),
    "a Custom": (Custom(), "plain values"),
    "a function": (save, "a name"),
    "an ndarray": (np.zeros(2), "torch.from_numpy"),
    "a type": (Custom, "plain values"),
    "a frozenset": (frozenset({1}), r"set\(value\)"),
    "a slice": (slice(1), "plain values"),
    "a datetime64": (np.datetime64("2020-01-01"), "plain values"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_a_value_that_could_not_be_read_back_is_refused_with_its_place_and_a_way_out(tmp_path: Path, what: str) -> None:
    value, way_out = REFUSED[what]
    save(tmp_path / "a.ckpt", {"kept": 1})
    with pytest.raises(FabricTypeError, match=rf'(?s)state\["cfg"\]\["list"\]\[1\] is {what}.*{way_out}'):
        save(tmp_path / "a.ckpt", {"cfg": {"list": [0, value]}})
    assert load(tmp_path / "a.ckpt") == {"kept": 1}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no mkldnn")
def test_an_mkldnn_tensor_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(FabricTypeError, match=r'(?s)state\["list"\]\[0\] is an mkldnn tensor.*to_dense'):
        save(tmp_path / "a.ckpt", {"list": [torch.ones(3).to_mkldnn()]})
    assert not list(tmp_path.iterdir())


def test_a_value_in_an_objects_state_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(FabricTypeError, match=r'state\["thing"\]\["inner"\]\["path"\] is a PosixPath'):
        save(tmp_path / "a.ckpt", {"thing": StateOfObjects()})


@pytest.mark.parametrize("tensor", [torch.empty(2, device="meta"), nn.LazyLinear(2).weight], ids=["meta", "lazy"])
def test_a_tensor_without_data_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(FabricTypeError, match="no data to save"):
        save(tmp_path / "a.ckpt", {"tensor": tensor})


def test_a_container_that_holds_itself_and_a_key_that_is_an_object_are_refused(tmp_path: Path) -> None:
    circle: dict[str, Any] = {}
    circle["again"] = [circle]
    with pytest.raises(CheckpointError, match=r'state\["circle"\]\["again"\]\[0\] holds itself'):
        save(tmp_path / "a.ckpt", {"circle": circle})
    with pytest.raises(FabricTypeError, match=r"A key of state is a PosixPath"):
        save(tmp_path / "a.ckpt", {Path("x"): 1})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("path", "error"), [(3, FabricTypeError), (b"x", FabricTypeError), ("nowhere://bucket/a.ckpt", FabricValueError)]
)
def test_a_path_that_is_no_local_path_is_refused(path: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        save(path, {})
    with pytest.raises((error, CheckpointError)):
        load(path)


@pytest.mark.parametrize("name", ["uint4", "int3"])
def test_a_dtype_that_torch_can_not_write_is_refused_and_the_old_file_stays(tmp_path: Path, name: str) -> None:
    if not hasattr(torch, name):
        pytest.skip("this torch has no such dtype")
    save(tmp_path / "a", {"value": 1})
    with pytest.raises(FabricTypeError, match="A tensor has a dtype that torch"):
        save(tmp_path / "a", {"tensor": torch.zeros(3, dtype=torch.uint8).view(getattr(torch, name))})
    assert load(tmp_path / "a") == {"value": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_folders_are_created_and_nothing_else_is_left(tmp_path: Path) -> None:
    for value in (1, 2):
        save(str(tmp_path / "new" / "folder" / "é.ckpt"), {"value": value})
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["é.ckpt"]
    assert load(tmp_path / "new" / "folder" / "é.ckpt") == {"value": 2}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_umask_decides_who_may_read(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save(tmp_path / "a.ckpt", {"value": 1})
    finally:
        os.umask(before)
    assert (tmp_path / "a.ckpt").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_a_link_stays_and_the_file_that_it_points_to_is_written(tmp_path: Path, relative: bool, dangling: bool) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    if not dangling:
        save(folder / "first", {"value": 1})
    last = tmp_path / "last"
    last.symlink_to(Path("elsewhere", "first") if relative else folder / "first")
    (tmp_path / "chain").symlink_to(last)
    for name in ("last", "chain"):
        save(tmp_path / name, {"value": name})
        assert load(folder / "first") == {"value": name}
    assert last.is_symlink()
    assert (tmp_path / "chain").is_symlink()
    assert [path.name for path in folder.iterdir()] == ["first"]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").symlink_to("a.ckpt")
    with pytest.raises(CheckpointError, match="not a file"):
        save(tmp_path / "a.ckpt", {"value": 1})
    assert (tmp_path / "a.ckpt").is_symlink()


def test_a_folder_or_a_device_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for taken in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match="not a file"):
            save(taken, {"value": 1})


def unfinished(folder: Path, process: int) -> Path:
    path = folder / f".fabric-save-{process}-0123abcd.tmp"
    path.write_bytes(b"half")
    return path


def test_what_a_killed_process_left_is_swept_and_what_lives_is_not(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead, alive, foreign = unfinished(tmp_path, ended.pid), unfinished(tmp_path, os.getppid()), tmp_path / "other.tmp"
    foreign.touch()
    save(tmp_path / "a.ckpt", {"value": 1})
    assert not dead.exists()
    assert alive.exists()
    assert foreign.exists()


def test_a_save_that_runs_in_another_container_is_not_swept(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    ended = subprocess.Popen(["true"])
    ended.wait()
    path = unfinished(tmp_path, ended.pid)  # its process id means nothing here: the lock tells
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        save(tmp_path / "a.ckpt", {"value": 1})
        assert path.exists()
    save(tmp_path / "a.ckpt", {"value": 1})
    assert not path.exists()


def test_a_folder_that_can_not_be_written_to_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "file" / "a.ckpt", {"value": 1})
    assert (tmp_path / "file").read_text() == "kept"


def save_with_limit(path: Path, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save(path, {"weight": torch.ones(1_000_000), "small": torch.ones(1000)})
    except CheckpointError as error:
        pipe.send(str(error))
    pipe.close()


def test_a_file_that_grows_too_large_leaves_the_old_one_and_no_part(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", {"value": 1})
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=save_with_limit, args=(tmp_path / "a.ckpt", sender))
    process.start()
    sender.close()
    message = receiver.recv()
    assert "could not be written" in message
    assert "File too large" in message
    process.join()
    assert load(tmp_path / "a.ckpt") == {"value": 1}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk]).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("elements", [50_000, 1_000_000])
def test_a_full_disk_is_one_clear_error_and_the_old_file_is_intact(small_disk: Path, elements: int) -> None:
    save(small_disk / "a.ckpt", {"weight": torch.ones(30_000)})
    with pytest.raises(CheckpointError, match=r"(?s)No space left on device.*a second copy"):
        save(small_disk / "a.ckpt", {"weight": torch.ones(elements)})
    assert load(small_disk / "a.ckpt")["weight"].shape == (30_000,)
    assert len(list(small_disk.iterdir())) == 1


def test_any_zip_tool_finds_the_file_sound_and_the_manifest_lists_its_tensors(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    save(tmp_path / "a.ckpt", {"model": model})
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        assert archive.testzip() is None
    manifest = read_manifest(tmp_path / "a.ckpt")
    assert manifest is not None
    assert manifest["world_size"] == 1
    assert manifest["records"]["data/0"]["tensors"] == [
        {"key": 'state["model"]["weight"]', "dtype": "float32", "shape": [2, 3]}
    ]


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    save(tmp_path / "a.ckpt", {"model": model})
    save(tmp_path / "b.ckpt", {"model": model})
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.ckpt").read_bytes()


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_one_flipped_bit_names_the_tensor_and_changes_nothing(tmp_path: Path, name: str) -> None:
    model, other = nn.Linear(30, 20), nn.Linear(30, 20)
    before = other.weight.detach().clone()
    save(tmp_path / "a.ckpt", {"step": 1, "model": model})
    data = model.state_dict()[name].numpy().tobytes()
    flip(tmp_path / "a.ckpt", (tmp_path / "a.ckpt").read_bytes().index(data) + 33)
    with pytest.raises(CheckpointError, match=rf'(?s)damaged.*a\.ckpt: state\["model"\]\["{name}"\]'):
        load(tmp_path / "a.ckpt", {"model": other})
    assert torch.equal(other.weight, before)


def test_a_flipped_bit_anywhere_is_found_or_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    saved = {"step": 3, "weight": torch.arange(40.0), "name": "net"}
    save(path, saved)
    found = 0
    for position in range(path.stat().st_size):
        flip(path, position)
        try:
            back = load(path)
            assert back.keys() == saved.keys(), position
            assert torch.equal(back["weight"], saved["weight"]), position
            assert (back["step"], back["name"]) == (3, "net"), position
        except CheckpointError:
            found += 1
        flip(path, position)
    assert found > 100
    assert torch.equal(load(path)["weight"], saved["weight"])


@pytest.mark.parametrize("kept", [0, 1, 3, 100, 2000, -1])
def test_a_file_that_is_cut_short_is_a_clear_error(tmp_path: Path, kept: int) -> None:
    save(tmp_path / "a.ckpt", {"weight": torch.ones(1000)})
    content = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path / "a.ckpt")


@pytest.mark.parametrize("content", [b"hello, world", b"PK\x03\x04 hello", b"\x80\x04garbage", b"{}"])
def test_a_file_that_is_something_else_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path / "a.ckpt")


@pytest.mark.parametrize("content", ["# A title\n\nand text.\n", ""])
@pytest.mark.parametrize("weights_only", [None, True])
def test_what_begins_as_no_checkpoint_does_is_not_said_to_need_its_code_run(
    tmp_path: Path, content: str, weights_only: bool | None
) -> None:
    (tmp_path / "README.md").write_text(content)
    with pytest.raises(CheckpointError, match=r"(?s)^This file is no checkpoint.*README\.md: it.*Try: ") as caught:
        load(tmp_path / "README.md", weights_only=weights_only)
    assert "weights_only" not in str(caught.value)
    assert "Error" not in str(caught.value)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_old_files_of_torch_are_read_whatever_the_protocol_of_their_pickles(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "old.pt"
    torch.save({"a": 1}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    with pytest.warns(UserWarning, match="run any code"):
        assert load(path, weights_only=False) == {"a": 1}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")
@pytest.mark.parametrize("name", ["pipe", "pipe.safetensors"])
def test_a_pipe_and_a_device_are_refused_before_they_are_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / name)
    for path in (tmp_path / name, tmp_path / "link", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match=r"(?s)regular file or a folder.*Given: .*a pipe.*Try: "):
            load(path)


def test_a_missing_file_is_also_the_builtin_error(tmp_path: Path) -> None:
    for missing in (tmp_path / "none.ckpt", tmp_path / "none" / "a.ckpt"):
        with pytest.raises(CheckpointNotFoundError, match="none") as caught:
            load(missing)
        assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(CheckpointError, match="This folder is no checkpoint"):
        load(tmp_path)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
@pytest.mark.parametrize("weights_only", [None, True])
def test_a_file_with_code_is_refused_and_the_code_does_not_run(
    tmp_path: Path, form: str, weights_only: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, mark = tmp_path / "a.pt", tmp_path / "ran"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"x": Malicious(mark)}))
    else:
        torch.save({"x": Malicious(mark)}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"without running code|damaged"):
        load(path, weights_only=weights_only)
    assert not mark.exists()


def test_code_runs_only_when_asked_for_and_with_one_warning(tmp_path: Path) -> None:
    torch.save({"point": Point(1, 2)}, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="any code") as caught:
        assert load(tmp_path / "a.pt", weights_only=False) == {"point": (1, 2)}
    assert len(caught) == 1
