"""The errors that fabric_lite raises: each is also the built-in error that a reader expects.

FabricError                       base of all; its message has three parts
├── FabricValueError              (ValueError)    an argument's value is not allowed
├── FabricTypeError               (TypeError)     an argument has the wrong type
├── FabricKeyError                (KeyError)      a key is missing
├── FabricImportError             (ImportError)   a package that this needs is not installed
└── FabricRuntimeError            (RuntimeError)  the call is right, the moment or the machine is not
    ├── LaunchError               processes could not be started as asked
    ├── StrategyError             a strategy cannot do this with this model
    ├── CollectiveError           the ranks did not agree
    └── CheckpointError           a checkpoint could not be written, read or trusted
        └── CheckpointDamagedError  it was read, and is not as it was written
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

__all__ = [
    "CheckpointDamagedError",
    "CheckpointError",
    "CollectiveError",
    "FabricError",
    "FabricImportError",
    "FabricKeyError",
    "FabricRuntimeError",
    "FabricTypeError",
    "FabricValueError",
    "LaunchError",
    "StrategyError",
]


class FabricError(Exception):
    """An error that says what went wrong, what was given, and what to do.

    Args:
        what: What went wrong, one sentence.
        given: What was given; shown with ``str``.
        fix: What to do about it, one sentence.
    """

    def __init__(self, what: str, *, given: object = None, fix: str | None = None) -> None:
        lines = [what]
        if given is not None:
            lines.append(f"  Given: {given}")
        if fix is not None:
            lines.append(f"  Try: {fix}")
        # One argument, so that the error pickles and travels between ranks unchanged.
        super().__init__("\n".join(lines))

    def __str__(self) -> str:
        # KeyError would show the repr of the message, line breaks escaped.
        return str(self.args[0])


def unknown_arguments(
    owner: str, given: Iterable[str], known: Iterable[str], instead: Mapping[str, str] | None = None
) -> FabricTypeError:
    """The error for arguments that there are not.

    Args:
        owner: Whose arguments: ``"Trainer"``.
        given: Their names.
        known: Those that there are.
        instead: For names that people know from elsewhere, what to write.
    """
    names, words = list(known), []
    for name in given:
        near = difflib.get_close_matches(name, names, n=1)
        other = (instead or {}).get(name) or (near[0] if near else None)
        words.append(f"{name}: {other}" if other else f"{name}: there is none like it")
    return FabricTypeError(f"{owner} has no such argument.", given=", ".join(given), fix="; ".join(words))


class FabricValueError(FabricError, ValueError):
    """An argument's value is not allowed."""


class FabricTypeError(FabricError, TypeError):
    """An argument has the wrong type."""


class FabricKeyError(FabricError, KeyError):
    """A key is missing."""


class FabricImportError(FabricError, ImportError):
    """A package that this needs is not installed."""


class FabricRuntimeError(FabricError, RuntimeError):
    """The call is right, but not now or not on this machine."""


class LaunchError(FabricRuntimeError):
    """Processes could not be started as asked."""


class StrategyError(FabricRuntimeError):
    """A strategy cannot do this with this model."""


class CollectiveError(FabricRuntimeError):
    """The ranks did not agree, or one of them failed."""


class CheckpointError(FabricRuntimeError):
    """A checkpoint could not be written, read or trusted."""


class CheckpointDamagedError(CheckpointError):
    """A checkpoint was read and is not as it was written, or is none; nothing that could pass by itself."""
