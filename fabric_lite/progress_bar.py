"""One line on the terminal that says how far a loop is, how fast, and a few values."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

__all__ = ["ProgressBar"]

_WIDTH = 20
_SECONDS_BETWEEN = 0.1


class ProgressBar:
    """An iterable with a bar; each iteration draws its own.

    A line is drawn ten times a second at most, so between two of them a batch costs a look at the clock, and a value on
    an accelerator is fetched, which waits for the device, only when it is drawn.

    Args:
        loader: Any iterable; with a ``len`` it says how much is left, with a ``batch_size`` samples/s.
        title: At the beginning of the line.
        limit: How many of its batches to take at most.
        begin: Says how many batches of the pass that begins are taken already, after a resume.
        shares: How many ranks take a batch of their own at a time.
        is_shown: Whether there is a bar at all; besides, only where standard error is a terminal.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        title: str = "",
        *,
        limit: int | None = None,
        begin: Callable[[], int] | None = None,
        shares: int = 1,
        is_shown: bool = True,
    ) -> None:
        self._loader, self._title, self._limit, self._shares = loader, title, limit, shares
        self._begin = begin
        self._is_shown = is_shown and sys.stderr is not None and sys.stderr.isatty()
        self._values: dict[str, Any] = {}

    def __len__(self) -> int:
        length = len(self._loader)  # type: ignore[arg-type]  # raises for what has none, as it should
        return length if self._limit is None else min(self._limit, length)

    def show(self, /, **values: Any) -> None:
        """Show these values from the next drawing on: numbers, tensors of one, or text."""
        if self._is_shown:
            self._values = {
                name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in values.items()
            }

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._loader)
        # No further: a loader that was asked for a batch too many would count it as taken.
        batches = iterator if self._limit is None else itertools.islice(iterator, self._limit)
        return self._shown(batches) if self._is_shown else batches

    def _shown(self, batches: Iterator[Any]) -> Iterator[Any]:
        start = last = time.monotonic()
        before = done = 0 if self._begin is None else self._begin()
        total = None if self._limit is None else before + self._limit
        try:
            length = len(self._loader)  # type: ignore[arg-type]
            total = length if total is None else min(total, length)
        except TypeError:
            pass  # it has none
        try:
            for batch in batches:
                yield batch
                done += 1
                now = time.monotonic()
                if now - last >= _SECONDS_BETWEEN:
                    last = now
                    self._draw(before, done, total, now - start)
        finally:
            self._draw(before, done, total, time.monotonic() - start)
            print(file=sys.stderr, flush=True)

    def _draw(self, before: int, done: int, total: int | None, seconds: float) -> None:
        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
        except OSError:  # none that says so
            columns = shutil.get_terminal_size().columns
        # \033[K: what a longer line before it has left.
        print(f"\r{self._line(before, done, total, seconds)[: columns - 1]}\033[K", end="", file=sys.stderr, flush=True)

    def _line(self, before: int, done: int, total: int | None, seconds: float) -> str:
        parts = [self._title] if self._title else []
        if total:
            full = min(_WIDTH, _WIDTH * done // total)
            parts.append(f"{done}/{total} [{'#' * full}{'.' * (_WIDTH - full)}]")
        else:
            parts.append(f"{done} batches")
        if done > before and seconds > 0:
            size = getattr(self._loader, "batch_size", None)
            unit, factor = ("samples", size * self._shares) if isinstance(size, int) else ("batches", 1)
            parts.append(f"{(done - before) * factor / seconds:.4g} {unit}/s")
            if total:
                parts.append(f"{_clock(seconds)} of {_clock(seconds / (done - before) * (total - before))}")
        parts += [f"{name} {_text(value)}" for name, value in self._values.items()]
        return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
