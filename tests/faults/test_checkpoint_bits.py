"""A bit that flips anywhere in a checkpoint is found when it is loaded, and the error says where."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_lite.checkpoint import load, save
from fabric_lite.checkpoint.folder_reading import CheckpointFolder
from fabric_lite.errors import CheckpointError
from tests.faults.conftest import Figures

TENSORS = ["one", "two", "three"]


def state() -> dict[str, Any]:
    """Tensors of several dtypes, and plain values of all kinds, some with letters that JSON spells out."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "one": torch.randn(40, 30, generator=generator),
        "two": torch.randn(777, generator=generator).bfloat16(),
        "three": torch.arange(555),
    }
    return {"tensors": tensors, "epoch": 3, "names": ["M\u00e9lanie", "x"], "rate": 1e-5, 7: None, "pair": (1, 2.5)}


def data_of_tensors(path: Path) -> dict[str, tuple[Path, int, int]]:
    """Of each tensor the file, the first byte of its data and one past the last, found by searching for them."""
    found = {}
    for name, tensor in state()["tensors"].items():
        data = tensor.view(torch.uint8).numpy().tobytes()
        for file in [path] if path.is_file() else sorted(path.iterdir()):
            begin = file.read_bytes().find(data)
            if begin >= 0:
                found[name] = file, begin, begin + len(data)
    assert list(found) == TENSORS
    return found


def flipped(file: Path, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        byte = opened.read(1)[0]
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))


def bits_to_flip(path: Path, count: int) -> list[tuple[Path, int]]:
    """Half of them in the tensors' data, half in all the rest, where most of the ways to go wrong are."""
    moments = random.Random(0)
    spans = list(data_of_tensors(path).values())
    inside = [(file, byte) for file, begin, end in spans for byte in range(begin, end)]
    data = set(inside)
    files = [path] if path.is_file() else sorted(path.iterdir())
    around = [(file, byte) for file in files for byte in range(file.stat().st_size) if (file, byte) not in data]
    bytes_chosen = moments.choices(inside, k=count // 2) + moments.choices(around, k=count - count // 2)
    return [(file, 8 * byte + moments.randrange(8)) for file, byte in bytes_chosen]


def check_found(path: Path, file: Path, bit: int) -> None:
    """A flipped bit raises, names its file and, in the data of a tensor, that tensor."""
    holders = [
        name for name, (at, begin, end) in data_of_tensors(path).items() if at == file and begin <= bit // 8 < end
    ]
    flipped(file, bit)
    try:
        with pytest.raises(CheckpointError) as raised:
            load(path)
        assert str(file) in str(raised.value), (file, bit)
        for holder in holders:
            assert holder in str(raised.value), (file, bit, str(raised.value))
    finally:
        flipped(file, bit)


@pytest.mark.parametrize("bits", [50, pytest.param(1000, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_every_flipped_bit_is_found_and_named(tmp_path: Path, kind: str, bits: int, figures: Figures) -> None:
    path = tmp_path / "a"
    save(path, state(), state_dict_type=kind)
    chosen = bits_to_flip(path, bits)
    for file, bit in chosen:
        check_found(path, file, bit)
    assert load(path)["epoch"] == 3
    figures(f"flipped bits of a {'file' if kind == 'full' else 'folder'}", bits=len(chosen), found=len(chosen))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_every_single_bit_around_the_data_is_found(tmp_path: Path, kind: str, figures: Figures) -> None:
    """Headers, padding, directory and manifest, all of them."""
    path = tmp_path / "a"
    save(path, {"one": torch.ones(3), "name": "M\u00e9lanie", "rate": 1e-5}, state_dict_type=kind)
    count = 0
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        for bit in range(8 * file.stat().st_size):
            flipped(file, bit)
            with pytest.raises(CheckpointError, match=file.name):
                load(path)
            flipped(file, bit)
            count += 1
    figures(f"every bit of a small {'file' if kind == 'full' else 'folder'}", bits=count, found=count)


def test_the_data_of_a_folder_is_where_the_search_finds_it(tmp_path: Path) -> None:
    """The test above would count nothing if it took headers for data."""
    save(tmp_path / "a", state(), state_dict_type="sharded")
    manifest = CheckpointFolder(tmp_path / "a").manifest
    listed = {chunk.name: (chunk.begin, chunk.end) for entry in manifest.tensors for chunk in entry.chunks}
    searched = {f"tensors.{name}": where[1:] for name, where in data_of_tensors(tmp_path / "a").items()}
    assert listed == searched
