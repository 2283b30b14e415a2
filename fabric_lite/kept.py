"""The checkpoints in the folder of a run: which there are, by step, and which of them are to be kept."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fabric_lite.checkpoint.commit import recovered
from fabric_lite.checkpoint.formats import opened
from fabric_lite.errors import FabricError

__all__ = ["MARK", "Entry", "Rule", "by_step", "own_entries", "path_of"]

# The key under which a checkpoint says that it is one of a run's own: step, metrics, world_size.
MARK = "checkpoints"
# The other beginning is that of a checkpoint that a crash has left in the middle of being replaced.
_NAME = re.compile(r"(?:\.fabric-old-)?step-(\d{7,})")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One checkpoint of a run: after how many steps, where, and the values that it was saved with."""

    step: int
    path: Path
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which checkpoints are kept.

    Args:
        last: This many of the newest, 0 too; None: all.
        best: This many of those with the best values.
        monitor: The name of the value.
        mode: Whether the best is the ``"min"`` or the ``"max"``.
    """

    last: int | None
    best: int
    monitor: str | None
    mode: str

    def outdated(self, entries: Sequence[Entry], newest: int) -> list[Entry]:
        """Those of ``entries`` that are not kept; never one of a step later than ``newest``."""
        if self.last is None:
            return []
        until = sorted((entry for entry in entries if entry.step <= newest), key=lambda entry: entry.step)
        kept = [*until[max(len(until) - self.last, 0) :], *self.ranked(entries)[: self.best]]
        return [entry for entry in until if entry not in kept]

    def ranked(self, entries: Sequence[Entry]) -> list[Entry]:
        """Those with a value, the best first, of equal ones the newest; a NaN is no value."""
        name = self.monitor
        if name is None:
            return []
        valued = [entry for entry in entries if not math.isnan(entry.metrics.get(name, math.nan))]
        sign = -1.0 if self.mode == "max" else 1.0
        return sorted(valued, key=lambda entry: (sign * entry.metrics[name], -entry.step))


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after this many steps stands: a file or a folder."""
    return folder / f"step-{step:07d}"


def by_step(folder: Path) -> dict[int, Path]:
    """What has the name of a checkpoint in ``folder``, the newest first; nothing is opened."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return {}
    steps = {int(match[1]) for match in map(_NAME.fullmatch, names) if match is not None}
    return {step: path_of(folder, step) for step in sorted(steps, reverse=True)}


def own_entries(folder: Path, known: dict[Path, tuple[Any, Entry | None]]) -> list[Entry]:
    """The checkpoints in ``folder`` that a run of :class:`Checkpoints` wrote, the newest first.

    What is damaged, or was written by somebody else under such a name, is not among them.

    Args:
        folder: Whose names are looked at.
        known: What was found out about each of them, kept from call to call.
    """
    found = []
    for step, path in by_step(folder).items():
        try:
            status = os.stat(recovered(path))
        except OSError:
            continue  # gone since the listing
        version = (status.st_ino, status.st_mtime_ns)
        if path not in known or known[path][0] != version:
            known[path] = version, _read(step, path)
        entry = known[path][1]
        if entry is not None:
            found.append(entry)
    return found


def _read(step: int, path: Path) -> Entry | None:
    try:
        content = opened(path).content()
    except (FabricError, OSError):
        return None
    mark = content.get(MARK) if isinstance(content, dict) else None
    if not isinstance(mark, dict) or mark.get("step") != step or not isinstance(mark.get("metrics"), dict):
        return None
    return Entry(step, path, {str(name): float(value) for name, value in mark["metrics"].items()})
