"""Values of a checkpoint put where the run has them: as its tensors are laid out, or straight into their memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from fabric_lite.checkpoint.layout import is_sharded, local_box
from fabric_lite.errors import CheckpointError

__all__ = ["InFile", "check_memory", "check_part", "copy_into", "laid_out_like"]


class InFile(Protocol):
    """A tensor that is still in a file; see :class:`fabric_lite.checkpoint.stored.StoredTensor`."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def check(self, offset: Sequence[int], shape: Sequence[int]) -> None: ...

    def read(self, offset: Sequence[int], shape: Sequence[int], out: torch.Tensor | None = None) -> torch.Tensor: ...

    def full(self) -> torch.Tensor: ...


def laid_out_like(saved: torch.Tensor | InFile, current: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return ``saved`` with the placements of the DTensor ``current``; whole for any other ``current``.

    Nothing is communicated. Of a tensor in a file a rank reads the part that it keeps, onto the device of ``current``.

    Args:
        saved: A tensor in memory, or in a file.
        current: What is there now.
        dtype: The dtype of what is read from a file. None: the saved one.
    """
    if not isinstance(saved, torch.Tensor):
        if is_sharded(current) and saved.shape == current.shape:
            return _own_part(saved, current, dtype)
        saved = saved.full() if dtype is None else saved.full().to(dtype)
    if not is_sharded(current):
        return saved
    from torch.distributed.tensor import Replicate, distribute_tensor

    fits = saved.shape == current.shape
    placements = current.placements if fits else [Replicate()] * current.device_mesh.ndim
    return distribute_tensor(saved, current.device_mesh, placements, src_data_rank=None)


@torch.no_grad()
def copy_into(current: Any, saved: torch.Tensor | InFile) -> None:
    """Put the values of ``saved``, of the same shape, into the memory of ``current``, a tensor or DTensor.

    Nothing is communicated, and of a tensor in a file only this rank's part is read, straight to its place.
    """
    if isinstance(saved, torch.Tensor):
        current.copy_(laid_out_like(saved, current))
        return
    if saved.shape != current.shape:  # torch takes one element for a scalar
        current.copy_(saved.full().reshape(current.shape))
        return
    local = current.to_local() if is_sharded(current) else current
    if type(local) not in (torch.Tensor, torch.nn.Parameter) or local.layout != torch.strided:
        current.copy_(laid_out_like(saved, current))
    elif local.numel():
        saved.read(*_box(current), local)


def check_memory(current: torch.Tensor, place: object) -> None:
    """Raise CheckpointError if what is at ``place`` has no memory that values could be put into."""
    if current.device.type == "meta":
        raise CheckpointError(
            f"{place} is on the meta device: it has no memory to load into.",
            given=f"shape {tuple(current.shape)}, {current.dtype}",
            fix="fabric.setup(model) before fabric.load(), or model.to_empty(device=...)",
        )


def check_part(current: Any, saved: InFile) -> None:
    """Look up where the values for ``current`` lie in their file; CheckpointError if that fails."""
    saved.check(*(_box(current) if saved.shape == current.shape else ((0,) * len(saved.shape), saved.shape)))


def _own_part(saved: InFile, current: Any, dtype: torch.dtype | None) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    local = torch.empty_like(current.to_local(), dtype=dtype or saved.dtype, requires_grad=False)
    if local.numel():
        saved.read(*_box(current), local)
    mesh, placements = current.device_mesh, current.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=current.shape, stride=current.stride())


def _box(current: Any) -> tuple[Sequence[int], Sequence[int]]:
    return local_box(current) if is_sharded(current) else ((0,) * current.dim(), current.shape)
