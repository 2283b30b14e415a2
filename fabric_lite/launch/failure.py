"""The first failure is the report: what is known about it, and its ten lines."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import sysconfig
import time
import traceback
from types import TracebackType
from typing import Any

__all__ = [
    "Failure",
    "describe_exception",
    "exit_status",
    "python_exit_code",
    "report",
    "user_traceback",
    "write_error_file",
]

_MAX_MESSAGE_LINES = 4
_MAX_LINE_CHARACTERS = 300


@dataclasses.dataclass(frozen=True)
class Failure:
    """The first failure of a job.

    Args:
        rank: The global rank.
        exit_code: Negative for a signal; None while the rank is still on its way out.
        details: What :func:`describe_exception` found out; None where no exception was seen.
        log: The file that holds the full traceback, where there is one.
        left: The ranks that had left without a failure before, and the user's lines at which they exited, if any.
    """

    rank: int
    exit_code: int | None = None
    details: dict[str, Any] | None = None
    log: str | None = None
    left: dict[int, dict[str, Any] | None] = dataclasses.field(default_factory=dict)


def describe_exception(error: BaseException) -> dict[str, Any]:
    """Return the exception in the layout of torchelastic's error file, with the user's line added."""
    return {
        "message": {
            "message": f"{type(error).__name__}: {error}",
            "extraInfo": {
                "py_callstack": "".join(traceback.format_exception(type(error), error, error.__traceback__)),
                "timestamp": str(int(time.time())),
                "location": _user_location(error.__traceback__),
            },
        }
    }


def write_error_file(path: str, details: dict[str, Any]) -> None:
    """Write the exception where torchelastic looks for it; what ``@record`` wrote already stays."""
    if not os.path.exists(path):
        with open(path, "w") as file:
            json.dump(details, file)


def user_traceback(trace: TracebackType | None) -> TracebackType | None:
    """Drop the frames of the launcher, which stand above the script's first line; None when there are no others."""
    start = trace
    while start is not None and start.tb_frame.f_code.co_filename.startswith(os.path.dirname(__file__)):
        start = start.tb_next
    return start


def exit_status(exit_code: int) -> int:
    """Return the shell's number for an exit code: 128 + n for signal n."""
    return exit_code if exit_code >= 0 else 128 - exit_code


def python_exit_code(error: BaseException) -> int:
    """Return what Python exits with when nobody catches this exception."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if not isinstance(error, SystemExit):
        return 1
    # What is not a number is printed, and counts as a failure; of a number the system keeps the lowest byte.
    return int(error.code) & 0xFF if isinstance(error.code, int) else int(error.code is not None)


def report(failure: Failure) -> str:
    """Return the failure in at most ten lines."""
    lines = [f"fabric-run: rank {failure.rank} failed first, {_ending(failure.exit_code)}."]
    if failure.details is not None:
        info = failure.details["message"]
        message = [line[:_MAX_LINE_CHARACTERS] for line in info["message"].splitlines() if line.strip()]
        lines += [f"  {line}" for line in message[:_MAX_MESSAGE_LINES]]
        if len(message) > _MAX_MESSAGE_LINES:
            lines.append("  ...")
        if location := info["extraInfo"].get("location"):
            lines.append(f"  at {_place(location)}")
            if location["text"]:
                lines.append(f"    {location['text'][:_MAX_LINE_CHARACTERS]}")
    if failure.left:
        lines.append(f"  {_departure(failure.left)}")
    if failure.log is not None:
        lines.append(f"  The full traceback is in {failure.log}")
    return "\n".join(lines) + "\n"


def _departure(left: dict[int, dict[str, Any] | None]) -> str:
    """Who was missing when the others still waited: the likely reason for an error inside a collective."""
    names = ", ".join(str(rank) for rank in sorted(left))
    places = sorted({_place(location) for location in left.values() if location is not None})
    where = f", at {places[0]}" if places else ""
    return f"Before it, rank{'s' * (len(left) > 1)} {names} had left with exit code 0{where}."


def _place(location: dict[str, Any]) -> str:
    return f"{location['file']}:{location['line']}, in {location['function']}"


def _ending(exit_code: int | None) -> str:
    if exit_code is None:
        return "with an exception"
    if exit_code < 0:
        try:
            name = signal.Signals(-exit_code).name
        except ValueError:
            name = f"signal {-exit_code}"  # a real-time signal has no name
        return f"killed by {name}"
    return f"exit code {exit_code}"


def _user_location(trace: TracebackType | None) -> dict[str, Any] | None:
    """The innermost line that is neither an installed package's nor the standard library's, else the innermost."""
    frames = traceback.extract_tb(trace)
    if not frames:
        return None
    own = [frame for frame in frames if _is_users(frame.filename)]
    chosen = (own or frames)[-1]
    return {"file": chosen.filename, "line": chosen.lineno, "function": chosen.name, "text": chosen.line}


def _is_users(filename: str) -> bool:
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    library = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), sys.prefix + "/lib", package]
    installed = "site-packages" in filename or "dist-packages" in filename
    return not installed and not filename.startswith("<frozen") and not filename.startswith(tuple(library))
