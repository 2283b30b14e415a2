"""Reading a folder of ``torch.distributed.checkpoint`` (DCP), also one of Lightning Fabric, without running its code.

``.metadata`` is a pickle: here it is unpickled with a fixed table of names, each of which stands for a plain record
or a builtin, none of them for torch's code. Each tensor and each other value was written by ``torch.save``.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fabric_lite.checkpoint.archive_reading import errors_of, located_tensor
from fabric_lite.checkpoint.boxes import Box, tiling_fault
from fabric_lite.checkpoint.stored import Located, Piece, StoredTensor, row_major
from fabric_lite.checkpoint.stored_files import FileOfFolder, OpenFolder, Window
from fabric_lite.errors import CheckpointDamagedError, CheckpointError

__all__ = ["METADATA", "DcpFolder"]

METADATA = ".metadata"
# Lightning Fabric's file beside it, with all that is neither a module's nor an optimizer's.
_LIGHTNING = "meta.pt"
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "torch.serialization": {"_get_layout"},
    # Some Pythons (3.11.2) pickle a member of an enumeration as getattr(class, name). Here it gets nothing: a record.
    "builtins": {"getattr"},
    "pathlib": {"PosixPath", "WindowsPath", "Path", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}
_BUILTINS = {("torch", "Size"): tuple, ("collections", "OrderedDict"): dict}


class _Record:
    """What any class of the pickle becomes: its arguments and its state, and nothing that acts on them."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    # Without it, a pickle could set attributes of the class itself.
    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Knows the names that DCP writes, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _BUILTINS:
            return _BUILTINS[module, name]
        if name in _RECORDS.get(module, ()):
            return type(name, (_Record,), {})
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint has to name")


@dataclasses.dataclass(frozen=True)
class _Item:
    """What ``torch.save`` wrote into some bytes of a file."""

    file: FileOfFolder
    begin: int
    length: int

    def load(self) -> Any:
        """Read all of it."""
        with errors_of(self.file.path), self.file.opened() as descriptor:
            stream = Window(descriptor, self.file.path, self.begin, self.length)
            return torch.load(io.BufferedReader(stream), map_location="cpu", weights_only=True)


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """One box of a tensor; it is looked up in its file when it is needed, for a rank needs few of them."""

    item: _Item
    dtype: torch.dtype
    shape: tuple[int, ...]

    @functools.cached_property
    def located(self) -> Located:
        stored = located_tensor(self.item.file, self.item.begin, self.item.length)
        if stored is None or stored.dtype != self.dtype or tuple(stored.shape) != self.shape:
            raise _damaged(self.item.file.path, f"at byte {self.item.begin} is {stored}, not {self}")
        return stored.pieces[0].locate()

    def __str__(self) -> str:
        return f"a tensor of shape {self.shape} and {self.dtype}"


class DcpFolder:
    """A folder of ``torch.distributed.checkpoint``.

    It is opened now and stays the one that is read, also when its name gets a new content.

    Raises:
        CheckpointError: It could not be read, or is damaged, or its metadata would run code.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with errors_of(path / METADATA):
            self._folder = OpenFolder(path)
            metadata = _fields(self._unpickled(), "Metadata")
            self._described: dict[str, Any] = metadata["state_dict_metadata"]
            self._paths: dict[str, Any] = metadata.get("planner_data") or {}
            self._items = dict(self._item(*entry) for entry in metadata["storage_data"].items())

    @property
    def source(self) -> object:
        """What every tensor in it refers to until it has been read."""
        return self._folder

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        """Compare the sizes of the files with the metadata; the format has no checksums."""
        del share
        sizes: dict[str, int] = {}
        for item in self._items.values():
            if item.file.name not in sizes:
                with item.file.opened() as descriptor:
                    sizes[item.file.name] = os.fstat(descriptor).st_size
            if item.begin + item.length > sizes[item.file.name]:
                raise _damaged(item.file.path, f"{sizes[item.file.name]} bytes: it is cut short")

    def content(self) -> Any:
        """Return what is in the folder, with a StoredTensor for each tensor; lists come back as lists.

        Raises:
            CheckpointError: It is damaged, or can't be read without running code.
        """
        tree: dict[Any, Any] = {}
        with errors_of(self._path / METADATA):
            for name, described in self._described.items():
                kind = type(described).__name__
                value = (
                    self._tensor(name, described) if kind == "TensorStorageMetadata" else self._items[name, None].load()
                )
                _put(tree, self._paths.get(name, (name,)), value)
            content = {key: _with_lists(value) for key, value in tree.items()}  # at the top it is always a dict
        if _LIGHTNING in self._folder.names():
            file = self._folder.file(_LIGHTNING)
            with file.opened() as descriptor:
                size = os.fstat(descriptor).st_size
            more = _Item(file, 0, size).load()
            if not isinstance(more, dict):
                raise _damaged(file.path, f"it has a {type(more).__name__} and no dict")
            content = {**more, **content}
        return content

    def _unpickled(self) -> Any:
        with self._folder.file(METADATA).opened() as descriptor:
            stream = Window(descriptor, self._path / METADATA, 0, os.fstat(descriptor).st_size)
            return _Unpickler(io.BufferedReader(stream)).load()

    def _item(self, index: Any, info: Any) -> tuple[tuple[str, tuple[int, ...] | None], _Item]:
        place, where = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
        if where.get("transform_descriptors"):
            raise CheckpointError(
                "This checkpoint was written through an extension that compresses or encrypts it.",
                given=f"{self._path}: {where['transform_descriptors']!r:.80}",
                fix="torch.distributed.checkpoint.load with that extension",
            )
        offset = place.get("offset")
        begin, length = _counts([where["offset"], where["length"]])
        item = _Item(self._folder.file(str(where["relative_path"])), begin, length)
        return (str(place["fqn"]), None if offset is None else _counts(offset)), item

    def _tensor(self, name: str, described: Any) -> StoredTensor:
        fields = _fields(described, "TensorStorageMetadata")
        shape, dtype = _counts(fields["size"]), fields["properties"].state[0]
        boxes = sorted({_box(chunk) for chunk in fields["chunks"]})
        wrong = tiling_fault(boxes, shape)
        if wrong is not None:
            raise ValueError(f"the pieces of {name!r:.80} {wrong}")
        pieces = []
        for offset, sizes in boxes:
            chunk = _Chunk(self._items[name, offset], dtype, sizes)
            pieces.append(Piece(offset, sizes, functools.partial(getattr, chunk, "located")))
        return StoredTensor(dtype, torch.Size(shape), pieces, row_major(shape))


def _fields(record: Any, kind: str) -> dict[str, Any]:
    """The state of a record of this kind; TypeError if it is something else."""
    if not isinstance(record, _Record) or type(record).__name__ != kind or not isinstance(record.state, dict):
        raise TypeError(f"{type(record).__name__} where a {kind} should be")
    return record.state


def _counts(values: Sequence[Any]) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values!r:.80} are no whole numbers")
    return tuple(values)


def _box(chunk: Any) -> Box:
    fields = _fields(chunk, "ChunkStorageMetadata")
    return _counts(fields["offsets"]), _counts(fields["sizes"])


def _put(tree: dict[Any, Any], path: Sequence[Any], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _with_lists(value: Any) -> Any:
    """Nested dicts, with lists in the places of those that have the keys 0, 1, ...: so DCP writes lists."""
    if not isinstance(value, dict):
        return value
    if value and all(type(key) is int for key in value) and sorted(value) == list(range(len(value))):
        return [_with_lists(value[index]) for index in range(len(value))]
    return {key: _with_lists(item) for key, item in value.items()}


def _damaged(path: Path, where: str) -> CheckpointError:
    return CheckpointDamagedError("This checkpoint is damaged.", given=f"{path}: {where}", fix="an earlier checkpoint")
