"""Broken checkpoints of every kind are one clear error on all ranks, and leave all objects as they were."""

from __future__ import annotations

import copy
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_lite.checkpoint import load, save
from fabric_lite.checkpoint.manifest import MANIFEST
from fabric_lite.collectives import world_size
from fabric_lite.errors import CheckpointError
from fabric_lite.testing import RankPool
from tests.faults.conftest import Figures
from tests.models import Counter

PARTS = ("part-00000.safetensors", "part-00001.safetensors")


def objects(number: float) -> dict[str, Any]:
    """A state of everything that is restored in one way or another, all of it with this number."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    if world_size() > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (world_size(),)))
    optimizer = torch.optim.SGD(model.parameters(), lr=number, momentum=0.9)
    counter = Counter()
    counter.count = int(number)
    with torch.no_grad():
        for value in [*model.parameters(), model[1].running_mean]:
            value.fill_(number)
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, number)
    return {
        "model": model,
        "optimizer": optimizer,
        "counter": counter,
        "parameter": nn.Parameter(torch.full((3,), number)),
        "plain": {"epoch": int(number), "history": [number] * 3},
        "tensor": torch.full((2,), number),
    }


def values(state: dict[str, Any]) -> dict[str, Any]:
    """Everything that is in a state, copied."""
    return copy.deepcopy({key: getattr(value, "state_dict", lambda v=value: v)() for key, value in state.items()})


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        local = [getattr(each, "to_local", lambda each=each: each)() for each in (one, other)]
        return torch.equal(*local)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def saved(path: Path, kind: str, number: float) -> None:
    save(path, objects(number), state_dict_type=kind)


def tried(paths: list[Path]) -> list[tuple[str, bool]]:
    """Load each; the error, and whether all is as it was."""
    results = []
    for path in paths:
        state = objects(5.0)
        before, identities = values(state), {key: id(value) for key, value in state.items()}
        try:
            load(path, state)
            message = "no error"
        except CheckpointError as error:
            message = str(error)
        untouched = same(before, values(state)) and identities == {key: id(value) for key, value in state.items()}
        results.append((message, untouched))
    return results


def changed_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """With a checksum that fits, as of one who did it on purpose."""
    value = json.loads((folder / MANIFEST).read_text())
    change(value)
    body = {key: item for key, item in value.items() if key != "checksum"}
    value["checksum"] = zlib.crc32(json.dumps(body, separators=(",", ":")).encode())
    (folder / MANIFEST).write_text(json.dumps(value, separators=(",", ":")))


def swap(one: Path, other: Path) -> None:
    one.rename(one.with_name("aside"))
    other.rename(one)
    one.with_name("aside").rename(other)


def renamed_part(value: dict[str, Any], name: str) -> None:
    value["parts"][name] = value["parts"].pop(PARTS[1])
    for chunk in (chunk for entry in value["tensors"] for chunk in entry["chunks"]):
        chunk["part"] = name if chunk["part"] == PARTS[1] else chunk["part"]


def replaced(path: Path, make: Callable[[Path], Any]) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


def linked(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def rezipped(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """The same zip, with other records."""
    with zipfile.ZipFile(path) as old:
        records = [(info.filename, old.read(info)) for info in old.infolist()]
    with zipfile.ZipFile(path, "w") as new:
        for name, data in records:
            changed = change(name.split("/", 1)[1], data)
            if changed is not None:
                new.writestr(zipfile.ZipInfo(name), changed)


def newer(name: str, data: bytes) -> bytes:
    return json.dumps(json.loads(data) | {"format": 99}).encode() if name == "fabric_lite.json" else data


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


# What is done to a checkpoint, and what the error says. The second path is another save of the same objects.
Break = Callable[[Path, Path], Any]
FOLDERS: dict[str, tuple[Break, str]] = {
    "a part that is cut": (lambda path, _: cut(path / PARTS[1]), PARTS[1]),
    "a part that has grown": (lambda path, _: grown(path / PARTS[1]), PARTS[1]),
    "a part that is empty": (lambda path, _: (path / PARTS[0]).write_bytes(b""), PARTS[0]),
    "a part that is missing": (lambda path, _: (path / PARTS[1]).unlink(), PARTS[1]),
    "a part too many": (lambda path, _: shutil.copy(path / PARTS[0], path / "part-00002.safetensors"), "part-00002"),
    "the shards of two ranks swapped": (lambda path, _: swap(path / PARTS[0], path / PARTS[1]), "part-0000"),
    "a shard of another save": (lambda path, other: shutil.copy(other / PARTS[1], path / PARTS[1]), PARTS[1]),
    "the manifest of another save": (lambda path, other: shutil.copy(other / MANIFEST, path / MANIFEST), "part-0000"),
    "no manifest": (lambda path, _: (path / MANIFEST).unlink(), "no checkpoint"),
    "an empty manifest": (lambda path, _: (path / MANIFEST).write_bytes(b""), MANIFEST),
    "a manifest that is cut": (lambda path, _: cut(path / MANIFEST), MANIFEST),
    "a newer version": (lambda path, _: changed_manifest(path, lambda value: value.update(format=99)), "newer"),
    "a part outside of the folder": (
        lambda path, _: changed_manifest(path, lambda value: renamed_part(value, "../part-00001.safetensors")),
        "no name of a part",
    ),
    "a part that is a link": (lambda path, _: linked(path / PARTS[1]), PARTS[1]),
    "a part that is a folder": (lambda path, _: replaced(path / PARTS[1], Path.mkdir), PARTS[1]),
    "a part that is a pipe": (lambda path, _: replaced(path / PARTS[1], os.mkfifo), PARTS[1]),
    "foreign files": (
        lambda path, _: replaced(path, lambda path: (path.mkdir(), (path / "notes.txt").touch())),
        "no checkpoint",
    ),
    "nothing": (lambda path, _: shutil.rmtree(path), "no checkpoint of this name"),
}
FILES: dict[str, tuple[Break, str]] = {
    "a file that is cut": (lambda path, _: cut(path), "damaged"),
    "a file that has grown": (lambda path, _: grown(path), "damaged"),
    "an empty file": (lambda path, _: path.write_bytes(b""), "empty"),
    "a foreign file": (lambda path, _: path.write_text("Dear Sir or Madam"), "no checkpoint"),
    "zeros": (lambda path, _: path.write_bytes(bytes(path.stat().st_size)), "no checkpoint"),
    "half of another save": (
        lambda path, other: path.write_bytes(path.read_bytes()[:-3000] + other.read_bytes()[-3000:]),
        "damaged",
    ),
    "a record that is missing": (
        lambda path, _: rezipped(path, lambda name, data: None if name == "data/2" else data),
        "damaged",
    ),
    "the manifest of another save": (
        lambda path, other: rezipped(
            path, lambda name, data: manifest_in(other) if name == "fabric_lite.json" else data
        ),
        "damaged",
    ),
    "no list of its content": (
        lambda path, _: rezipped(path, lambda name, data: None if name == "data.pkl" else data),
        "damaged",
    ),
    "a newer version": (lambda path, _: rezipped(path, newer), "newer"),
    "a pipe": (lambda path, _: replaced(path, os.mkfifo), "pipe"),
    "a link to nothing": (lambda path, _: replaced(path, lambda path: path.symlink_to("none")), "no checkpoint of"),
}


def manifest_in(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(archive.infolist()[-1])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_broken_checkpoint_is_a_clear_error_and_changes_nothing(
    ranks: RankPool, tmp_path: Path, kind: str, count: int, figures: Figures
) -> None:
    whole, other = tmp_path / "whole", tmp_path / "other"
    for path, number in ((whole, 1.0), (other, 2.0)):
        ranks.run(saved, path, kind, number, ranks=2)  # two parts, whoever reads them
    broken = FOLDERS if kind == "sharded" else FILES
    paths = []
    for number, (break_it, _) in enumerate(broken.values()):
        path = tmp_path / str(number) / "a"
        path.parent.mkdir()
        shutil.copytree(whole, path) if whole.is_dir() else shutil.copy(whole, path)
        break_it(path, other)
        paths.append(path)
    for found in ranks.run(tried, [whole, *paths], ranks=count):
        assert found[0] == ("no error", False)
        for (message, untouched), (what, (_, expected)) in zip(found[1:], broken.items(), strict=True):
            assert expected in message, (what, message)
            assert "Given: " in message, (what, message)
            assert untouched, what
    name = f"kinds of broken {'folder' if kind == 'sharded' else 'file'}, {count} rank{'s' if count > 1 else ''}"
    figures(name, kinds=len(broken), clear_errors=len(broken), objects_changed=0)
