"""``fabric-ckpt``: looks at checkpoints, checks them, and makes one kind into another."""

from __future__ import annotations

import collections
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_lite.checkpoint import load, load_raw, save
from fabric_lite.checkpoint.cli import main
from fabric_lite.checkpoint.part_writing import Piece, write_part

NAMES = {"folder": "folder", "file": "file.ckpt", "safetensors": "flat.safetensors"}


def some_state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "step": 7,
        "tags": {"a", ("x")},
        "best": float("inf"),
        "tied": [model[0].weight, torch.zeros(0, 2), torch.tensor(3)],
        "odd": [torch.tensor([1 + 2j]), torch.ones(2).to(torch.float8_e4m3fn), torch.eye(2).to_sparse()],
    }


def written(folder: Path, kind: str) -> Path:
    """The state as one of our kinds, or as what others write."""
    path = folder / NAMES.get(kind, kind)
    origin = {"strategy": "FSDPStrategy", "precision": "bf16-mixed"}
    if kind == "folder":
        save(path, some_state(), state_dict_type="sharded", origin=origin)
    elif kind == "file":
        save(path, some_state(), origin=origin)
    elif kind == "safetensors":
        save(folder / "source", some_state(), state_dict_type="sharded", origin=origin)
        assert main(["convert", str(folder / "source"), str(path)]) == 0
    elif kind == "torch.pt":
        torch.save(some_state()["model"].state_dict(), path)
    return path


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        assert vars(one) == vars(other) if type(one) is collections.OrderedDict else True
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, its in zip(one, other, strict=True):
            assert_same(mine, its)
    elif isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.layout) == (other.dtype, other.shape, other.layout)
        same = one.to_dense() if one.layout != torch.strided else one
        assert same.reshape(-1).view(torch.uint8).equal(other.to_dense().reshape(-1).view(torch.uint8))
    else:
        assert one == other


@pytest.mark.parametrize("kind", ["folder", "file", "safetensors"])
def test_inspect_says_what_a_checkpoint_is_and_what_is_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = written(tmp_path, kind)
    capsys.readouterr()
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "of fabric_lite" in text
    for words in (f"torch {torch.__version__}", "world_size 1", "strategy FSDPStrategy", "precision bf16-mixed"):
        assert words in text
    assert "  model: 9 tensors, 48 elements, 196 bytes, float32 int64\n" in text
    assert "  step: 7\n" in text
    assert "0.weight" not in text
    assert main(["inspect", str(path), "--tensors"]) == 0
    assert "  model.0.weight  float32  (4, 3)  48 bytes\n" in capsys.readouterr().out


def test_inspect_shows_that_a_long_value_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "file.ckpt", {"long": list(range(100)), "short": "a" * 78})
    assert main(["inspect", str(tmp_path / "file.ckpt")]) == 0
    long, short = capsys.readouterr().out.splitlines()[-2:]
    assert long.startswith("  long: [0, 1, 2, ")
    assert long.endswith("...")
    assert len(long) == len("  long: ") + 80
    assert short == f"  short: {'a' * 78!r}"


def test_inspect_as_json_has_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "folder")
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["facts"]["strategy"] == "FSDPStrategy"
    assert found["bytes"] == sum(file.stat().st_size for file in path.iterdir())
    assert {"key": "model.0.bias", "dtype": "float32", "shape": [4], "bytes": 16} in found["tensors"]


def test_inspect_knows_files_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(written(tmp_path, "torch.pt"))]) == 0
    assert "torch.pt: file of torch.save" in capsys.readouterr().out


def test_names_in_a_checkpoint_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "a.ckpt", {"a\x1b]0;title\x07": {"b\x1b[2J": torch.ones(1)}, "\ud800": 1})
    assert main(["inspect", "--tensors", str(tmp_path / "a.ckpt")]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert r"a\x1b]0;title\x07: 1 tensor" in text
    assert r"\ud800: 1" in text
    assert main(["convert", str(tmp_path / "a.ckpt"), str(tmp_path / "b"), "--key", "c"]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("command", ["inspect", "verify", "convert"])
def test_a_checkpoint_that_a_crash_left_beside_its_name_is_found(tmp_path: Path, kind: str, command: str) -> None:
    path = written(tmp_path, kind)
    path.rename(tmp_path / f".fabric-old-{path.name}")
    assert main([command, str(path), *([str(tmp_path / "new")] if command == "convert" else [])]) == 0


@pytest.mark.parametrize("kind", ["folder", "file", "safetensors", "torch.pt"])
def test_verify_says_that_a_sound_checkpoint_is_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = written(tmp_path, kind)
    capsys.readouterr()
    assert main(["verify", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"OK: {path}, ")


@pytest.mark.parametrize("kind", ["folder", "file", "torch.pt"])
def test_verify_finds_a_flipped_bit_in_a_tensor_and_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = written(tmp_path, kind)
    part = path / "part-00000.safetensors" if kind == "folder" else path
    data = bytearray(part.read_bytes())
    needle = struct.pack("<f", float(some_state()["model"].state_dict()["2.bias"][1]))
    data[data.index(needle)] ^= 1
    part.write_bytes(data)
    assert main(["verify", str(path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("fabric-ckpt: ")
    assert "\n  Given: " in output.err
    assert str(part) in output.err
    assert "2.bias" in output.err or kind == "torch.pt"


def test_what_can_not_be_asked_for_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "none")]) == 2
    path = written(tmp_path, "folder")
    assert main(["convert", str(path), str(tmp_path / "a.ckpt"), "--key", "weights"]) == 2
    assert "does not have 'weights'" in capsys.readouterr().err
    assert not (tmp_path / "a.ckpt").exists()
    with pytest.raises(SystemExit) as ended:
        main(["explain"])
    assert ended.value.code == 2


@pytest.mark.parametrize("second", ["folder", "file", "safetensors"])
@pytest.mark.parametrize("first", ["folder", "file", "safetensors"])
def test_a_checkpoint_is_the_same_after_two_conversions(tmp_path: Path, first: str, second: str) -> None:
    source = written(tmp_path, first)
    there, back = tmp_path / f"there-{NAMES[second]}", tmp_path / f"back-{NAMES[first]}"
    assert main(["convert", str(source), str(there)]) == 0
    assert main(["convert", str(there), str(back)]) == 0
    expected = load(source)
    for path in (there, back):
        found = load(path)
        assert_same(found, expected)
        assert found["tied"][0].data_ptr() == found["model"]["0.weight"].data_ptr()
        assert main(["verify", str(path)]) == 0
    assert there.is_dir() == (second == "folder")


def test_the_kind_can_be_asked_for_whatever_the_name(tmp_path: Path) -> None:
    source = written(tmp_path, "file")
    assert main(["convert", str(source), str(tmp_path / "a.dir"), "--to", "folder"]) == 0
    assert (tmp_path / "a.dir").is_dir()
    assert main(["convert", str(tmp_path / "a.dir"), str(tmp_path / "plain"), "--to", "file"]) == 0
    assert torch.load(tmp_path / "plain", weights_only=True)["step"] == 7


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_the_weights_alone_are_a_file_for_other_tools(tmp_path: Path, kind: str) -> None:
    """Read here by the rules of the format: length, header, data."""
    path = tmp_path / "model.safetensors"
    assert main(["convert", str(written(tmp_path, kind)), str(path), "--key", "model"]) == 0
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__")["format"] == "pt"
    expected = some_state()["model"].state_dict()
    assert header.keys() == expected.keys()
    begin, end = header["2.bias"]["data_offsets"]
    assert list(struct.unpack("<3f", data[8 + length + begin : 8 + length + end])) == expected["2.bias"].tolist()
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    load_raw(path, model)
    assert model.state_dict()["0.weight"].equal(expected["0.weight"])


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_tied_weights_are_one_tensor_with_the_other_name_beside_it(tmp_path: Path, kind: str) -> None:
    weight = torch.ones(2, 2)
    save(tmp_path / "a.ckpt", {"model": {"embed": weight, "head": weight}}, state_dict_type=kind)
    assert main(["convert", str(tmp_path / "a.ckpt"), str(tmp_path / "a.safetensors"), "--key", "model"]) == 0
    data = (tmp_path / "a.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header.keys() == {"__metadata__", "embed"}
    assert header["__metadata__"]["head"] == "embed"


def test_a_destination_that_exists_is_replaced_only_by_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, there = written(tmp_path, "file"), tmp_path / "there.ckpt"
    save(there, {"value": 1}, state_dict_type="sharded")
    assert main(["convert", str(source), str(there)]) == 2
    assert "  Try: another name, or --force" in capsys.readouterr().err
    assert load(there) == {"value": 1}
    assert main(["convert", str(source), str(there), "--force"]) == 0
    assert load(there)["step"] == 7
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert main(["convert", str(source), str(tmp_path / "mine"), "--force"]) == 1
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_damaged_checkpoint_is_not_converted(tmp_path: Path) -> None:
    path = written(tmp_path, "folder")
    part = path / "part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\x99")
    assert main(["convert", str(path), str(tmp_path / "a.ckpt")]) == 1
    assert not (tmp_path / "a.ckpt").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")
@pytest.mark.parametrize("command", ["inspect", "verify", "convert"])
def test_a_pipe_is_refused_by_every_command(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    destination = [str(tmp_path / "a.ckpt")] if command == "convert" else []
    assert main([command, str(tmp_path / "pipe"), *destination]) == 1
    assert "A checkpoint is a regular file or a folder." in capsys.readouterr().err


@pytest.mark.parametrize(
    "description",
    [
        "no JSON",
        "{}",
        '{"format": 9, "content": {}, "tensors": []}',
        '{"format": 1, "content": {"tensor": 1}, "tensors": [["a", "float32", [2]]]}',
        '{"format": 1, "content": {"tensor": 0}, "tensors": [["b", "float32", [2]]]}',
        '{"format": 1, "content": {"tensor": 0}, "tensors": [["a", "float64", [2]]]}',
        '{"format": 1, "content": {"tensor": 0}, "tensors": [["a", "float32", [-1, -2]]]}',
        '{"format": 1, "content": {"tensor": 0}, "tensors": [["a", "object", [2]]]}',
        '{"format": 1, "content": {"tag": "os.system", "value": "true"}, "tensors": []}',
    ],
)
def test_a_safetensors_file_whose_description_is_damaged_is_an_error(tmp_path: Path, description: str) -> None:
    with (tmp_path / "a.safetensors").open("wb") as file:
        write_part(file, [Piece("a", torch.float32, (2,), lambda: torch.ones(2))], {"fabric_lite": description})
    assert main(["verify", str(tmp_path / "a.safetensors")]) == 1


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def convert_measured(small: Path, large: Path, name: str) -> int:
    main(["convert", str(small), str(small.parent / f"small-{name}")])  # imports
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    assert main(["convert", str(large), str(large.parent / name)]) == 0
    return resident("VmHWM") - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind", ["folder", "file", "safetensors"])
def test_a_conversion_holds_one_tensor_at_a_time(tmp_path: Path, kind: str) -> None:
    from fabric_lite.testing import RankPool

    large = {"weights": [torch.full((2 << 20,), float(number)) for number in range(16)]}  # 8 MiB each
    save(tmp_path / "large", large, state_dict_type="sharded")
    save(tmp_path / "small", {"weights": [torch.ones(2)]}, state_dict_type="sharded")
    with RankPool() as pool:
        [peak] = pool.run(convert_measured, tmp_path / "small", tmp_path / "large", NAMES[kind], ranks=1)
    assert peak <= (16 + 8 + 16) << 20, f"{peak / (1 << 20):.1f} MiB"  # a buffer, a tensor, the allocator's slack
