"""Writing the file: ``torch.save``'s zip and a manifest, at once or with its large tensors one after the other."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, cast

import torch
from torch.utils.serialization import config

from fabric_lite.checkpoint.archive import FORMAT, MANIFEST
from fabric_lite.checkpoint.packing import storages
from fabric_lite.checkpoint.part_writing import Blocks, write_blocks
from fabric_lite.checkpoint.plain import Place, tensors_in
from fabric_lite.checkpoint.seal import UNSEALED, begin_of_data, bytes_in, seal
from fabric_lite.collectives import world_size
from fabric_lite.errors import CheckpointError, FabricTypeError
from fabric_lite.movement import MovingFile

__all__ = ["Origin", "StreamedArchive", "own_version", "placeholder", "write_archive"]

# Each record's storage, and the tensors that live in it.
_Records = dict[str, tuple[torch.UntypedStorage, list[dict[str, Any]]]]
# What the manifest says of the run: the names of its "strategy" and its "precision", where they are known, and its
# "world_size", where that is not the one now.
Origin = Mapping[str, Any]


def write_archive(file: BinaryIO, content: Any, origin: Origin) -> None:
    """Write packed plain data into an empty file that is open for reading and writing.

    The checksums are those that torch computes while it writes, and puts into the zip's directory: a thread beside it
    is faster only where a core is free, and slower by much where none is.
    """
    records = _storage_records(content)
    with config.patch({"save.compute_crc32": True}):  # type: ignore[attr-defined]
        _save(content, file)
    with zipfile.ZipFile(file) as archive:
        crc_by_name = {info.filename.split("/", 1)[1]: info.CRC for info in archive.infolist()}
    _finish(file, records, crc_by_name, origin)


def placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A CPU tensor without memory, for a tensor that :meth:`StreamedArchive.put` brings later."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype)


class StreamedArchive:
    """A file like that of :func:`write_archive` whose frame is written first and whose tensors are put in one by one.

    Args:
        file: Empty, open for reading and writing.
        content: Packed plain data, with a :func:`placeholder` for each tensor that is put in later.
    """

    def __init__(self, file: BinaryIO, content: Any) -> None:
        self._file = file
        self._records = _storage_records(content)
        self._crc_by_name: dict[str, int] = {}
        # What the records hold is skipped, their places are kept.
        with (
            torch.serialization.skip_data(materialize_fake_tensors=True),
            config.patch({"save.compute_crc32": False}),  # type: ignore[attr-defined]
        ):
            _save(content, file)
        with zipfile.ZipFile(file) as archive:
            infos = {info.filename.split("/", 1)[1]: info for info in archive.infolist()}
        self._starts = {name: _start(file, infos[name]) for name in self._records}
        self._names = {storage._cdata: name for name, (storage, _) in self._records.items()}

    def put(self, place: torch.Tensor, blocks: Iterable[memoryview]) -> None:
        """Write a tensor's bytes, in row-major order, where its placeholder ``place`` is."""
        self._fill(self._names[place.untyped_storage()._cdata], blocks)

    def finish(self, origin: Origin) -> None:
        """Write the tensors that are in memory, and the manifest."""
        for name, (storage, _) in self._records.items():
            if name not in self._crc_by_name:
                self._fill(name, Blocks().of(torch.empty(0, dtype=torch.uint8).set_(storage)))
        _finish(self._file, self._records, self._crc_by_name, origin)

    def _fill(self, name: str, blocks: Iterable[memoryview]) -> None:
        self._file.seek(self._starts[name])
        self._crc_by_name[name] = write_blocks(self._file, blocks)


def _save(content: Any, file: BinaryIO) -> None:
    try:
        torch.save(content, cast(BinaryIO, MovingFile(file)))
    except KeyError as error:  # of a few bits an element: uint1 to uint7, int1 to int7
        raise FabricTypeError(
            "A tensor has a dtype that torch.save can't write.",
            given=str(error.args[0]),
            fix="tensor.view(torch.uint8), which has the same bytes",
        ) from error


def _finish(file: BinaryIO, records: _Records, crc_by_name: dict[str, int], origin: Origin) -> None:
    with zipfile.ZipFile(file, "a", zipfile.ZIP_STORED) as archive:
        described = _describe(archive, file, records, crc_by_name)
        folder = archive.infolist()[0].filename.split("/", 1)[0]
        archive.writestr(zipfile.ZipInfo(f"{folder}/{MANIFEST}"), json.dumps(_manifest(described, origin)))
        archive.comment = UNSEALED
    seal(file)


def _storage_records(content: Any) -> _Records:
    """Each storage under the record name that ``torch.save`` gives it, with a description of its tensors."""
    names: dict[int, str] = {}
    records: _Records = {}
    for place, tensor in tensors_in(content, Place()):
        for storage in storages(tensor):
            name = names.setdefault(storage._cdata, f"data/{len(names)}")
            _, tensors = records.setdefault(name, (storage, []))
            tensors.append({"key": str(place), "dtype": str(tensor.dtype)[6:], "shape": list(tensor.shape)})
    return records


def _describe(
    archive: zipfile.ZipFile, file: BinaryIO, records: _Records, crc_by_name: dict[str, int]
) -> dict[str, dict[str, Any]]:
    """Put the checksums into the zip's directory and return the manifest's entry of each record."""
    described: dict[str, dict[str, Any]] = {}
    for info in archive.infolist():
        name = info.filename.split("/", 1)[1]
        info.CRC = crc_by_name[name] if name in crc_by_name else _crc32_in_file(file, info)
        described[name] = {"bytes": info.file_size, "crc32": info.CRC}
        if name in records:
            described[name]["tensors"] = records[name][1]
    sizes = {name: record["bytes"] for name, record in described.items() if name.startswith("data/")}
    if sizes != {name: storage.nbytes() for name, (storage, _) in records.items()}:
        raise CheckpointError("This torch names the parts of its files in another way.", given=torch.__version__)
    return described


def _manifest(records: dict[str, Any], origin: Origin) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "fabric_lite": own_version(),
        "torch": str(torch.__version__),
        "world_size": origin.get("world_size") or world_size(),
        "strategy": origin.get("strategy"),
        "precision": origin.get("precision"),
        "sealed": True,
        "records": records,
    }


@functools.cache
def own_version() -> str | None:
    """The version of fabric_lite; None in a checkout that is not installed."""
    try:
        return importlib.metadata.version("fabric-lite")
    except importlib.metadata.PackageNotFoundError:
        return None


def _start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    return begin_of_data(info, functools.partial(bytes_in, file))


def _crc32_in_file(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    return zlib.crc32(bytes_in(file, _start(file, info), info.file_size))
