"""Nothing in a checkpoint runs code: a pickle that would make a folder is planted in every place, and none is made."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from fabric_lite.checkpoint import load, load_raw, save
from fabric_lite.checkpoint.archive import read_manifest
from fabric_lite.checkpoint.dcp_reading import _Unpickler
from fabric_lite.checkpoint.manifest import MANIFEST, Manifest
from fabric_lite.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed", "ignore::FutureWarning")


class Malicious:
    """Its pickle makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # The variable turns torch's own default off; ours must not depend on it.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    pickle.loads(pickle.dumps(Malicious(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()
    return tmp_path / "ran"


def state() -> dict[str, Any]:
    return {"model": nn.Linear(3, 2), "step": 3}


def refused(path: Path, mark: Path, message: str) -> None:
    """All ways of loading raise a CheckpointError in three parts; no code has run and nothing has changed."""
    current = state()
    weight = current["model"].weight.detach().clone()
    ways: list[Callable[[], Any]] = [
        lambda: load(path), lambda: load(path, current), lambda: load(path, weights_only=True),
        lambda: load_raw(path, current["model"]),
    ]  # fmt: skip
    for way in ways:
        with pytest.raises(CheckpointError, match=message) as caught:
            way()
        assert "Given: " in str(caught.value)
        assert "Try: " in str(caught.value)
    assert not mark.exists()
    assert torch.equal(current["model"].weight, weight)


def as_saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# --- one file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", ["data.pkl", "fabric_lite.json", "data/0", "more.pkl"])
def test_a_pickle_in_any_record_of_a_file_does_not_run(tmp_path: Path, mark: Path, record: str) -> None:
    save(tmp_path / "good", state())
    with zipfile.ZipFile(tmp_path / "good") as good, zipfile.ZipFile(tmp_path / "bad", "w") as bad:
        for info in good.infolist():
            name = info.filename.split("/", 1)[1]
            data = pickle.dumps(Malicious(mark), 2) if name == record else good.read(info)
            bad.writestr(info.filename, data)
        if record == "more.pkl":
            bad.writestr(f"{info.filename.split('/')[0]}/{record}", pickle.dumps(Malicious(mark)))
    refused(tmp_path / "bad", mark, "damaged|without running code")


@pytest.mark.parametrize("name", ["data/0", "fabric_lite.json", "byteorder", "data.pkl"])
def test_a_file_with_two_records_of_one_name_is_refused(tmp_path: Path, mark: Path, name: str) -> None:
    save(tmp_path / "good", state())
    with zipfile.ZipFile(tmp_path / "good") as good, zipfile.ZipFile(tmp_path / "bad", "w") as bad:
        for info in good.infolist():
            if info.filename.endswith(f"/{name}"):  # torch reads the first one, zipfile the last
                bad.writestr(zipfile.ZipInfo(f"other/{name}"), bytes(info.file_size))
            bad.writestr(zipfile.ZipInfo(info.filename), good.read(info))
    refused(tmp_path / "bad", mark, f"two records of the name {name}")


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (b"[]", "has no format"),
        (b"{}", "has no format"),
        (b'{"format": "1"}', "has no format"),
        (b"{", "JSONDecodeError"),
        (b"[" * 100_000, "RecursionError"),
        (b'{"format": 1}', "records"),
        (b'{"format": 1, "records": [1]}', "not in the manifest"),
    ],
)
def test_a_file_whose_manifest_is_something_else_is_refused(
    tmp_path: Path, mark: Path, planted: bytes, message: str
) -> None:
    save(tmp_path / "good", state())
    with zipfile.ZipFile(tmp_path / "good") as good, zipfile.ZipFile(tmp_path / "bad", "w") as bad:
        for info in good.infolist():
            bad.writestr(info.filename, planted if info.filename.endswith(".json") else good.read(info))
    refused(tmp_path / "bad", mark, message)
    if "records" not in message and "manifest" not in message:
        with pytest.raises(CheckpointError, match=message):
            read_manifest(tmp_path / "bad")


def test_a_manifest_that_would_unpack_to_any_size_is_not_unpacked(tmp_path: Path, mark: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad", "w", zipfile.ZIP_DEFLATED) as bad:
        bad.writestr("a/fabric_lite.json", b" " * (1 << 20))
    assert (tmp_path / "bad").stat().st_size < 2000
    refused(tmp_path / "bad", mark, "fabric_lite.json is compressed")


def test_a_pickle_without_a_manifest_around_it_does_not_run(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "a.pt").write_bytes(as_saved({"model": Malicious(mark), "step": 1}))
    refused(tmp_path / "a.pt", mark, "without running code")


# --- our folder ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "folder", state(), state_dict_type="sharded")
    return tmp_path / "folder"


def rewritten(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and make its checksum right again, as one who plants something would."""
    value = json.loads((folder / MANIFEST).read_text())
    change(value)
    body = {key: item for key, item in value.items() if key != "checksum"}
    value["checksum"] = zlib.crc32(json.dumps(body, separators=(",", ":")).encode())
    (folder / MANIFEST).write_text(json.dumps(value, separators=(",", ":")))


def set_part(value: dict[str, Any], name: str) -> None:
    value["parts"][name] = value["parts"].pop("part-00000.safetensors")
    for entry in value["tensors"]:
        for chunk in entry["chunks"]:
            chunk["part"] = name


def test_a_manifest_that_was_rewritten_is_read(folder: Path) -> None:
    """So that the tests below fail for what they plant, and not for the checksum."""
    rewritten(folder, lambda value: value["content"].update(step=4))
    assert load(folder)["step"] == 4


@pytest.mark.parametrize("name", ["part-00000.safetensors", MANIFEST, "part-00001.safetensors"])
def test_a_pickle_in_the_place_of_a_file_of_a_folder_does_not_run(folder: Path, mark: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps({"model": Malicious(mark)}))
    refused(folder, mark, "damaged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value["content"].update(step={"tag": "object", "value": "os.mkdir"}), "does not know"),
        (lambda value: value["content"].update(step={"tag": "pickle", "value": "gASV"}), "does not know"),
        (lambda value: value["content"].update(step={"tag": ["x"], "value": 1}), "does not know"),
        (lambda value: value["content"].update(step={"tensor": 99}), "damaged"),
        (lambda value: value["content"].update(step={"tensor": -1}), "damaged"),
        (lambda value: value.update(format=99), "newer fabric_lite"),
        (lambda value: value.update(more=1), "damaged"),
        (lambda value: set_part(value, "../part-00000.safetensors"), "damaged"),
        (lambda value: set_part(value, "/etc/passwd"), "damaged"),
        (lambda value: set_part(value, "sub/part-00000.safetensors"), "damaged"),
        (lambda value: set_part(value, "part-00000.pkl"), "damaged"),
        (lambda value: value["tensors"][0]["chunks"][0].update(begin=0), "damaged"),
        (lambda value: value["tensors"][0]["chunks"][0].update(end=1 << 60), "damaged"),
        (lambda value: value["tensors"][0].update(shape=[1 << 40, 1 << 40]), "damaged"),
        (lambda value: value["tensors"][0].update(dtype="object"), "damaged"),
    ],
)
def test_a_manifest_with_something_planted_in_it_is_refused(
    folder: Path, mark: Path, change: Any, message: str
) -> None:
    rewritten(folder, change)
    refused(folder, mark, message)


@pytest.mark.parametrize("name", ["part-00000.safetensors", MANIFEST])
@pytest.mark.parametrize("instead", ["link", "folder", "pipe"])
def test_what_is_no_regular_file_is_refused(folder: Path, mark: Path, name: str, instead: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    if instead == "link":
        (folder / name).symlink_to(folder.parent / "elsewhere")
    elif instead == "folder":
        (folder / name).mkdir()
    else:
        os.mkfifo(folder / name)  # one that reads it would wait forever
    with pytest.raises(CheckpointError, match="regular files only"):
        load(folder)
    assert not mark.exists()


def test_a_header_length_beyond_the_file_takes_no_memory(folder: Path, mark: Path) -> None:
    part = folder / "part-00000.safetensors"
    part.write_bytes((1 << 62).to_bytes(8, "little") + part.read_bytes()[8:])
    refused(folder, mark, "damaged")


@pytest.mark.parametrize("shape", [[0, 1 << 70], [0, 1 << 62, 1 << 62]])
def test_an_empty_tensor_of_a_shape_that_torch_can_not_count_is_refused(
    tmp_path: Path, mark: Path, shape: list[int]
) -> None:
    path = flat(tmp_path / "a.safetensors", {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
    refused(path, mark, "damaged")


# --- safetensors --------------------------------------------------------------------------------------------------


def flat(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def described(begin: int, end: int, **other: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [begin, end], **other}


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ({"a": described(0, 8)}, 1 << 62),
        ({"a": described(0, 8)}, 99_999),
        (b"not json", None),
        (b"[" * 100_000, None),
        ([1], None),
        ({"a": 1}, None),
        ({"a": described(0, 16)}, None),
        ({"a": described(8, 16)}, None),
        ({"a": described(-8, 0)}, None),
        ({"a": described(0, 8), "b": described(0, 8)}, None),
        ({"a": described(0, 8), "b": described(4, 12)}, None),
        ({"a": described(0, 4, shape=[1])}, None),
        ({"a": described(0, 8, dtype="O")}, None),
        ({"a": described(0, 8, dtype=["F32"])}, None),
        ({"a": described(0, 8, shape=[2.0])}, None),
        ({"a": described(0, 8, shape=[-1, -2])}, None),
        ({"a": described(0, 8), "__metadata__": {"x": 1}}, None),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, None),
    ],
)
def test_a_safetensors_file_that_lies_about_itself_is_refused(
    tmp_path: Path, mark: Path, header: Any, length: int | None
) -> None:
    assert load(flat(tmp_path / "a.safetensors", {"a": described(0, 8)}, b"\0" * 8))["a"].tolist() == [0.0, 0.0]
    refused(flat(tmp_path / "a.safetensors", header, b"\0" * 8, length), mark, "no safetensors file")


def of_ckpt_command(tmp_path: Path, **changes: Any) -> Path:
    """A safetensors file that has a whole checkpoint in it, as ``fabric-ckpt convert`` writes it."""
    description = {"format": 1, "content": {"model": {"tensor": 0}}, "tensors": [["model", "float32", [2]]], **changes}
    header = {"__metadata__": {"fabric_lite": json.dumps(description)}, "model": described(0, 8)}
    return flat(tmp_path / "a.safetensors", header, b"\0" * 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 99},
        {"format": "x"},
        {"content": {"model": {"tag": "object", "value": "os.mkdir"}}},
        {"content": {"model": {"tensor": 1}}},
        {"content": {"model": {"tensor": -1}}},
        {"tensors": [["other", "float32", [2]]]},
        {"tensors": [["model", "float32", [3]]]},
        {"tensors": [["model", "float32", [-1, -2]]]},
        {"tensors": [["model", "object", [2]]]},
        {"tensors": [["model", ["float32"], [2]]]},
        {"tensors": 1},
    ],
)
def test_a_whole_checkpoint_in_a_safetensors_file_that_lies_is_refused(
    tmp_path: Path, mark: Path, changes: dict[str, Any]
) -> None:
    assert load(of_ckpt_command(tmp_path))["model"].tolist() == [0.0, 0.0]
    refused(of_ckpt_command(tmp_path, **changes), mark, "damaged|newer|does not know|not in the file")


def test_a_pickle_that_is_called_safetensors_does_not_run(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Malicious(mark)))
    refused(tmp_path / "a.safetensors", mark, "no safetensors file")
    (tmp_path / "a.safetensors").write_bytes(as_saved(Malicious(mark)))
    refused(tmp_path / "a.safetensors", mark, "no safetensors file")


# --- torch.distributed.checkpoint ---------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    content = {"model": state()["model"].state_dict(), "step": 3, "log": ["a", 1]}
    dcp.save(content, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert load(tmp_path / "dcp", state()) == {"log": ["a", 1]}
    return tmp_path / "dcp"


def metadata_of(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def with_planner_data(folder: Path, planted: Any) -> bytes:
    metadata = metadata_of(folder)
    metadata.planner_data = planted
    return pickle.dumps(metadata)


def test_a_pickle_in_the_metadata_of_a_foreign_folder_does_not_run(foreign: Path, mark: Path) -> None:
    for planted in (
        pickle.dumps(Malicious(mark)),
        pickle.dumps(Malicious(mark), 0),
        with_planner_data(foreign, Malicious(mark)),
        with_planner_data(foreign, {"step": ("step", Malicious(mark))}),
    ):
        (foreign / ".metadata").write_bytes(planted)
        refused(foreign, mark, "without running code(?s:.)*posix.mkdir|damaged")


@pytest.mark.parametrize(
    "planted",
    [
        b"ctorch.serialization\nload\n(V/tmp/x\ntR.",
        b"cbuiltins\neval\n(V1\ntR.",
        b"ctorch\nload\n(V/tmp/x\ntR.",
        b"ctorch\nhub.load\n.",
        b"ctorch.distributed.checkpoint.metadata\nos.system\n.",
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n}Vargs\nI1\nsb.",
        b"ccollections\nOrderedDict\n}V__init__\nI1\nsb.",
        b"ctorch\nfloat32\n}Vx\nI1\nsb.",
        b"(I1\nI2\nt.",
        b"P1\n.",
        b"",
        b"\x80\x05garbage",
    ],
)
def test_metadata_that_names_anything_else_is_refused(foreign: Path, mark: Path, planted: bytes) -> None:
    (foreign / ".metadata").write_bytes(planted)
    refused(foreign, mark, "without running code|damaged")


@pytest.mark.parametrize("name", ["step", "model.weight"])
def test_a_pickle_in_an_item_of_a_foreign_folder_does_not_run(foreign: Path, mark: Path, name: str) -> None:
    metadata = metadata_of(foreign)
    place = next(info for index, info in metadata.storage_data.items() if index.fqn == name)
    planted = as_saved(Malicious(mark))
    path = foreign / place.relative_path
    place.offset, place.length = path.stat().st_size, len(planted)
    path.write_bytes(path.read_bytes() + planted)
    (foreign / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="without running code"):
        load(foreign, state())
    with pytest.raises(CheckpointError, match="without running code"):
        load(foreign)
    assert not mark.exists()


def changed(folder: Path, change: Callable[[Any], Any]) -> None:
    metadata = metadata_of(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def every_item(name: str, value: Any) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            setattr(info, name, value)

    return change


def cut_a_chunk(metadata: Any) -> None:
    chunk = metadata.state_dict_metadata["model.weight"].chunks[0]
    chunk.sizes = torch.Size([1, 3])


def overlap(metadata: Any) -> None:
    """Two pieces that have as many elements as the tensor, but one of them twice and one not at all."""
    described = metadata.state_dict_metadata["model.bias"]
    (chunk,) = described.chunks
    described.size = torch.Size([4])
    described.chunks = [copy.deepcopy(chunk), copy.deepcopy(chunk)]
    described.chunks[1].offsets = torch.Size([1])
    (index,) = (index for index in metadata.storage_data if index.fqn == "model.bias")
    for offset in (0, 1):
        moved = dataclasses.replace(index, offset=torch.Size([offset]))
        metadata.storage_data[moved] = metadata.storage_data[index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (every_item("relative_path", "../elsewhere"), "outside of its folder"),
        (every_item("relative_path", "/etc/passwd"), "outside of its folder"),
        (every_item("relative_path", ".."), "outside of its folder"),
        (every_item("offset", -1), "damaged"),
        (every_item("offset", 1 << 60), "cut short"),
        (every_item("length", 1 << 60), "cut short"),
        (every_item("transform_descriptors", ["zstd"]), "extension"),
        (cut_a_chunk, "not the whole tensor"),
        (overlap, "overlap"),
        (lambda metadata: setattr(metadata, "storage_data", {}), "damaged"),
        (lambda metadata: setattr(metadata, "storage_data", None), "damaged"),
        (lambda metadata: setattr(metadata, "state_dict_metadata", [1]), "damaged"),
    ],
)
def test_metadata_that_lies_about_its_folder_is_refused(foreign: Path, mark: Path, change: Any, message: str) -> None:
    shutil.copy(next(foreign.glob("*.distcp")), foreign.parent / "elsewhere")
    changed(foreign, change)
    with pytest.raises(CheckpointError, match=message):
        load(foreign)
    with pytest.raises(CheckpointError, match=message):
        load(foreign, state())
    assert not mark.exists()


def test_a_link_in_a_foreign_folder_is_refused(foreign: Path) -> None:
    part = next(foreign.glob("*.distcp"))
    part.rename(foreign.parent / "elsewhere")
    part.symlink_to(foreign.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="regular files only"):
        load(foreign)


def test_a_pickle_in_lightnings_file_beside_it_does_not_run(foreign: Path, mark: Path) -> None:
    (foreign / "meta.pt").write_bytes(as_saved({"epoch": 4}))
    assert load(foreign, state()) == {"log": ["a", 1], "epoch": 4}
    (foreign / "meta.pt").write_bytes(as_saved({"epoch": Malicious(mark)}))
    refused(foreign, mark, "without running code")


def test_the_manifest_of_a_folder_is_all_that_is_decoded(folder: Path) -> None:
    """What else lies in the folder is not looked at."""
    assert set(Manifest.read(folder).parts) == {"part-00000.safetensors"}
    (folder / "notes.pkl").write_bytes(b"\x80\x05garbage")
    assert load(folder)["step"] == 3


def test_getattr_in_foreign_metadata_gets_nothing() -> None:
    """Some Pythons pickle members of enumerations by it; here the call is a record of its arguments."""
    named = b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\nMetadataIndex\nV__init__\ntR."
    found = _Unpickler(io.BytesIO(named)).load()
    assert type(found).__name__ == "getattr"
    assert found.args[1] == "__init__"
    assert not callable(found)
