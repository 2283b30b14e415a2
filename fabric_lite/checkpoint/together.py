"""What fails on one rank fails on all, and the system's errors come as errors of the checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fabric_lite.collectives import raise_together
from fabric_lite.errors import CheckpointError, FabricError

__all__ = ["lost_ranks_explained", "on_every_rank", "system_errors_explained"]

Result = TypeVar("Result")


def on_every_rank(what: str, function: Callable[..., Result], *args: Any) -> Result:
    """Call ``function`` and raise on every rank if it raised on any. Every rank calls it."""
    error: Exception | None = None
    try:
        result = function(*args)
    except Exception as exception:
        error = exception
    try:
        raise_together(error, what, CheckpointError)
    except RuntimeError as raised:
        if raised is error or isinstance(raised, FabricError):
            raise
        raise _lost(what, raised) from raised
    return result


@contextlib.contextmanager
def system_errors_explained(target: Path) -> Iterator[None]:
    """Raise CheckpointError for what the system did not allow in writing ``target``."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save has both for a disk that is full
        if isinstance(error, FabricError):
            raise
        cause = _cause(error)
        raise CheckpointError(
            "The checkpoint could not be written; what was there before is as it was.",
            given=f"{target}: {type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause) else ''}",
            fix="a folder that can be written to, on a disk with room for a second copy",
        ) from error


@contextlib.contextmanager
def lost_ranks_explained(what: str) -> Iterator[None]:
    """Raise CheckpointError where ``what`` can't go on because another rank has ended."""
    try:
        yield
    except FabricError:
        raise
    except RuntimeError as error:
        raise _lost(what, error) from error


def _lost(what: str, error: RuntimeError) -> CheckpointError:
    """The error for what the backends raise when a connection was closed."""
    return CheckpointError(
        f"{what} could not go on, since the ranks lost each other; what was there before is as it was.",
        given=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
        fix="see the messages of the rank that ended first",
    )


def _cause(error: BaseException) -> BaseException:
    """The system's word behind an error: torch.save hides a full disk under "unexpected pos 704 vs 598"."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__context__
    return link or error
