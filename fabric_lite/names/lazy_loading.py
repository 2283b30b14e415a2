"""Checkpoints whose tensors are read when they are used."""

from __future__ import annotations

from typing import Any

import torch

from fabric_lite.checkpoint.formats import opened
from fabric_lite.checkpoint.saving import checked_path
from fabric_lite.checkpoint.stored import StoredTensor
from fabric_lite.trees import map_leaves

__all__ = ["NotYetLoadedTensor", "lazy_load"]


class NotYetLoadedTensor:
    """A tensor in a file, which any function of torch reads.

    Args:
        stored: Where it is.
    """

    def __init__(self, stored: StoredTensor) -> None:
        self._stored = stored

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        return self._stored.shape

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self._stored.dtype

    def _load_tensor(self) -> torch.Tensor:
        """Read it, onto the CPU."""
        return self._stored.full()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Read those of the arguments that are not loaded yet, in lists too."""
        return func(*map_leaves(_loaded, args), **map_leaves(_loaded, kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_stored":  # copying asks for these of an object that is not made yet
            raise AttributeError(name)
        return getattr(self._load_tensor(), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._load_tensor()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"NotYetLoadedTensor({self._stored!r})"


def lazy_load(filename: Any) -> Any:
    """What is in a checkpoint, with a :class:`NotYetLoadedTensor` for each tensor; runs no code.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    content = opened(checked_path(filename)).content()
    return map_leaves(lambda leaf: NotYetLoadedTensor(leaf) if _is_stored(leaf) else leaf, content, _is_stored)


def _is_stored(value: Any) -> bool:
    return isinstance(value, StoredTensor)


def _loaded(value: Any) -> Any:
    return value._load_tensor() if isinstance(value, NotYetLoadedTensor) else value
