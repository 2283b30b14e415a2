"""A count of work that no collective shows, such as the writing of a large file: a job that does it does not hang."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["MovingFile", "busy", "movement_count", "note_movement"]

_BLOCK_BYTES = 64 << 20
_count = 0
_busy: set[object] = set()  # one for each call that is under way


def note_movement() -> None:
    """Tell the hang watch that this process gets on; from any thread, as often as you like."""
    global _count
    _count += 1


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Let a call of the system that can't tell how it gets on, such as a sync or an upload, be no hang."""
    token = object()
    _busy.add(token)
    try:
        yield
    finally:
        _busy.discard(token)
        note_movement()


def movement_count() -> int:
    """Changes with :func:`note_movement`, and from call to call while anything is :func:`busy`."""
    if _busy:
        note_movement()
    return _count


class MovingFile:
    """A file that notes movement while it is written, for writers of large blocks such as ``torch.save``."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        memory = memoryview(data)
        if memory.nbytes == 0:  # which can't be cast
            return 0
        memory = memory.cast("B")
        for begin in range(0, len(memory), _BLOCK_BYTES):
            note_movement()
            self._file.write(memory[begin : begin + _BLOCK_BYTES])
        return len(memory)

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def flush(self) -> None:
        self._file.flush()
