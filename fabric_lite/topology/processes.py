"""What the system tells of another process, where it tells anything."""

from __future__ import annotations

import dataclasses
from pathlib import Path

__all__ = ["Process", "process"]


@dataclasses.dataclass(frozen=True)
class Process:
    """A process of this machine.

    Args:
        name: Of its program.
        parent: The number of the process that started it.
        group: Its process group.
        has_terminal: Whether a terminal controls it.
    """

    name: str
    parent: int
    group: int
    has_terminal: bool


def process(number: int) -> Process | None:
    """The process with this number; None where there is none, or the system does not tell."""
    try:
        text = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return None
    # "PID (NAME) STATE PARENT GROUP SESSION TERMINAL ...", and a name may hold anything.
    name, _, rest = text.partition("(")[2].rpartition(")")
    _, parent, group, _, terminal = rest.split()[:5]
    return Process(name, int(parent), int(group), terminal != "0")
