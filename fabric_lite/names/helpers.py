"""Functions that programs for Lightning Fabric import."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from fabric_lite.checkpoint.together import on_every_rank
from fabric_lite.collectives import broadcast_object, gather_objects, rank, world_size
from fabric_lite.errors import FabricImportError, FabricTypeError

__all__ = [
    "Optimizable",
    "get_filesystem",
    "is_shared_filesystem",
    "materialize_meta_tensors",
    "suggested_max_num_workers",
    "unwrap_objects",
]


@runtime_checkable
class Optimizable(Protocol):
    """What is used like an optimizer."""

    param_groups: list[dict[Any, Any]]
    defaults: dict[Any, Any]
    state: Any

    def state_dict(self) -> dict[str, Any]:
        """Its state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""


def is_shared_filesystem(strategy: Any = None, path: Any = None, timeout: int | None = None) -> bool:
    """Whether all ranks see one folder, found out with a file that rank 0 makes there; every rank calls.

    Args:
        strategy: Not needed here.
        path: The folder; None: the current one. A name in a store (``s3://...``) is shared.
        timeout: Not needed here: the file is there, on the disk, before the others look.

    Raises:
        OSError: Rank 0 could not write there; CheckpointError on the others.
    """
    del strategy, timeout
    if world_size() == 1 or (path is not None and "://" in str(path)):
        return True
    folder = Path(path or ".").resolve()
    name = broadcast_object(f".fabric_lite_shared_{secrets.token_hex(8)}")
    mark = folder / name
    try:
        on_every_rank("is_shared_filesystem()", lambda: _write(mark) if rank() == 0 else None)
        # Listed, since what a network file system was asked for before it keeps as absent for a while.
        return all(gather_objects(folder.is_dir() and name in os.listdir(folder)))
    finally:
        if rank() == 0:
            mark.unlink(missing_ok=True)


def _write(mark: Path) -> None:
    with mark.open("xb") as file:
        os.fsync(file.fileno())


def suggested_max_num_workers(local_world_size: int) -> int:
    """How many loader workers each of so many ranks on this machine can have: a core for each, and one for the rank."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size - 1)


def get_filesystem(path: Any, **options: Any) -> Any:
    """The fsspec file system of a path or URL.

    Raises:
        FabricImportError: fsspec is not installed.
    """
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    except ImportError as error:
        raise FabricImportError(
            "File systems of stores need fsspec.", given=path, fix="pip install 'fabric-lite[remote]'"
        ) from error
    return url_to_fs(str(path), **options)[0]


def materialize_meta_tensors(module: nn.Module, device: torch.device) -> None:
    """Give what is on the meta device memory on ``device``, and its first values by ``reset_parameters()``."""
    for part in module.modules():
        own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in own):
            part.to_empty(device=device, recurse=False)
            reset = getattr(part, "reset_parameters", None)
            if not callable(reset):
                raise FabricTypeError(
                    "A module on the meta device gives its tensors their first values by reset_parameters().",
                    given=f"{type(part).__name__} without such a method",
                    fix="fabric.init_module(empty_init=True), which needs none",
                )
            reset()


def unwrap_objects(collection: Any) -> Any:
    """The collection as it is: what was set up is the user's own object."""
    return collection
