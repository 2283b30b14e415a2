"""What may be in a checkpoint: only what ``torch.load(weights_only=True)`` reads back without running code."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from fabric_lite.attribute_dict import AttributeDict
from fabric_lite.checkpoint.layout import is_sharded
from fabric_lite.errors import CheckpointError, FabricTypeError

__all__ = ["Place", "Stateful", "is_stateful", "plain", "stateful_objects", "tensors_in", "values_where"]

_SCALARS = frozenset({type(None), bool, int, float, complex, str, bytes})
_LEAVES = _SCALARS | {bytearray, torch.Size, torch.dtype, torch.device, torch.layout, torch.qscheme}
# Saved as plain dicts: their extra is of no use in a file.
_DICTS = (dict, AttributeDict, collections.defaultdict)
_ORDERED = (collections.OrderedDict, collections.Counter)
_TENSORS = (torch.Tensor, torch.nn.Parameter)


@runtime_checkable
class Stateful(Protocol):
    """An object that gives its state and takes it back."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


class Place:
    """Where in the user's state a value is; shown as Python would spell it: ``state["cfg"]["path"]``."""

    # Not a dataclass, whose frozen ones take three times as long to make: each value of a state has one.
    __slots__ = ("_text", "key", "parent")

    def __init__(self, parent: Place | None = None, key: Any = None) -> None:
        self.parent = parent
        self.key = key
        self._text: str | None = None if parent is not None else "state"

    def at(self, key: Any) -> Place:
        return Place(self, key)

    def __str__(self) -> str:
        if self._text is None:
            self._text = f"{self.parent}[{_quoted(self.key)}]"
        return self._text


def _quoted(key: Any) -> str:
    if type(key) is not str:
        return repr(key)
    simple = key.isprintable() and '"' not in key and "\\" not in key
    return f'"{key}"' if simple else json.dumps(key, ensure_ascii=False)


def is_stateful(value: Any) -> bool:
    """Whether ``value`` is an object (no container, no class) with ``state_dict`` and ``load_state_dict``."""
    return not isinstance(value, (dict, list, tuple, torch.Tensor, type)) and isinstance(value, Stateful)


def stateful_objects(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    """Yield every object with a state that is nested in ``value``, with its place, in order."""
    return values_where(is_stateful, value, place)


def values_where(
    wanted: Callable[[Any], bool], value: Any, place: Place, parents: frozenset[int] = frozenset()
) -> Iterator[tuple[Place, Any]]:
    """Yield every leaf nested in ``value`` for which ``wanted`` is true, with its place, in order."""
    if id(value) in parents:
        return  # plain() says so
    if isinstance(value, dict):
        parents = parents | {id(value)}
        for key, item in value.items():
            yield from values_where(wanted, item, place.at(key), parents)
    elif isinstance(value, (list, tuple)):
        parents = parents | {id(value)}
        for index, item in enumerate(value):
            if type(item) not in _SCALARS:
                yield from values_where(wanted, item, place.at(index), parents)
    elif wanted(value):
        yield place, value


def tensors_in(value: Any, place: Place) -> Iterator[tuple[Place, torch.Tensor]]:
    """Yield every tensor nested in plain data, in the order in which it is written."""
    if isinstance(value, torch.Tensor):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_in(item, place.at(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if type(item) not in _SCALARS:
                yield from tensors_in(item, place.at(index))


def plain(value: Any, place: Place, replace: Callable[[Place, Any], Any], parents: frozenset[int] = frozenset()) -> Any:
    """Return ``value`` as data that a file may hold; containers are new, tensors are detached and not copied.

    Args:
        value: Nested data.
        place: Where it is, for the errors.
        replace: Returns what is written for an object with a state; it raises where there should be none.
        parents: The containers around ``value``, to find one that holds itself.

    Raises:
        FabricTypeError: Something in it could not be read back.
        CheckpointError: A container holds itself.
    """
    kind = type(value)
    if kind in _LEAVES:
        return value
    if isinstance(value, torch.Tensor):
        return _tensor(value, place)
    if isinstance(value, np.generic):
        number = value.item()
        return number if type(number) in _SCALARS else _refuse(value, place)
    if is_stateful(value):
        return replace(place, value)
    if id(value) in parents:
        raise CheckpointError(f"{place} holds itself.", fix="take the circle out of the state")
    parents = parents | {id(value)}
    if kind in _DICTS or kind in _ORDERED:
        items = {_key(key, place): plain(item, place.at(key), replace, parents) for key, item in value.items()}
        return _ordered_like(value, items) if kind in _ORDERED else items
    if kind is list or kind is tuple:
        if all(type(item) in _SCALARS for item in value):
            return kind(value)
        return kind(plain(item, place.at(index), replace, parents) for index, item in enumerate(value))
    if kind is set and all(type(item) in _SCALARS for item in value):
        return set(value)
    return _refuse(value, place)


def _ordered_like(value: Any, items: dict[Any, Any]) -> Any:
    new = type(value)(items)
    if "_metadata" in vars(value):
        # The version of each module's state, by which torch's modules read older files.
        new._metadata = vars(value)["_metadata"]
    return new


def _tensor(value: torch.Tensor, place: Place) -> torch.Tensor:
    if is_sharded(value):
        return value  # its part is detached: this costs less, and an asynchronous save has to be quick
    if torch.nn.parameter.is_lazy(value):
        raise FabricTypeError(
            f"{place} belongs to a lazy module that has not run yet: it has no data to save.",
            given=type(value).__name__,
            fix="one forward pass before the first checkpoint",
        )
    if value.is_meta:
        raise FabricTypeError(
            f"{place} is a meta tensor: it has no data to save.",
            given=f"shape {tuple(value.shape)}, {value.dtype}",
            fix="materialize the model first, for instance with fabric.setup(model)",
        )
    if value.is_mkldnn:
        raise FabricTypeError(
            f"{place} is an mkldnn tensor, whose memory only this machine's library can read.",
            given=f"shape {tuple(value.shape)}, {value.dtype}",
            fix="value.to_dense() in its place, or the module from before torch.utils.mkldnn.to_mkldnn",
        )
    if type(value) not in _TENSORS or value.is_nested:
        return _refuse(value, place)
    return value.detach()


def _key(key: Any, place: Place) -> Any:
    if isinstance(key, np.generic):
        key = key.item()
    if type(key) is tuple:
        return tuple(_key(part, place) for part in key)
    if type(key) in _SCALARS:
        return key
    raise FabricTypeError(
        f"A key of {place} is {_article(type(key).__name__)}, which a checkpoint can't hold: "
        "it could only be read back by running code.",
        given=f"{key!r:.80}",
        fix="a string, a number or a tuple of these as the key",
    )


_WAYS_OUT = {
    "ndarray": "torch.from_numpy(value)",
    "frozenset": "set(value)",
    "deque": "list(value)",
    "Generator": "its get_state()",
    "function": "a name by which the script finds it again",
}


def _refuse(value: Any, place: Place) -> Any:
    kind = type(value).__name__
    fix = _WAYS_OUT.get(kind, "plain values (str(value), a dict of its fields), or an object with state_dict()")
    if isinstance(value, tuple) and "_fields" in dir(value):
        fix = "value._asdict() or tuple(value)"
    elif isinstance(value, torch.Tensor):
        fix = "a plain tensor"
    elif "__fspath__" in dir(value):
        fix = "str(value)"
    raise FabricTypeError(
        f"{place} is {_article(kind)}, which a checkpoint can't hold: it could only be read back by running code.",
        given=f"{value!r:.80}",
        fix=f"{fix} in its place",
    )


def _article(word: str) -> str:
    return f"{'an' if word[:1].lower() in 'aeiou' or word == 'ndarray' else 'a'} {word}"
