"""Calling methods of the user's callbacks by name, each with the arguments that it takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["call_hook", "has_hook"]


def has_hook(callbacks: Sequence[Any], name: str) -> bool:
    """Whether any callback has a method of that name."""
    return any(callable(getattr(callback, name, None)) for callback in callbacks)


def call_hook(callbacks: Sequence[Any], name: str, *args: Any, **kwargs: Any) -> None:
    """Call ``callback.name(*args, **kwargs)`` on each callback that has it, less the keywords that it does not take."""
    for callback in callbacks:
        method = getattr(callback, name, None)
        if callable(method):
            accepted = _keywords(getattr(method, "__func__", method))
            method(*args, **(kwargs if accepted is None else {key: kwargs[key] for key in kwargs if key in accepted}))


@functools.lru_cache(maxsize=1024)
def _keywords(function: Callable[..., Any]) -> frozenset[str] | None:
    """The names of keyword arguments that ``function`` takes; None: any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
