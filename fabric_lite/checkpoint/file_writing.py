"""Writing one file: by rank 0, of tensors that it has, or of sharded ones that come to it piece by piece."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fabric_lite.checkpoint.archive_writing import Origin, StreamedArchive, placeholder, write_archive
from fabric_lite.checkpoint.commit import committed_file
from fabric_lite.checkpoint.gathering import Gathering
from fabric_lite.checkpoint.layout import ShardPlan
from fabric_lite.checkpoint.packing import packed
from fabric_lite.checkpoint.plain import Place, tensors_in
from fabric_lite.checkpoint.remote import Target
from fabric_lite.checkpoint.together import Together, system_errors_explained
from fabric_lite.collectives import rank
from fabric_lite.trees import map_leaves

__all__ = ["write_file"]


def write_file(target: Target, content: Any, plan: ShardPlan, origin: Origin, together: Together) -> None:
    """Write a checkpoint file; every rank calls it, rank 0 writes.

    Sharded tensors take no more memory than two staging buffers, unless they have to be redistributed first
    (:func:`fabric_lite.checkpoint.layout.shard_plan`). Others that are not on the CPU, or are views of a part of their
    memory, are copied there on rank 0.

    Args:
        target: The file's name; rank 0's counts.
        content: Plain data; rank 0's is written.
        plan: Of the sharded tensors in it.
        origin: Names for the manifest.
        together: How the ranks agree.

    Raises:
        CheckpointError: The file could not be written.
    """
    if not plan.writers:
        together.on_every_rank("save()", _write_at_once, target, content, origin)
        return
    with contextlib.ExitStack() as stack:
        gathering = together.on_every_rank("save()", Gathering, plan, together)
        streamed = together.on_every_rank("save()", _opened, stack, target, content, plan)
        error: Exception | None = None
        for place, writers in plan.writers.items():
            blocks = gathering.blocks(plan.tensors[place], writers)
            if streamed is not None and error is None:
                try:
                    streamed.put(place, blocks)
                except Exception as exception:
                    error = exception
            for _ in blocks:  # the others send, whether or not it can be written
                pass
        together.on_every_rank("save()", _commit, stack, target, streamed, error, origin)


class _Streamed:
    """The file that is being written, and the placeholders in it by the places of their tensors."""

    def __init__(self, archive: StreamedArchive, placeholders: Mapping[str, torch.Tensor]) -> None:
        self.archive, self._placeholders = archive, placeholders

    def put(self, place: str, blocks: Iterable[memoryview]) -> None:
        self.archive.put(self._placeholders[place], blocks)


def _write_at_once(target: Target, content: Any, origin: Origin) -> None:
    if rank() != 0:
        return
    written = packed([tensor for _, tensor in tensors_in(content, Place())])
    content = map_leaves(lambda leaf: written[id(leaf)] if isinstance(leaf, torch.Tensor) else leaf, content)
    with system_errors_explained(target), committed_file(target) as file:
        write_archive(file, content, origin)


def _opened(stack: contextlib.ExitStack, target: Target, content: Any, plan: ShardPlan) -> _Streamed | None:
    if rank() != 0:
        return None
    leaves = [(str(place), tensor) for place, tensor in tensors_in(content, Place())]
    sharded = {place: plan.tensors[place] for place in plan.writers}
    placeholders = {place: placeholder(shard.shape, shard.dtype) for place, shard in sharded.items()}
    written = packed([tensor for place, tensor in leaves if place not in plan.tensors])
    for place, tensor in leaves:
        if place in plan.tensors:
            written[id(tensor)] = placeholders[plan.same_as.get(place, place)]
    content = map_leaves(lambda leaf: written[id(leaf)] if isinstance(leaf, torch.Tensor) else leaf, content)
    with system_errors_explained(target):
        return _Streamed(StreamedArchive(stack.enter_context(committed_file(target)), content), placeholders)


def _commit(
    stack: contextlib.ExitStack, target: Target, streamed: _Streamed | None, error: Exception | None, origin: Origin
) -> None:
    if streamed is None:
        return
    with system_errors_explained(target):
        if error is not None:
            raise error
        streamed.archive.finish(origin)
        stack.close()
