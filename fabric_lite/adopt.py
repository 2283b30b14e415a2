"""Extending an object in place: its class becomes a subclass made for it, all else stays.

This is what torch's own ``fully_shard`` does. The object keeps its identity, its class for ``isinstance``, its
attributes and its class name; all that is added lives in one holder in its ``__dict__`` and never shows in a
``state_dict``. Copies and pickles are plain objects of the user's class.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from fabric_lite.errors import FabricTypeError

__all__ = [
    "HOLDER",
    "Extended",
    "check_extendable",
    "deepcopy_plainly",
    "extend",
    "extension_of",
    "is_wrapped",
    "plain",
    "reduce_plainly",
    "release",
    "user_class",
]

# A name that no model of a user has: self._fabric = fabric is common.
HOLDER = "_fabric_lite_extension"

# The two ways in which the standard library pickles an object by its class; typeshed does not list them.
_NEW_OBJECT: Any = copyreg.__dict__["__newobj__"]
_RECONSTRUCT: Any = copyreg.__dict__["_reconstructor"]

Members = Callable[[type], dict[str, Any]]


class Extended:
    """The mark in the ``__mro__`` of every extended class; it hides itself from ``__init_subclass__`` registries."""

    @classmethod
    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


# Values are weak: an extended class goes when its last object has gone, and with it the key's hold on the user's class.
_classes: weakref.WeakValueDictionary[tuple[Members, tuple[type, ...]], type] = weakref.WeakValueDictionary()


def extend(target: Any, members: Members, holder: Any, mark: type = Extended) -> None:
    """Change ``target``'s class to a subclass with ``members(type(target))`` and keep ``holder`` in the object.

    Args:
        target: Any object with a ``__dict__`` whose class allows ``__class__`` assignment.
        members: Called once per class of the user with that class; returns what the subclass defines. A module-level
            function, since it is the key under which the subclass is kept.
        holder: All state of the extension; found again with :func:`extension_of`.
        mark: A base of the subclass that has no ``__slots__``, swallows ``__init_subclass__``, and, where the user's
            class has a layout of its own, is one of that class's bases.

    Raises:
        FabricTypeError: The class cannot be extended (a scripted module, a class with ``__slots__``).
    """
    kind = type(target)
    try:
        try:
            target.__class__ = _extended_class(kind, members, (mark, kind))
        except TypeError:
            # A class whose first base is Generic or an ABC has another layout with the mark first.
            target.__class__ = _extended_class(kind, members, (kind, mark))
    except TypeError as error:
        raise FabricTypeError(
            f"An object of class {kind.__name__} cannot be extended in place.",
            given=f"{kind.__module__}.{kind.__qualname__}: {error}",
            fix="set up the plain Python object: the module before torch.jit.script, the class without __slots__",
        ) from error
    target.__dict__[HOLDER] = holder


def check_extendable(target: Any, members: Members, mark: type = Extended) -> None:
    """Raise what :func:`extend` would raise; the object stays as it is."""
    if extension_of(target) is None:
        extend(target, members, None, mark)
        release(target)


def extension_of(target: Any) -> Any:
    """Return the holder given to :func:`extend`, or None if ``target`` is not extended."""
    return getattr(target, "__dict__", {}).get(HOLDER)


def is_wrapped(target: Any) -> bool:
    """Whether ``target`` went through ``setup`` and was not released."""
    return extension_of(target) is not None


def release(target: Any) -> Any:
    """Take the extension off; returns the holder. The object is what it was before :func:`extend`."""
    holder = target.__dict__.pop(HOLDER, None)
    target.__class__ = user_class(type(target))
    return holder


@contextlib.contextmanager
def plain(target: Any) -> Iterator[Any]:
    """Take the extension off for the length of the block: for copies, pickles, scripting and export."""
    extended = type(target)
    if user_class(extended) is extended:
        yield target
        return
    holder = release(target)
    try:
        yield target
    finally:
        target.__class__ = extended
        if holder is not None:  # an object that the user's code made by self.__class__(...) has none
            target.__dict__[HOLDER] = holder


def user_class(kind: type) -> type:
    """The user's own class behind an extended one; any other class is returned as it is."""
    return kind.__dict__.get("_fabric_lite_extends", kind)


def _extended_class(kind: type, members: Members, bases: tuple[type, ...]) -> type:
    extended = _classes.get((members, bases))
    if extended is None:
        namespace = {
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
            "_fabric_lite_extends": kind,
            "__reduce_ex__": reduce_plainly,
            "__deepcopy__": deepcopy_plainly,
            **members(kind),
        }
        # The mark first, so that the user's __init_subclass__ does not run; type.__new__ with the user's metaclass,
        # so that the metaclass's own __new__ and __init__ (registries) do not run.
        metaclass: Any = type(kind)
        extended = _classes[members, bases] = type.__new__(metaclass, kind.__name__, bases, namespace)
    return extended


def reduce_plainly(self: Any, protocol: Any) -> Any:
    """Pickle as the user's class, by its own ``__reduce_ex__``, ``__reduce__`` and ``__getstate__``."""
    with plain(self):
        reduced = self.__reduce_ex__(protocol)
        if isinstance(reduced, str):  # the name of a global
            return reduced
        # The state may be the live __dict__, which gets the holder back when this block ends.
        function, arguments, *rest = (dict(part) if part is self.__dict__ else part for part in reduced)
        if function is _NEW_OBJECT:
            # pickle compares this form's class with the object's, which is the extended one.
            kind, *more = arguments
            function, arguments = (kind.__new__, (kind, *more)) if more else (_RECONSTRUCT, (kind, object, None))
        return (function, arguments, *rest)


def deepcopy_plainly(self: Any, memo: dict[int, Any]) -> Any:
    """Copy as the user's class, by its own ``__deepcopy__`` where it has one."""
    with plain(self):
        return copy.deepcopy(self, memo)
