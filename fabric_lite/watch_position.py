"""Where a thread of this process stands: the user's line, and the collective that it waits in."""

from __future__ import annotations

import dataclasses
import linecache
import sys
from types import FrameType
from typing import Any

from fabric_lite.call_site import frames_of, user_frame

__all__ = ["Position", "is_debugged", "position_of"]

_COLLECTIVES = "torch.distributed.distributed_c10d"
_CHECK = "fabric_lite.collective_check"
_DEBUGGERS = ("bdb", "pdb", "ipdb", "pudb", "pydevd", "_pydevd_bundle", "debugpy")


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a thread stands.

    Args:
        file: The path of the user's file.
        line: The number of the line.
        function: The user's function.
        text: The line itself; empty where it is not known.
        waits_in: The collective that the line has called, also while it is only compared over the ranks, or
            ``"backward"``; None: the thread is in neither.
    """

    file: str
    line: int
    function: str
    text: str = ""
    waits_in: str | None = None


def position_of(thread: int, *, with_text: bool = False) -> Position | None:
    """Return where the thread stands; None when it has ended, or runs no line of a program any more.

    Args:
        thread: Its ``threading.get_ident()``.
        with_text: Whether to read the text of the line from its file.
    """
    innermost = sys._current_frames().get(thread)
    frame = user_frame(innermost)
    if innermost is None or frame is None:
        return None
    file, line = frame.f_code.co_filename, frame.f_lineno or 0
    text = linecache.getline(file, line, frame.f_globals).strip() if with_text else ""
    return Position(file, line, frame.f_code.co_name, text, _waits_in(innermost, frame))


def is_debugged(thread: int) -> bool:
    """Whether a debugger follows the thread, or has stopped it."""
    for frame in frames_of(sys._current_frames().get(thread)):
        # A tracer is the debugger's method; that of a coverage tool is not.
        for module in (frame.f_globals.get("__name__"), getattr(frame.f_trace, "__module__", None)):
            if str(module).partition(".")[0] in _DEBUGGERS:
                return True
    return False


def _waits_in(innermost: FrameType, users: FrameType) -> str | None:
    """The name of the outermost call of torch's collectives below the user's line: what the user wrote, or close.

    Or of the call that the ranks compare, which waits for them as the call itself would.
    """
    name = None
    for frame in frames_of(innermost):
        if frame is users:
            break
        module: Any = frame.f_globals.get("__name__", "")
        if module == _COLLECTIVES and not frame.f_code.co_name.startswith("_"):
            name = frame.f_code.co_name
        elif module == _CHECK and frame.f_code.co_name == "enter":
            name = str(frame.f_locals["operation"])
        elif name is None and module == "torch.autograd.graph" and frame.f_code.co_name == "_engine_run_backward":
            name = "backward"
        elif name is not None and module == "fabric_lite.communication":
            name = frame.f_code.co_name
    return name
