"""Walking nested data: containers keep their type, leaves are replaced."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["leaves", "map_leaves"]


def map_leaves(function: Callable[[Any], Any], tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Return ``tree`` with ``function`` applied to every leaf.

    Containers are dicts and other mappings, lists, tuples, namedtuples and dataclass instances, with
    their subclasses (a Hugging Face ``ModelOutput`` is a mapping); each keeps its own type, and a container
    in which no leaf changed is returned as it is. Everything else is a leaf, and so is a container for which
    ``is_leaf`` is true.
    """
    if is_leaf is not None and is_leaf(tree):
        return function(tree)
    kind = type(tree)
    if kind is dict:
        new = {key: map_leaves(function, value, is_leaf) for key, value in tree.items()}
        return new if any(new[key] is not tree[key] for key in tree) else tree
    if isinstance(tree, (list, tuple)):
        items = [map_leaves(function, value, is_leaf) for value in tree]
        if all(new is old for new, old in zip(items, tree, strict=True)):
            return tree
        return _sequence_like(tree, items)
    if isinstance(tree, Mapping):
        new = {key: map_leaves(function, value, is_leaf) for key, value in tree.items()}
        return _mapping_like(tree, new) if any(new[key] is not tree[key] for key in new) else tree
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return _dataclass_like(tree, function, is_leaf)
    return function(tree)


def leaves(tree: Any) -> Iterator[Any]:
    """Yield every leaf of ``tree``, in order, by the same rules as :func:`map_leaves`."""
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from leaves(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from leaves(getattr(tree, field.name))
    else:
        yield tree


def _sequence_like(old: Any, items: list[Any]) -> Any:
    if type(old) is list:
        return items
    if type(old) is tuple:
        return tuple(items)
    if isinstance(old, tuple):
        # A namedtuple takes its fields one by one; torch.Size and plain subclasses take an iterable.
        return type(old)(*items) if hasattr(old, "_fields") else type(old)(items)
    new = copy.copy(old)
    new[:] = items
    return new


def _mapping_like(old: Any, items: dict[Any, Any]) -> Any:
    # A copy keeps what the constructor would want again: a default factory, a ModelOutput's own fields.
    new = copy.copy(old)
    for key, value in items.items():
        new[key] = value
    return new


def _dataclass_like(old: Any, function: Callable[[Any], Any], is_leaf: Callable[[Any], bool] | None) -> Any:
    new = old
    for field in dataclasses.fields(old):
        value = getattr(old, field.name)
        mapped = map_leaves(function, value, is_leaf)
        if mapped is not value:
            new = copy.copy(old) if new is old else new
            object.__setattr__(new, field.name, mapped)  # also for frozen dataclasses
    return new
