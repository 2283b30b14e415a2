"""Calling methods of the user's callbacks by name, each with the arguments that it takes."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["call_hook", "has_hook", "made_by_name"]


def made_by_name(name: str, options: Mapping[str, Any]) -> Any:
    """A callback of the class ``module:Class``, called with ``options``."""
    module, _, kind = name.partition(":")
    return getattr(importlib.import_module(module), kind)(**options)


def has_hook(callbacks: Sequence[Any], name: str) -> bool:
    """Whether any callback has a method of that name."""
    return any(callable(getattr(callback, name, None)) for callback in callbacks)


def call_hook(callbacks: Sequence[Any], name: str, *args: Any, **kwargs: Any) -> None:
    """Call ``callback.name(*args, **kwargs)`` on each callback that has it, less the arguments that it does not take.

    Of the arguments given by position, these are the last ones.
    """
    for callback in callbacks:
        method = getattr(callback, name, None)
        if not callable(method):
            continue
        # The function behind a bound method, which is made anew at each look-up and so would never be found again.
        is_bound = inspect.ismethod(method)
        count, names = _accepted(method.__func__ if is_bound else method)
        taken = args if count is None else args[: count - is_bound]
        method(*taken, **(kwargs if names is None else {key: kwargs[key] for key in kwargs if key in names}))


@functools.lru_cache(maxsize=1024)
def _accepted(function: Callable[..., Any]) -> tuple[int | None, frozenset[str] | None]:
    """How many arguments ``function`` takes by position, and the names of those by keyword; None: any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return None, None
    kinds = [parameter.kind for parameter in parameters]
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    count = None if inspect.Parameter.VAR_POSITIONAL in kinds else sum(kind in by_position for kind in kinds)
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return count, None
    return count, frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
