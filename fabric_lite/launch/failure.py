"""The first failure is the report: what is known about it, and its ten lines."""

from __future__ import annotations

import dataclasses
import json
import linecache
import os
import re
import signal
import time
import traceback
from types import TracebackType
from typing import Any

from fabric_lite.call_site import is_users, names_of

__all__ = [
    "Failure",
    "describe_exception",
    "ending",
    "exit_status",
    "line_of",
    "python_exit_code",
    "remedy",
    "report",
    "summary",
    "user_traceback",
    "write_error_file",
]

_MAX_LINES = 10
_MAX_LINE_CHARACTERS = 300
_FAULT_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Failure:
    """The first failure of a job.

    Args:
        rank: The global rank.
        exit_code: Negative for a signal.
        log: The rank's file, which holds its full traceback where there is one.
        details: What :func:`describe_exception` found out; None where no exception was seen.
        is_exit: Whether the exception was the rank's own SystemExit.
        hang: The report of a job that hangs, found by this rank; empty for any other failure.
        time: When, by the clock that all processes of the machine share; infinite for ranks that are only ended
            because those of another node have failed.
        preempted: The ranks that had saved their work and left before, because they were asked to.
        log_start: Where in the log this attempt begins, in bytes.
        is_after_kill: Whether we had killed the ranks before, so that SIGKILL is no failure of this one's.
        left: The ranks that had left without a failure before, and the user's lines at which they exited, if any.
    """

    rank: int
    exit_code: int
    log: str
    details: dict[str, Any] | None = None
    is_exit: bool = False
    hang: tuple[str, ...] = ()
    time: float = 0.0
    preempted: tuple[int, ...] = ()
    log_start: int = 0
    is_after_kill: bool = False
    left: dict[int, dict[str, Any] | None] = dataclasses.field(default_factory=dict)

    @property
    def exception(self) -> str | None:
        """The name of the exception's type; None where none was seen."""
        return None if self.details is None else str(self.details["message"]["message"]).partition(":")[0]


def describe_exception(error: BaseException) -> dict[str, Any]:
    """Return the exception in the layout of torchelastic's error file, with the user's line added."""
    return {
        "message": {
            "message": ": ".join(filter(None, (type(error).__name__, str(error)))),
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
    """Return the failure in at most ten lines; rank and cause are in the first."""
    if failure.hang:
        lines = [line[:_MAX_LINE_CHARACTERS] for line in failure.hang[: _MAX_LINES - 1]]
        return "\n".join([*lines, _where_logs_are(failure)]) + "\n"
    lines = []
    if location := _location(failure):
        lines.append(f"  at {_place(location)}")
        if location["text"]:
            lines.append(f"    {location['text'][:_MAX_LINE_CHARACTERS]}")
    if failure.exit_code == -signal.SIGKILL:
        lines.append("  Perhaps the machine ran out of memory: see the system's log.")
    if failure.left:
        lines.append(f"  {_departure(failure.left)}")
    if failure.preempted:
        lines.append(f"  Before it, {names_of(failure.preempted)} had left for preemption.")
    lines.append(_where_logs_are(failure))
    cause, *more = _cause(failure, _MAX_LINES - len(lines))
    lines[:0] = [f"fabric-run: rank {failure.rank} failed: {cause}", *(f"  {line}" for line in more)]
    return "\n".join(lines) + "\n"


def summary(failure: Failure) -> str:
    """Return rank and cause in one line."""
    if failure.hang:
        return failure.hang[0].removeprefix("fabric-run: ")[:_MAX_LINE_CHARACTERS]
    return f"rank {failure.rank} failed: {_cause(failure, _MAX_LINES)[0]}"


def remedy(failure: Failure) -> str:
    """Return what an error of this package says of what was given and what to try, in one line; empty for others."""
    lines = [line.strip() for line in _cause(failure, _MAX_LINES)[1:]]
    return "; ".join(line for line in lines if line.startswith(("Given: ", "Try: ")))


def line_of(failure: Failure) -> str | None:
    """Return the name of the file and the number of the user's line, ``train.py:12``; None where it is not known."""
    location = _location(failure)
    return None if location is None else f"{os.path.basename(location['file'])}:{location['line']}"


def _cause(failure: Failure, most: int) -> list[str]:
    """What the rank died of, in at most ``most`` lines."""
    if failure.details is None:
        return [ending(failure.exit_code)]
    message = failure.details["message"]["message"]
    if failure.is_exit:
        message = message.removeprefix("SystemExit: ")
        if message.lstrip("-").isdigit():
            return [ending(failure.exit_code)]
    lines = [line[:_MAX_LINE_CHARACTERS] for line in message.splitlines() if line.strip()] or [
        ending(failure.exit_code)
    ]
    return [*lines[: most - 1], "..."] if len(lines) > most else lines


def _where_logs_are(failure: Failure) -> str:
    if os.path.exists(failure.log) and os.path.getsize(failure.log):
        return f"  The full traceback is in {failure.log}, those of other ranks beside it."
    return f"  The tracebacks of other ranks are in {os.path.dirname(failure.log)}"


def _location(failure: Failure) -> dict[str, Any] | None:
    if failure.details is None:
        return _crash_location(failure)
    location: dict[str, Any] | None = failure.details["message"]["extraInfo"].get("location")
    return location


def _crash_location(failure: Failure) -> dict[str, Any] | None:
    """The user's line in what Python's fault handler wrote into the log of a rank that a signal has ended."""
    if failure.exit_code >= 0 or not os.path.exists(failure.log):
        return None
    with open(failure.log, "rb") as file:
        file.seek(failure.log_start)
        *_, last = file.read().decode(errors="replace").rpartition("Fatal Python error: ")
    frames = [(name, int(line), function) for name, line, function in _FAULT_FRAME.findall(last)]
    for name, line, function in frames:
        if is_users(name):
            text = linecache.getline(name, line).strip()
            return {"file": name, "line": line, "function": function, "text": text}
    return None


def _departure(left: dict[int, dict[str, Any] | None]) -> str:
    """Who was missing when the others still waited: the likely reason for an error inside a collective."""
    places = sorted({_place(location) for location in left.values() if location is not None})
    where = f", at {places[0]}" if places else ""
    return f"Before it, {names_of(left)} had left with exit code 0{where}."


def _place(location: dict[str, Any]) -> str:
    return f"{location['file']}:{location['line']}, in {location['function']}"


def ending(exit_code: int) -> str:
    """Return an exit code in words."""
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
    own = [frame for frame in frames if is_users(frame.filename)]
    chosen = (own or frames)[-1]
    return {"file": chosen.filename, "line": chosen.lineno, "function": chosen.name, "text": chosen.line}
