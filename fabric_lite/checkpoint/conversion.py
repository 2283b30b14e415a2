"""One kind of checkpoint made into another, one tensor in memory at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fabric_lite.checkpoint.archive_writing import Origin, StreamedArchive, own_version, placeholder
from fabric_lite.checkpoint.commit import committed_file, committed_folder
from fabric_lite.checkpoint.contents import Contents, Numbered
from fabric_lite.checkpoint.flat import metadata_for
from fabric_lite.checkpoint.folder_writing import manifest_of
from fabric_lite.checkpoint.formats import opened
from fabric_lite.checkpoint.inspection import about
from fabric_lite.checkpoint.manifest import Chunk, Part, part_name
from fabric_lite.checkpoint.packing import packed
from fabric_lite.checkpoint.part_writing import Blocks, Piece, write_part
from fabric_lite.checkpoint.plain import Place, values_where
from fabric_lite.checkpoint.stored import StoredTensor, is_tensor
from fabric_lite.checkpoint.together import system_errors_explained
from fabric_lite.errors import FabricKeyError, FabricValueError
from fabric_lite.trees import map_leaves

__all__ = ["KINDS", "convert", "kind_for"]

KINDS = ("folder", "file", "safetensors")


def kind_for(destination: str) -> str:
    """The kind of checkpoint that a name asks for: by its ending, a folder if it has none."""
    if destination.endswith(".safetensors"):
        return "safetensors"
    if destination.endswith(("/", os.sep)) or not Path(destination).suffix:
        return "folder"
    return "file"


def convert(source: Path, destination: Path, kind: str, *, key: str | None = None, force: bool = False) -> None:
    """Write what is in ``source`` as another kind of checkpoint; the tensors are read one by one.

    Args:
        source: Any kind of checkpoint that ``fabric.load`` reads. It is compared with its checksums first.
        destination: Its new name.
        kind: "folder", "file" or "safetensors".
        key: One of the top keys: only what is there is written, without the key.
        force: Whether a checkpoint that is there already is replaced.

    Raises:
        FabricValueError: There is something at ``destination``, and not ``force``.
        FabricKeyError: The checkpoint does not have ``key``.
        FabricTypeError: A tensor is of a kind that a folder or a safetensors file can't hold.
        CheckpointError: ``source`` is damaged, or the new one could not be written.
    """
    if os.path.lexists(destination) and not force:
        raise FabricValueError(
            "There is something at the destination already.", given=destination, fix="another name, or --force"
        )
    checkpoint = opened(source)
    checkpoint.verify()
    origin = about(source, checkpoint)
    content = _part_of(checkpoint.content(), key)
    write = {"folder": _write_folder, "file": _write_file, "safetensors": _write_flat}[kind]
    with system_errors_explained(destination):
        write(destination, content, origin)


def _part_of(content: Any, key: str | None) -> Any:
    if key is None:
        return content
    if not isinstance(content, dict) or key not in content:
        keys = ", ".join(map(repr, content)) if isinstance(content, dict) else f"no dict but a {type(content).__name__}"
        raise FabricKeyError(f"The checkpoint does not have {key!r}.", given=keys, fix="one of its keys")
    return content[key]


def _write_folder(destination: Path, content: Any, origin: Origin) -> None:
    contents = Contents(content)
    with committed_folder(destination) as folder:
        numbered = [(number, tensor) for number, tensor in enumerate(contents.tensors) if 0 not in tensor.shape]
        parts, chunks = {}, []
        if numbered:
            name = part_name(0)
            with (folder / name).open("xb") as file:
                header, written = write_part(file, [_piece(tensor) for _, tensor in numbered])
                file.flush()
                os.fsync(file.fileno())
                parts[name] = Part(file.tell(), header)
            for (number, tensor), data in zip(numbered, written, strict=True):
                box = (0,) * len(tensor.shape), tensor.shape
                chunks.append((number, Chunk(name, tensor.name, *box, data.begin, data.end, data.crc32)))
        manifest_of(contents, parts, chunks, origin).write(folder)


def _write_flat(destination: Path, content: Any, origin: Origin) -> None:
    contents = Contents(content)
    header = {"fabric_lite": own_version(), "torch": str(torch.__version__), **origin}
    with committed_file(destination) as file:
        write_part(file, [_piece(tensor) for tensor in contents.tensors], metadata_for(contents, header))


def _write_file(destination: Path, content: Any, origin: Origin) -> None:
    tensors = Contents(content)
    stored = [leaf for _, leaf in values_where(is_tensor, content, Place()) if isinstance(leaf, StoredTensor)]
    places: dict[int, torch.Tensor] = {}
    written: dict[int, Any] = packed([leaf for _, leaf in values_where(_is_in_memory, content, Place())])
    sources: dict[int, StoredTensor] = {}
    for leaf in stored:
        number = tensors.number_of(leaf)
        if number not in places:
            places[number], sources[number] = placeholder(tuple(leaf.shape), leaf.dtype), leaf
        written[id(leaf)] = places[number]
    framed = map_leaves(lambda leaf: written[id(leaf)] if is_tensor(leaf) else leaf, content, is_tensor)
    with committed_file(destination) as file:
        archive, blocks = StreamedArchive(file, framed), Blocks()
        for number, place in places.items():
            archive.put(place, blocks.of(sources[number].full().contiguous()))
        archive.finish(origin)


def _is_in_memory(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _piece(tensor: Numbered) -> Piece:
    value = tensor.value
    return Piece(
        tensor.name, value.dtype, tensor.shape, value.full if isinstance(value, StoredTensor) else lambda: value
    )
