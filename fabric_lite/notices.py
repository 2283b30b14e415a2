"""What is said to the user: one line, once, on rank 0."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from fabric_lite.collectives import rank

__all__ = ["rank_zero_info", "rank_zero_only", "rank_zero_warn"]

Function = TypeVar("Function", bound=Callable[..., Any])

_said: set[str] = set()


def rank_zero_only(function: Function) -> Function:
    """Let ``function`` run on rank 0 only; on every other rank it returns None."""

    @functools.wraps(function)
    def on_rank_zero(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if rank() == 0 else None

    return on_rank_zero  # type: ignore[return-value]


def rank_zero_info(message: str) -> None:
    """Write ``message`` to standard error on rank 0, the same text once per process."""
    if rank() == 0 and message not in _said:
        _said.add(message)
        print(f"fabric_lite: {message}", file=sys.stderr, flush=True)


@rank_zero_only
def rank_zero_warn(message: str, category: type[Warning] = UserWarning, stacklevel: int = 3) -> None:
    """``warnings.warn`` on rank 0 only."""
    warnings.warn(message, category, stacklevel=stacklevel + 1)
