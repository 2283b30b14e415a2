"""The state as a manifest describes it: encoded, its tensors numbered and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from fabric_lite.checkpoint.part_writing import dtype_name
from fabric_lite.checkpoint.plain import Place, values_where
from fabric_lite.checkpoint.plain_json import encode
from fabric_lite.checkpoint.stored import is_tensor
from fabric_lite.errors import FabricTypeError

__all__ = ["Contents", "Numbered", "dotted"]


@dataclasses.dataclass(frozen=True)
class Numbered:
    """One tensor of the checkpoint: its name in the parts, its dtype and whole shape, and what stands in the state."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    value: Any


class Contents:
    """The state as rank 0 describes it: encoded, its tensors numbered; tied ones have one number.

    Args:
        content: Plain data with tensors, or with StoredTensors.
        sharded: By ``str`` of its place, the place of the sharded tensor whose number to take: itself or an earlier.

    Raises:
        FabricTypeError: A tensor is of a kind that a folder can't hold.
    """

    def __init__(self, content: Any, sharded: Mapping[str, str] | None = None) -> None:
        self.tensors: list[Numbered] = []
        self._sharded = sharded or {}
        # In order: one tensor may stand in several places.
        self._places_of: dict[int, list[Place]] = {}
        for place, leaf in values_where(is_tensor, content, Place()):
            self._places_of.setdefault(id(leaf), []).append(place)
        self._number_of: dict[Any, int] = {}
        self._number_at: dict[str, int] = {}
        self._met: list[tuple[Place, Any]] = []
        self._names: set[str] = set()
        self.encoded = encode(content, self._number)

    @property
    def sharded_numbers(self) -> set[int]:
        """The numbers of the sharded tensors."""
        return set(self._number_at.values())

    def numbers_and_names(self) -> dict[str, tuple[int, str]]:
        """Number and name of each sharded tensor, by its place."""
        return {at: (number, self.tensors[number].name) for at, number in self._number_at.items()}

    def number_of(self, tensor: Any) -> int:
        """The number of a tensor that stands in the content."""
        return self._number_of[_identity(tensor)]

    def other_names(self) -> dict[str, str]:
        """For tied tensors: the names of the other places, each with the name that the tensor has."""
        places = {dotted(place): self._number_of[identity] for place, identity in self._met}
        own = {tensor.name for tensor in self.tensors}
        return {name: self.tensors[number].name for name, number in places.items() if name not in own}

    def _number(self, tensor: Any) -> int:
        if not is_tensor(tensor):  # of a file that something else wrote
            raise FabricTypeError(
                "A checkpoint folder can't hold this value.", given=f"{type(tensor).__name__} {tensor!r:.80}"
            )
        places = self._places_of.get(id(tensor))
        place = places.pop(0) if places else None
        at = self._sharded.get(str(place))
        identity = _identity(tensor) if at is None else at
        if place is not None:
            self._met.append((place, identity))
        if identity in self._number_of:
            return self._number_of[identity]
        number = self._number_of[identity] = len(self.tensors)
        if at is not None:
            self._number_at[at] = number
        # The parts of a sparse tensor have no place of their own.
        name = dotted(place) if place is not None else f"part.{number}"
        what = str(place) if place is not None else "A part of a tensor"
        self.tensors.append(
            Numbered(self._free_name(name), dtype_name(tensor.dtype, what), tuple(tensor.shape), tensor)
        )
        return number

    def _free_name(self, name: str) -> str:
        name = name.encode("utf-8", "backslashreplace").decode()
        free, count = name, 1
        while free in self._names or free == "__metadata__":
            free, count = f"{name}~{count}", count + 1
        self._names.add(free)
        return free


def dotted(place: Place) -> str:
    """The keys of a place, joined: ``model.0.weight`` for ``state["model"]["0.weight"]``."""
    if place.parent is None or place.parent.parent is None:
        return "state" if place.parent is None else str(place.key)
    return f"{dotted(place.parent)}.{place.key}"


def _identity(tensor: Any) -> Any:
    """Equal for tensors that are the same elements of the same memory, or of the same bytes of a file."""
    if isinstance(tensor, torch.Tensor):
        view = tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
        return tensor.untyped_storage()._cdata, *view, tensor.is_conj(), tensor.is_neg()
    if tensor.storage is not None and tensor.storage.bytes:
        return tensor.storage, tuple(tensor.shape), tensor.stride, tensor.dtype
    return id(tensor)
