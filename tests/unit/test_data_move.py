"""Batches come on the device in the containers they were made in."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fabric_lite.data import move_to_device

CPU, META = torch.device("cpu"), torch.device("meta")

Pair = collections.namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass(frozen=True)
class Sample:
    image: torch.Tensor
    label: int
    parts: tuple[torch.Tensor, ...] = ()


class Holder:
    """Has a ``.to`` that returns a new object."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def to(self, device: torch.device) -> Holder:
        return Holder(device)


class InPlace:
    device = CPU

    def to(self, device: torch.device) -> None:
        self.device = device


def tensor() -> torch.Tensor:
    return torch.ones(2)


BATCHES: list[Any] = [
    tensor(),
    (tensor(), 3),
    [tensor(), "text"],
    {"x": tensor(), "n": None},
    Pair(tensor(), 1),
    Sample(tensor(), 1, (tensor(),)),
    collections.OrderedDict(x=[tensor()]),
    collections.defaultdict(list, x=(tensor(),)),
    [{"x": Pair(Sample(tensor(), 0), tensor())}],
    (),
    None,
]


def tensors_in(data: Any) -> list[torch.Tensor]:
    if isinstance(data, torch.Tensor):
        return [data]
    if isinstance(data, Sample):
        data = vars(data)
    items = data.values() if isinstance(data, dict) else data if isinstance(data, (list, tuple)) else []
    return [tensor for item in items for tensor in tensors_in(item)]


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: type(batch).__name__)
def test_every_tensor_moves_and_every_container_keeps_its_type(batch: Any) -> None:
    moved = move_to_device(batch, "meta")  # a name will do
    assert type(moved) is type(batch)
    assert len(tensors_in(moved)) == len(tensors_in(batch))
    assert all(tensor.device == META for tensor in tensors_in(moved))
    assert all(tensor.device == CPU for tensor in tensors_in(batch)), "the user's batch stays as it was"


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: type(batch).__name__)
def test_what_is_there_already_is_not_copied(batch: Any) -> None:
    assert move_to_device(batch, CPU) is batch


def test_objects_with_a_to_method_are_moved() -> None:
    moved = move_to_device({"holder": Holder(CPU), "in place": InPlace()}, META)
    assert moved["holder"].device == META
    assert moved["in place"].device == META


CONTAINERS: dict[str, Any] = {
    "tuple": lambda leaf: (leaf,),
    "namedtuple": lambda leaf: Pair(leaf, 1),
    "dataclass": lambda leaf: Sample(leaf, 1),
    "mapping": lambda leaf: collections.OrderedDict(x=[leaf]),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_packed_sequence_moves_by_its_own_rules(container: str) -> None:
    moved = move_to_device(CONTAINERS[container](pack_sequence([torch.ones(2), torch.ones(1)])), META)
    packed = next(leaf for leaf in leaves_until_packed(moved) if isinstance(leaf, PackedSequence))
    assert packed.data.device == META
    assert packed.batch_sizes.device == CPU


def leaves_until_packed(data: Any) -> list[Any]:
    if isinstance(data, Sample):
        data = vars(data)
    items = data.values() if isinstance(data, dict) else data if isinstance(data, (list, tuple)) else None
    if items is None or isinstance(data, PackedSequence):
        return [data]
    return [leaf for item in items for leaf in leaves_until_packed(item)]
