"""Which line of the user's program is running, found in frames without reading any source; and ranks in words."""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from types import FrameType

__all__ = ["frames_of", "is_users", "names_of", "user_frame", "user_line"]

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_LIBRARY = (
    sysconfig.get_path("stdlib") + os.sep,
    sysconfig.get_path("platstdlib") + os.sep,
    _PACKAGE,
    contextlib.__file__,
)
_is_users: dict[str, bool] = {}


def is_users(filename: str) -> bool:
    """Whether a file is neither an installed package's, nor the standard library's, nor this package's."""
    known = _is_users.get(filename)
    if known is None:
        installed = "site-packages" in filename or "dist-packages" in filename
        known = not installed and not filename.startswith("<frozen")
        known = _is_users[filename] = known and not os.path.abspath(filename).startswith(_LIBRARY)
    return known


def frames_of(frame: FrameType | None) -> Iterator[FrameType]:
    """The frame and its callers, the innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def user_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost line of the user's; of a program that is all installed packages, of one but torch and this."""
    outside = None
    for caller in frames_of(frame):
        filename, module = caller.f_code.co_filename, str(caller.f_globals.get("__name__", ""))
        # Generated code, such as a dataclass's, has no file; nor has that of a notebook or `python -c`.
        if is_users(filename) and (not filename.startswith("<") or module == "__main__"):
            return caller
        is_package = "site-packages" in filename or "dist-packages" in filename
        is_ours = os.path.abspath(filename).startswith(_PACKAGE)
        if outside is None and is_package and not is_ours and module.partition(".")[0] != "torch":
            outside = caller
    return outside


def user_line() -> str | None:
    """The line of the user's program that is running, FILE:LINE; None at its end, and in threads of others."""
    frame = user_frame(sys._getframe())
    return None if frame is None else f"{os.path.abspath(frame.f_code.co_filename)}:{frame.f_lineno}"


def names_of(ranks: Iterable[int]) -> str:
    """Ranks in words: ``rank 1``, ``ranks 0, 2``, ``ranks 0-5, 7``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = [
        str(first) if first == last else f"{first}, {last}" if last == first + 1 else f"{first}-{last}"
        for first, last in spans
    ]
    is_one = len(spans) == 1 and spans[0][0] == spans[0][1]
    return f"rank{'s' * (not is_one)} {', '.join(words)}"
