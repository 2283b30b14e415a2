"""Calling methods of the user's callbacks by name, each with the arguments that it takes."""

from __future__ import annotations

import importlib
import inspect
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

from fabric_lite.errors import FabricTypeError

__all__ = ["as_callbacks", "call_hook", "has_hook", "made_by_name"]


def as_callbacks(given: Any) -> tuple[Any, ...]:
    """One callback, several in a list, or None, as a tuple.

    Raises:
        FabricTypeError: One is None, a text, a set or a generator, on which no hook would ever be called.
    """
    callbacks = tuple(given) if isinstance(given, (list, tuple)) else () if given is None else (given,)
    if wrong := [one for one in callbacks if one is None or isinstance(one, (str, set, frozenset, Generator))]:
        raise FabricTypeError(
            "A callback is an object with methods such as on_train_epoch_end.",
            given=f"callbacks={wrong[0]!r}",
            fix="callbacks=[EarlyStopping(monitor='val_loss')], from fabric_lite.callbacks, or an object of your own",
        )
    return callbacks


def made_by_name(name: str, options: Mapping[str, Any]) -> Any:
    """A callback of the class ``module:Class``, called with ``options``."""
    module, _, kind = name.partition(":")
    return getattr(importlib.import_module(module), kind)(**options)


def has_hook(callbacks: Sequence[Any], name: str) -> bool:
    """Whether any callback has a method of that name."""
    return any(callable(getattr(callback, name, None)) for callback in callbacks)


def call_hook(callbacks: Sequence[Any], name: str, *args: Any, **kwargs: Any) -> list[Any]:
    """Call ``callback.name(*args, **kwargs)`` on each callback that has it, less the arguments that it does not take.

    One that takes fewer by position gets the first of ``args``. What came by position does not come by name again.
    Returns what the methods return.
    """
    answers = []
    for callback in callbacks:
        method = getattr(callback, name, None)
        if not callable(method):
            continue
        # The function behind a bound method, which is made anew at each look-up and so would never be found again.
        is_bound = inspect.ismethod(method)
        accepted = _accepted_by(method.__func__ if is_bound else method)
        names = accepted.by_position[is_bound:]
        taken = args if accepted.any_position else args[: len(names)]
        filled = names[: len(taken)]
        own = {
            key: value
            for key, value in kwargs.items()
            if (accepted.any_name or key in accepted.by_name) and key not in filled
        }
        answers.append(method(*taken, **own))
    return answers


class _Accepted(NamedTuple):
    """The arguments that a function takes, those by position in order."""

    by_position: tuple[str, ...] = ()
    by_name: frozenset[str] = frozenset()
    any_position: bool = True
    any_name: bool = True


# Held weakly: a hook made in place, ``callback.on_train_end = lambda: ...``, often holds all that a run consists of.
_known: weakref.WeakKeyDictionary[Callable[..., Any], _Accepted] = weakref.WeakKeyDictionary()


def _accepted_by(function: Callable[..., Any]) -> _Accepted:
    try:
        accepted = _known.get(function)
        if accepted is None:
            accepted = _known[function] = _read_from(function)
    except TypeError:  # an object that has no hash, or that cannot be held weakly
        return _read_from(function)
    return accepted


def _read_from(function: Callable[..., Any]) -> _Accepted:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return _Accepted()
    kind = inspect.Parameter
    return _Accepted(
        tuple(p.name for p in parameters if p.kind in (kind.POSITIONAL_ONLY, kind.POSITIONAL_OR_KEYWORD)),
        frozenset(p.name for p in parameters if p.kind in (kind.POSITIONAL_OR_KEYWORD, kind.KEYWORD_ONLY)),
        any(p.kind is kind.VAR_POSITIONAL for p in parameters),
        any(p.kind is kind.VAR_KEYWORD for p in parameters),
    )
