"""Nested data keeps its containers."""

from __future__ import annotations

import collections
import dataclasses
from collections import UserDict
from typing import Any

import pytest
import torch

from fabric_lite.trees import leaves, map_leaves

Pair = collections.namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    rest: Any = None


class Items(list):
    name = "items"


TREES: list[Any] = [
    [1, (2, {"a": 3})],
    Pair(1, [2]),
    Point(1, Point(2)),
    Items([1, 2]),
    collections.defaultdict(list, a=1),
    collections.OrderedDict(b=1, a=2),
    UserDict(a=1),
    torch.Size([1, 2]),
    (),
    5,
]


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: type(tree).__name__)
def test_every_leaf_is_mapped_in_order_and_containers_keep_their_type(tree: Any) -> None:
    mapped = map_leaves(lambda leaf: leaf + 10 if isinstance(leaf, int) else leaf, tree)
    assert type(mapped) is type(tree)
    numbers = [leaf for leaf in leaves(tree) if isinstance(leaf, int)]
    assert [leaf for leaf in leaves(mapped) if isinstance(leaf, int)] == [number + 10 for number in numbers]


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: type(tree).__name__)
def test_a_tree_in_which_nothing_changed_is_returned_as_it_is(tree: Any) -> None:
    assert map_leaves(lambda leaf: leaf, tree) is tree


def test_the_old_tree_is_not_changed() -> None:
    tree = [1, {"a": Point(2)}]
    map_leaves(str, tree)
    assert tree == [1, {"a": Point(2)}]


def test_a_default_factory_survives() -> None:
    mapped = map_leaves(str, collections.defaultdict(list, a=1))
    assert mapped["new"] == []


def test_a_string_is_a_leaf() -> None:
    assert list(leaves(["ab", {"c": "de"}])) == ["ab", "de"]


def test_a_container_can_be_called_a_leaf() -> None:
    tree = [Point(1), {"a": Pair(2, 3)}]
    assert map_leaves(str, tree, lambda part: isinstance(part, Pair)) == [Point("1", "None"), {"a": str(Pair(2, 3))}]
