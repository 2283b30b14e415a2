"""What a checkpoint is and what is in it, read without reading its tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fabric_lite.checkpoint.archive import read_manifest
from fabric_lite.checkpoint.archive_reading import ArchiveFile
from fabric_lite.checkpoint.contents import dotted
from fabric_lite.checkpoint.flat import header_of
from fabric_lite.checkpoint.folder_reading import CheckpointFolder
from fabric_lite.checkpoint.formats import StoredCheckpoint, opened
from fabric_lite.checkpoint.plain import Place, values_where
from fabric_lite.checkpoint.safetensors import SafetensorsFile
from fabric_lite.checkpoint.stored import is_tensor

__all__ = ["Description", "about", "described", "kind_of", "lines", "printable"]

_FACTS = ("format", "fabric_lite", "torch", "world_size", "strategy", "precision")
_VALUE_SIZE = 80  # characters


@dataclasses.dataclass(frozen=True)
class Description:
    """A checkpoint, described in plain values.

    Args:
        kind: What it is, in words.
        bytes: The size of its files.
        facts: What its manifest says of where it is from: ``format``, ``fabric_lite``, ``torch``, ``world_size``,
            ``strategy``, ``precision``; those that are known.
        entries: What is under each top key: ``tensors``, ``elements``, ``bytes`` and ``dtypes``, or its ``value``.
        tensors: Of each tensor ``key``, ``dtype``, ``shape`` and ``bytes``.
    """

    kind: str
    bytes: int
    facts: dict[str, Any]
    entries: dict[str, dict[str, Any]]
    tensors: list[dict[str, Any]]


def described(path: Path) -> Description:
    """Look at a checkpoint of any kind that ``fabric.load`` reads. Raises what loading it would raise."""
    checkpoint = opened(path)
    content = checkpoint.content()
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
    tops = {str(key): value for key, value in content.items()} if isinstance(content, dict) else {"(all)": content}
    return Description(
        kind=kind_of(path, checkpoint),
        bytes=sum(file.stat().st_size for file in files),
        facts=about(path, checkpoint),
        entries={key: _entry(value) for key, value in tops.items()},
        tensors=[_tensor(place, tensor) for place, tensor in values_where(is_tensor, content, Place())],
    )


def kind_of(path: Path, checkpoint: StoredCheckpoint) -> str:
    """What an open checkpoint is, in words."""
    if isinstance(checkpoint, CheckpointFolder):
        return "folder of fabric_lite"
    if isinstance(checkpoint, SafetensorsFile):
        return "safetensors file" + (" of fabric_lite" if header_of(checkpoint.metadata) else "")
    if isinstance(checkpoint, ArchiveFile):
        return "file of torch.save" if read_manifest(path) is None else "file of fabric_lite"
    return "folder of torch.distributed.checkpoint"


def about(path: Path, checkpoint: StoredCheckpoint) -> dict[str, Any]:
    """What is known of where an open checkpoint is from."""
    if isinstance(checkpoint, CheckpointFolder):
        known = {name: getattr(checkpoint.manifest, name) for name in _FACTS}
    elif isinstance(checkpoint, SafetensorsFile):
        known = header_of(checkpoint.metadata) or {}
    else:
        known = (read_manifest(path) if path.is_file() else None) or {}
    return {name: known[name] for name in _FACTS if known.get(name) is not None}


def _entry(value: Any) -> dict[str, Any]:
    tensors = [_tensor(place, tensor) for place, tensor in values_where(is_tensor, value, Place())]
    if not tensors:
        text = repr(value)
        return {"value": text if len(text) <= _VALUE_SIZE else f"{text[: _VALUE_SIZE - 3]}..."}
    return {
        "tensors": len(tensors),
        "elements": sum(math.prod(tensor["shape"]) for tensor in tensors),
        "bytes": sum(tensor["bytes"] for tensor in tensors),
        "dtypes": list(dict.fromkeys(tensor["dtype"] for tensor in tensors)),
    }


def _tensor(place: Place, tensor: Any) -> dict[str, Any]:
    shape = list(tensor.shape)
    return {
        "key": dotted(place),
        "dtype": str(tensor.dtype)[6:],
        "shape": shape,
        "bytes": math.prod(shape) * tensor.dtype.itemsize,
    }


def lines(description: Description, name: str, with_tensors: bool) -> Iterator[str]:
    """Yield the description for a reader at a terminal."""
    facts = description.facts
    yield f"{name}: {description.kind}, {_size(description.bytes)}"
    yield f"  {', '.join(f'{fact} {value}' for fact, value in facts.items()) or 'it does not say where it is from'}"
    for key, entry in description.entries.items():
        if "value" in entry:
            yield f"  {key}: {entry['value']}"
        else:
            counts = f"{entry['tensors']} tensor{'' if entry['tensors'] == 1 else 's'}, {entry['elements']:,} elements"
            yield f"  {key}: {counts}, {_size(entry['bytes'])}, {' '.join(entry['dtypes'])}"
    if with_tensors:
        for tensor in description.tensors:
            yield f"  {tensor['key']}  {tensor['dtype']}  {tuple(tensor['shape'])}  {tensor['bytes']} bytes"


def printable(line: str) -> str:
    """A line in which a checkpoint's own words can't steer the terminal: what is not visible is spelled out."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in line
    )


def _size(count: int) -> str:
    """Bytes as people write them, in powers of 1000."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count} bytes"
