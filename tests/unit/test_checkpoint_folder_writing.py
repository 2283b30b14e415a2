"""The folder of a sharded checkpoint: what is in it, exactly, and how it comes into its place."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import struct
import subprocess
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_lite import Fabric
from fabric_lite.checkpoint import load, save
from fabric_lite.checkpoint.archive import read_manifest
from fabric_lite.checkpoint.commit import _put_in_place, recovered
from fabric_lite.checkpoint.folder_writing import _write_own_part
from fabric_lite.checkpoint.manifest import DTYPES, MANIFEST, Chunk, Manifest, TensorEntry, decode, encode
from fabric_lite.errors import CheckpointError, FabricTypeError, FabricValueError


def save_folder(path: Path, state: dict[str, Any]) -> None:
    save(path, state, state_dict_type="sharded")


def ordered_with_metadata() -> Any:
    value = collections.OrderedDict(b=1, a=2)
    value._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    return value


VALUES = {
    "none": None,
    "bools": [True, False],
    "integers": [0, -1, (1 << 63) - 1, -(1 << 63), 1 << 63, -(1 << 20_000)],
    "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf],
    "complex": complex(1.5, -0.0),
    "strings": ["", "é", "\x00", "\ud800", "\ud83d\ude00", "😀", '"\\'],
    "bytes": [b"", b"\x00\xff", bytearray(b"ab")],
    "torch": [torch.Size([2, 3]), torch.bfloat16, torch.device("cuda:1"), torch.sparse_coo, torch.per_tensor_affine],
    "tuple": (1, (2, [3])),
    "set": {1, "a", None, 2.5},
    "dict in order": {"b": 1, "a": {"c": []}},
    "keys": {1: "a", None: "b", (1, "x"): "c", 2.5: "d", b"k": "e", True + 1: "f", "\ud800": "g"},
    "ordered": ordered_with_metadata(),
    "counter": collections.Counter("abca"),
    "like a tensor": {"tensor": 0},
    "like a tag": {"tag": "set", "value": [1]},
    "like a longer tag": {"tag": "set", "value": [1], "more": 2},
}


def exactly(value: Any) -> Any:
    """A value that is equal only for the same types, orders, signs and nested content."""
    if isinstance(value, dict):
        items = [(exactly(key), exactly(item)) for key, item in value.items()]
        return type(value), items, vars(value) if type(value) is collections.OrderedDict else None
    if isinstance(value, (list, tuple)):
        return type(value), [exactly(item) for item in value]
    return type(value), value if isinstance(value, (set, int)) else repr(value)


@pytest.mark.parametrize("name", VALUES)
def test_a_plain_value_comes_back_exactly(tmp_path: Path, name: str) -> None:
    save_folder(tmp_path / "a", {"value": VALUES[name]})
    assert exactly(load(tmp_path / "a")["value"]) == exactly(VALUES[name])


def test_the_bits_of_a_nan_come_back() -> None:
    bits = struct.pack(">Q", 0xFFF8_0000_0000_0123)
    encoded = json.loads(json.dumps(encode(struct.unpack(">d", bits)[0], id)))
    assert struct.pack(">d", decode(encoded, id)) == bits


def test_a_plain_dict_is_readable_in_the_manifest(tmp_path: Path) -> None:
    save_folder(tmp_path / "a", {"step": 3, "config": {"rate": 0.1, "names": ["a"]}, "weight": torch.ones(2)})
    content = json.loads((tmp_path / "a" / MANIFEST).read_text())["content"]
    assert content == {"step": 3, "config": {"rate": 0.1, "names": ["a"]}, "weight": {"tensor": 0}}


@pytest.mark.parametrize(
    "damage",
    [
        {"tag": "os.system", "value": "x"},
        {"tag": [], "value": 1},
        {"tensor": -1},
        {"tag": "float", "value": "00"},
        {"tag": "sparse", "value": {"layout": "sparse_coo", "shape": [2], "coalesced": None, "parts": [1, 2]}},
    ],
)
def test_an_unknown_kind_of_value_is_an_error(damage: Any) -> None:
    with pytest.raises(CheckpointError, match=r"does not know|damaged"):
        decode({"a": [damage]}, lambda number: number)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", DTYPES)
def test_a_tensor_of_any_dtype_comes_back_exactly(tmp_path: Path, name: str) -> None:
    values = (torch.arange(96) % 2).to(torch.uint8)
    tensor = values.view(DTYPES[name])
    save_folder(tmp_path / "a", {"tensor": tensor, "scalar": tensor[0], "empty": tensor[:0]})
    found = load(tmp_path / "a")
    assert {value.dtype for value in found.values()} == {DTYPES[name]}
    assert found["tensor"].view(torch.uint8).equal(values)
    assert (found["scalar"].shape, found["empty"].shape) == ((), (0,))


def sparse_csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the layout is in beta
        return torch.eye(3).to_sparse_csr()


def quantized(scheme: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch gives them up
        if scheme == "tensor":
            return torch.quantize_per_tensor(torch.arange(6.0), 0.5, 3, torch.quint8)
        scales, zeros = torch.tensor([0.5, 0.25], dtype=torch.float64), torch.tensor([0, 1])
        return torch.quantize_per_channel(torch.arange(6.0).reshape(2, 3), scales, zeros, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch's own copy of a quantized tensor
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(12.0).reshape(3, 4).t(),
        lambda: torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        lambda: torch.ones(1000)[10:12],
        lambda: torch.ones(2, 1).expand(2, 5),
        lambda: torch.tensor([1 + 2j, 3 - 1j]).conj(),
        lambda: torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
        lambda: torch.eye(3).to_sparse(),
        sparse_csr,
        lambda: quantized("tensor"),
        lambda: quantized("channel"),
    ],
    ids=["transposed", "channels_last", "view", "expanded", "conj", "neg", "coo", "csr", "quantized", "per_channel"],
)
def test_a_tensor_of_any_kind_comes_back_with_its_values(tmp_path: Path, make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    save_folder(tmp_path / "a", {"tensor": tensor})
    found = load(tmp_path / "a")["tensor"]
    assert (found.dtype, found.layout, found.shape) == (tensor.dtype, tensor.layout, tensor.shape)
    if tensor.is_quantized:
        assert (found.int_repr().tolist(), found.qscheme()) == (tensor.int_repr().tolist(), tensor.qscheme())
        found, tensor = found.dequantize(), tensor.dequantize()
    assert torch.equal(found.to_dense(), tensor.to_dense())
    assert sum(path.stat().st_size for path in (tmp_path / "a").iterdir()) < 2500  # no view brings its storage


def test_a_tensor_that_can_not_be_stored_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(FabricTypeError, match=r'(?s)state\["tensor"\] has a dtype.*bits8'):
        save_folder(tmp_path / "new" / "a", {"tensor": torch.zeros(3, dtype=torch.uint8).view(torch.bits8)})
    assert not (tmp_path / "new").exists()


def test_large_tensors_out_of_order_are_written_through_the_buffer(tmp_path: Path) -> None:
    tensor = torch.arange(6_000_000).reshape(2, 3_000_000).t()  # 48 MB, three buffers
    row = torch.arange(5_000_000).reshape(2, 1, 2_500_000)[:, :, ::2].transpose(0, 1)  # rows larger than the buffer
    save_folder(tmp_path / "a", {"tensor": tensor, "row": row})
    found = load(tmp_path / "a")
    assert torch.equal(found["tensor"], tensor)
    assert torch.equal(found["row"], row)


def test_tied_tensors_are_one_and_names_that_clash_are_two(tmp_path: Path) -> None:
    tied = torch.arange(3.0)
    state = {"a": {"b.c": tied, "b": {"c": torch.zeros(1)}}, "again": tied, "view": tied[:2]}
    save_folder(tmp_path / "a", state)
    names = [entry.chunks[0].name for entry in Manifest.read(tmp_path / "a").tensors]
    assert names == ["a.b.c", "a.b.c~1", "view"]
    found = load(tmp_path / "a")
    assert found["a"]["b.c"].data_ptr() == found["again"].data_ptr()
    assert (found["a"]["b"]["c"].tolist(), found["view"].tolist()) == ([0.0], [0.0, 1.0])


def test_a_part_is_a_safetensors_file_without_gaps_and_aligned(tmp_path: Path) -> None:
    state = {"flag": torch.tensor([True]), "wide": torch.ones(3, dtype=torch.float64), "half": torch.ones(1).half()}
    save_folder(tmp_path / "a", state)
    data = (tmp_path / "a" / "part-00000.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert 8 + length + spans[-1][1] == len(data)
    assert (8 + length) % 8 == 0
    begin, end = header["wide"]["data_offsets"]
    assert begin % 8 == 0
    assert (header["wide"]["dtype"], header["wide"]["shape"]) == ("F64", [3])
    assert struct.unpack("<3d", data[8 + length + begin : 8 + length + end]) == (1.0, 1.0, 1.0)


def test_the_manifest_says_where_the_checkpoint_is_from(tmp_path: Path) -> None:
    save(tmp_path / "a", {}, state_dict_type="sharded", origin={"strategy": "FSDPStrategy", "precision": "bf16-mixed"})
    manifest = Manifest.read(tmp_path / "a")
    assert (manifest.strategy, manifest.precision, manifest.world_size) == ("FSDPStrategy", "bf16-mixed", 1)
    assert manifest.torch == torch.__version__


def test_the_fabric_writes_a_file_on_one_device_and_a_folder_when_asked(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.save(tmp_path / "file", {"value": 1})
    fabric.save(tmp_path / "folder", {"value": 1}, state_dict_type="sharded")
    assert torch.load(tmp_path / "file", weights_only=True) == {"value": 1}
    manifest = Manifest.read(tmp_path / "folder")
    assert (manifest.strategy, manifest.precision) == ("SingleDeviceStrategy", "32-true")
    described = read_manifest(tmp_path / "file") or {}
    assert (described["strategy"], described["precision"]) == ("SingleDeviceStrategy", "32-true")


def test_the_same_state_gives_the_same_bytes_in_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {"model": nn.Linear(3, 2), "tags": {"b", "a"}}
    for name in ("a", "b"):
        save_folder(tmp_path / name, state)
    for file in (MANIFEST, "part-00000.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and give it a right checksum again."""
    value = json.loads((path / MANIFEST).read_text())
    change(value)
    body = {key: item for key, item in value.items() if key != "checksum"}
    value["checksum"] = zlib.crc32(json.dumps(body, separators=(",", ":")).encode())
    (path / MANIFEST).write_text(json.dumps(value, separators=(",", ":")))


def chunk(value: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = value["tensors"][0]["chunks"][0]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.update(format=2), "newer fabric_lite"),
        (lambda value: value.update(format="1"), "no format"),
        (lambda value: value.update(more=1), "fields of a Manifest"),
        (lambda value: value.pop("parts"), "fields of a Manifest"),
        (lambda value: value.update(world_size=-1), "no whole number"),
        (lambda value: value.update(strategy=3), "strategy is 3"),
        (lambda value: value.update(tensors={}), "no list"),
        (lambda value: value["parts"].update({"../x.safetensors": {"bytes": 1, "crc32": 1}}), "no name of a part"),
        (lambda value: chunk(value).update(part="part-00000.safetensors\n"), "no name of a part"),
        (lambda value: chunk(value).update(part="part-00001.safetensors"), "lies in no part"),
        (lambda value: chunk(value).update(begin=True), "no whole number"),
        (lambda value: chunk(value).update(end=chunk(value)["end"] + 4), "another number of bytes"),
        (lambda value: chunk(value).update(offset=[1]), "reach beyond"),
        (lambda value: chunk(value).update(offset=[0, 0]), "another number of dims"),
        (lambda value: value["tensors"][0].update(dtype="object"), "no dtype"),
        (lambda value: value["tensors"][0].update(chunks=[]), "not the whole tensor"),
        (lambda value: value["tensors"][0].update(shape=[8], chunks=[chunk(value)] * 2), "overlap"),
    ],
)
def test_a_manifest_that_does_not_fit_together_is_an_error(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    save_folder(tmp_path / "a", {"tensor": torch.ones(4)})
    changed(tmp_path / "a", dict.copy)  # changes nothing
    Manifest.read(tmp_path / "a")
    changed(tmp_path / "a", change)
    with pytest.raises(CheckpointError, match=message):
        Manifest.read(tmp_path / "a")


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(tmp_path: Path) -> None:
    save_folder(tmp_path / "a", {"tensor": torch.ones(4), "text": "some text", "number": 1.25})
    path = tmp_path / "a" / MANIFEST
    data = path.read_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            Manifest.read(tmp_path / "a")


def test_a_manifest_that_is_a_link_is_refused(tmp_path: Path) -> None:
    save_folder(tmp_path / "a", {"value": 1})
    (tmp_path / "a" / MANIFEST).rename(tmp_path / "elsewhere")
    (tmp_path / "a" / MANIFEST).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="regular files only"):
        Manifest.read(tmp_path / "a")


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint, or one whose saving did not end"):
        Manifest.read(tmp_path)


def there(path: Path, what: str) -> None:
    if what in ("folder", "file"):
        save(path, {"value": "old"}, state_dict_type={"folder": "sharded", "file": "full"}[what])
    elif what != "nothing":
        path.mkdir()
    if what == "folder of torch.distributed.checkpoint":
        for name in (".metadata", "__0_0.distcp", "meta.pt"):
            (path / name).write_bytes(b"x")


@pytest.mark.parametrize("new", ["sharded", "full"])
@pytest.mark.parametrize("old", ["nothing", "file", "folder", "empty folder", "folder of torch.distributed.checkpoint"])
def test_a_checkpoint_replaces_a_checkpoint_of_any_kind_and_leaves_nothing_else(
    tmp_path: Path, old: str, new: str
) -> None:
    there(tmp_path / "a", old)
    save(tmp_path / "a", {"value": "new", "tensor": torch.ones(2)}, state_dict_type=new)
    assert load(tmp_path / "a")["value"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").is_dir() == (new == "sharded")


@pytest.mark.parametrize("new", ["sharded", "full"])
@pytest.mark.parametrize("extra", ["notes.txt", "folder", "link", "distcp without metadata"])
def test_a_folder_with_anything_else_in_it_is_never_touched(tmp_path: Path, extra: str, new: str) -> None:
    there(tmp_path / "a", "folder")
    if extra == "link":
        (tmp_path / "a" / "part-00001.safetensors").symlink_to(tmp_path)
    elif extra == "folder":
        (tmp_path / "a" / "part-00001.safetensors").mkdir()
    else:
        (tmp_path / "a" / {"notes.txt": "notes.txt"}.get(extra, "__0_0.distcp")).touch()
    before = sorted((tmp_path / "a").iterdir())
    with pytest.raises(CheckpointError, match="taken by something that is no checkpoint"):
        save(tmp_path / "a", {"value": "new"}, state_dict_type=new)
    assert sorted((tmp_path / "a").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("new", ["sharded", "full"])
def test_a_folder_whose_manifest_is_of_something_else_is_never_touched(tmp_path: Path, new: str) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(CheckpointError, match="taken by something that is no checkpoint"):
        save(site, {"value": "new"}, state_dict_type=new)
    assert (site / "manifest.json").read_text() == '{"name": "a web app"}'
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_a_link_stays_and_the_folder_that_it_points_to_is_replaced(tmp_path: Path) -> None:
    save_folder(tmp_path / "first", {"value": 1})
    (tmp_path / "last").symlink_to("first")
    save_folder(tmp_path / "last", {"value": 2})
    assert (tmp_path / "last").is_symlink()
    assert load(tmp_path / "first") == {"value": 2}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_umask_decides_who_may_read_a_folder(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save_folder(tmp_path / "a", {"tensor": torch.ones(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o777 & ~mask
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {0o666 & ~mask}


def unfinished(folder: Path, process: int, *files: str) -> Path:
    path = folder / f".fabric-save-{process}-0123abcd.tmp"
    path.mkdir()
    for name in files:
        (path / name).touch()
    return path


def test_folders_of_killed_saves_are_swept_and_no_others(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = unfinished(tmp_path, ended.pid, "part-00000.safetensors")
    alive = unfinished(tmp_path, os.getppid(), "part-00000.safetensors")
    save_folder(tmp_path / "a", {"value": 1})
    assert (dead.exists(), alive.exists()) == (False, True)
    not_ours = unfinished(tmp_path, ended.pid, "thesis.txt")
    save_folder(tmp_path / "a", {"value": 1})
    assert (not_ours / "thesis.txt").exists()


def test_a_folder_that_is_being_written_elsewhere_is_not_swept(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    ended = subprocess.Popen(["true"])
    ended.wait()
    folder = unfinished(tmp_path, ended.pid)  # its process id means nothing here: the lock tells
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    save_folder(tmp_path / "a", {"value": 1})
    assert folder.exists()
    os.close(descriptor)
    save_folder(tmp_path / "a", {"value": 1})
    assert not folder.exists()


@pytest.mark.parametrize("new", ["sharded", "full"])
@pytest.mark.parametrize("old", ["file", "folder"])
def test_where_names_can_not_be_exchanged_the_old_one_is_kept_until_the_new_one_is_in_place(
    tmp_path: Path, old: str, new: str
) -> None:
    there(tmp_path / "a", old)
    there(tmp_path / ".fabric-old-a", "folder")  # of an earlier save that was killed at its very end
    save(tmp_path / "new", {"value": "new"}, state_dict_type=new)
    _put_in_place(tmp_path / "new", tmp_path / "a", in_one_step=lambda *_: False)
    assert load(tmp_path / "a") == {"value": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_checkpoint_is_found_after_a_crash_between_the_two_steps_of_its_replacement(tmp_path: Path) -> None:
    path, kept = tmp_path / "a", tmp_path / ".fabric-old-a"
    assert recovered(path) == path
    there(kept, "folder")
    assert recovered(path) == kept
    assert load(recovered(path)) == {"value": "old"}
    save_folder(path, {"value": "new"})
    assert recovered(path) == path
    assert load(path) == {"value": "new"}
    assert not kept.exists()


def test_a_rank_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)Rank 0 does not see the folder.*file system that all nodes share"):
        _write_own_part(tmp_path / "none", [], tmp_path / "a")


def test_an_unknown_kind_of_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FabricValueError, match=r'(?s)state_dict_type=\'local\'.*"full"'):
        save(tmp_path / "a", {}, state_dict_type="local")


def test_a_grid_of_a_thousand_boxes_is_whole_and_one_that_is_there_twice_is_found() -> None:
    def tile(row: int, column: int) -> Chunk:
        return Chunk("part-00000.safetensors", "a", (row, column), (1, 1), 8, 12, 0)

    tiles = tuple(tile(row, column) for row in range(32) for column in range(32))
    TensorEntry("float32", (32, 32), tiles).check(pytest.fail)
    twice = (*tiles[:-1], dataclasses.replace(tiles[0], name="b"))
    found: list[str] = []
    TensorEntry("float32", (32, 32), twice).check(found.append)  # type: ignore[arg-type]
    assert found == ["the pieces of 'a' overlap"]
