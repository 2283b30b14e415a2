"""What ``fabric-run`` tells the script: one frozen object, handed over in memory to each rank it starts.

No environment variable is involved, so a program that the script starts does not inherit it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from fabric_lite.process_end import EXIT_PREEMPTED

__all__ = [
    "EXIT_PREEMPTED",
    "RUN_ID_PREFIX",
    "RunConfig",
    "current",
    "hang_reporter",
    "install",
    "install_hang_reporter",
    "redirected",
]

# The run id that ranks of fabric_lite find in TORCHELASTIC_RUN_ID begins so.
RUN_ID_PREFIX = "fabric_run_"


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The command line's choices. ``None`` means that nothing was said, so the script's own value holds.

    Args:
        accelerator: As in ``Fabric(accelerator=)``.
        strategy: As in ``Fabric(strategy=)``.
        precision: As in ``Fabric(precision=)``.
        devices: As in ``Fabric(devices=)``, still as written on the command line (``"2"``, ``"0,1"``, ``"auto"``).
        num_nodes: As in ``Fabric(num_nodes=)``.
        threads_per_rank: The thread count that was chosen for each rank, or None where the user had set one.
        check_collectives: Whether every collective first compares operation, shapes and dtypes over the ranks.
        hang_timeout: After so many seconds in which nothing moves on any rank the job is ended; 0: never.
        callback: ``module:Class`` of a callback that every Fabric of the script has beside its own.
        callback_options: What the class is called with; plain data.
        scratch_folder: Where the script's checkpoints go instead of where it wants them.
        only_accelerator: The one kind of device that this rank was given, where others of the node are not its own.
    """

    accelerator: str | None = None
    strategy: str | None = None
    precision: str | None = None
    devices: str | None = None
    num_nodes: int | None = None
    threads_per_rank: int | None = None
    check_collectives: bool = False
    hang_timeout: float | None = None
    callback: str | None = None
    callback_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    scratch_folder: str | None = None
    only_accelerator: str | None = None


_current: RunConfig | None = None


def current() -> RunConfig | None:
    """Return the run config of this rank; None when the script was not started by fabric_lite."""
    return _current


def install(config: RunConfig | None) -> None:
    """Set the run config of this process; called once in each rank, before the script's first line."""
    global _current
    _current = config


def redirected(path: Any, *, to_read: bool = False) -> Any:
    """Return where a checkpoint of this name goes: below the scratch folder, if there is one.

    ``to_read``: only if there is something; what the script wrote before it had such a folder is read in its place.
    """
    folder = None if _current is None else _current.scratch_folder
    if folder is None or not isinstance(path, (str, os.PathLike)):
        return path
    if os.path.abspath(path).startswith(os.path.join(folder, "")):
        return path  # somebody has asked before
    scheme, _, rest = str(path).rpartition("://")
    scratch = os.path.join(folder, scheme or "local", os.path.abspath(rest).lstrip(os.sep))
    return path if to_read and not os.path.exists(scratch) else scratch


_hang_reporter: Callable[[Sequence[str]], None] | None = None


def hang_reporter() -> Callable[[Sequence[str]], None] | None:
    """Return what tells ``fabric-run`` that the job hangs; None when the script was not started by ``fabric-run``.

    Called with the lines of the report, the first of which names rank and cause, from any thread of any rank at any
    time: ``fabric-run`` kills all ranks, stopped ones too, and prints the lines as the failure report. The first
    report counts. It returns at once; the process is killed a moment later.
    """
    return _hang_reporter


def install_hang_reporter(reporter: Callable[[Sequence[str]], None] | None) -> None:
    """Set what :func:`hang_reporter` returns; called once in each rank, before the script's first line."""
    global _hang_reporter
    _hang_reporter = reporter
