"""A count of work that no collective shows, such as the writing of a large file: a job that does it does not hang."""

from __future__ import annotations

__all__ = ["movement_count", "note_movement"]

_count = 0


def note_movement() -> None:
    """Tell the hang watch that this process gets on; from any thread, as often as you like."""
    global _count
    _count += 1


def movement_count() -> int:
    """Changes with :func:`note_movement`."""
    return _count
