"""Writing a folder: every rank writes its own shards, rank 0 the plain tensors and, last, the manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fabric_lite.checkpoint.archive_writing import Origin, own_version
from fabric_lite.checkpoint.commit import committed_folder
from fabric_lite.checkpoint.contents import Contents
from fabric_lite.checkpoint.layout import ShardPlan
from fabric_lite.checkpoint.manifest import FORMAT, MANIFEST, Chunk, Manifest, Part, TensorEntry, part_name
from fabric_lite.checkpoint.part_writing import Piece, write_part
from fabric_lite.checkpoint.remote import Folder, Target
from fabric_lite.checkpoint.together import Together, system_errors_explained
from fabric_lite.collectives import rank, world_size
from fabric_lite.errors import CheckpointError
from fabric_lite.movement import busy

__all__ = ["manifest_of", "write_folder"]


def write_folder(target: Target, content: Any, plan: ShardPlan, origin: Origin, together: Together) -> None:
    """Write a checkpoint folder; every rank calls it.

    A rank needs no more memory than one staging buffer: it writes from the tensors' own memory where that is in order.
    Only tensors that have to be redistributed (:func:`fabric_lite.checkpoint.layout.shard_plan`) are copied before.

    Args:
        target: The folder's name; rank 0's counts.
        content: Plain data; rank 0's is written.
        plan: Of the sharded tensors in it.
        origin: Names for the manifest.
        together: How the ranks agree.

    Raises:
        FabricTypeError: A tensor is of a kind that a folder can't hold; nothing was written.
        CheckpointError: The folder could not be written.
    """
    contents = together.on_every_rank("save()", _contents, content, plan)
    numbers = together.broadcast(contents and contents.numbers_and_names())
    own = _own_shards(plan, numbers)
    if contents is not None:
        own += _plain_tensors(contents)
    with contextlib.ExitStack() as stack:
        folder = together.broadcast(together.on_every_rank("save()", _opened, stack, target))
        written = together.on_every_rank("save()", _write_own_part, folder, own, target)
        parts = together.gather(written)
        together.on_every_rank("save()", _commit, stack, folder, contents, parts, origin, target)


def manifest_of(
    contents: Contents, parts: Mapping[str, Part], chunks: list[tuple[int, Chunk]], origin: Origin
) -> Manifest:
    """Put together what is written last.

    Raises:
        CheckpointError: The chunks are not exactly the tensors.
    """
    by_number: list[list[Chunk]] = [[] for _ in contents.tensors]
    for number, chunk in chunks:
        by_number[number].append(chunk)
    entries = [
        TensorEntry(tensor.dtype, tensor.shape, tuple(held))
        for tensor, held in zip(contents.tensors, by_number, strict=True)
    ]
    manifest = Manifest(
        format=FORMAT,
        fabric_lite=own_version(),
        torch=str(torch.__version__),
        world_size=origin.get("world_size") or world_size(),
        strategy=origin.get("strategy"),
        precision=origin.get("precision"),
        content=contents.encoded,
        tensors=tuple(entries),
        parts=dict(parts),
    )
    # As a reader would: boxes that leave a gap or overlap are found now, while the old checkpoint is still there.
    manifest.check(Path(MANIFEST))
    return manifest


@dataclasses.dataclass(frozen=True)
class _Own:
    """One box that this rank writes: of which tensor, from which element on, and the data."""

    number: int
    offset: tuple[int, ...]
    piece: Piece


@dataclasses.dataclass(frozen=True)
class _WrittenPart:
    """What one rank wrote; None where it had nothing to write."""

    name: str
    part: Part
    chunks: list[tuple[int, Chunk]]


def _contents(content: Any, plan: ShardPlan) -> Contents | None:
    if rank() != 0:
        return None
    return Contents(content, {place: place for place in plan.writers} | plan.same_as)


def _own_shards(plan: ShardPlan, numbers: Mapping[str, tuple[int, str]]) -> list[_Own]:
    own = []
    for place, writers in plan.writers.items():
        number, name = numbers[place]
        for (offset, shape), writer in writers.items():
            if writer == rank():
                local = plan.tensors[place].local
                own.append(_Own(number, offset, Piece(name, local.dtype, shape, functools.partial(_itself, local))))
    return own


def _plain_tensors(contents: Contents) -> list[_Own]:
    own = []
    for number, tensor in enumerate(contents.tensors):
        if number not in contents.sharded_numbers and tensor.value.numel() > 0:
            piece = Piece(tensor.name, tensor.value.dtype, tensor.shape, functools.partial(_itself, tensor.value))
            own.append(_Own(number, (0,) * len(tensor.shape), piece))
    return own


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _opened(stack: contextlib.ExitStack, target: Target) -> Folder | None:
    if rank() != 0:
        return None
    with system_errors_explained(target):
        return stack.enter_context(committed_folder(target))


def _write_own_part(folder: Folder, own: list[_Own], target: Target) -> _WrittenPart | None:
    if not folder.is_dir():
        raise CheckpointError(
            f"Rank {rank()} does not see the folder that rank 0 has made.",
            given=folder,
            fix='a folder on a file system that all nodes share, or state_dict_type="full"',
        )
    if not own:
        return None
    name = part_name(rank())
    with system_errors_explained(target), (folder / name).open("xb") as file:
        header, written = write_part(file, [one.piece for one in own])
        file.flush()
        with busy():
            os.fsync(file.fileno())
        size = file.tell()
    chunks = [
        (one.number, Chunk(name, one.piece.name, one.offset, one.piece.shape, data.begin, data.end, data.crc32))
        for one, data in zip(own, written, strict=True)
    ]
    return _WrittenPart(name, Part(size, header), chunks)


def _commit(
    stack: contextlib.ExitStack,
    folder: Folder,
    contents: Contents | None,
    parts: list[_WrittenPart | None],
    origin: Origin,
    target: Target,
) -> None:
    if contents is None:
        return
    written = [part for part in parts if part is not None]
    chunks = [chunk for part in written for chunk in part.chunks]
    with system_errors_explained(target):
        manifest_of(contents, {part.name: part.part for part in written}, chunks, origin).write(folder)
        stack.close()
