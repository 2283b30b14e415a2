"""What ``fabric-run`` tells the script: one frozen object, handed over in memory to each rank it starts.

No environment variable is involved, so a program that the script starts does not inherit it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

__all__ = [
    "EXIT_PREEMPTED",
    "RUN_ID_PREFIX",
    "RunConfig",
    "current",
    "hang_reporter",
    "install",
    "install_hang_reporter",
]

# What a rank exits with that was asked to leave (SIGTERM, SIGUSR1) and has saved its work: EX_TEMPFAIL, "try again".
EXIT_PREEMPTED = 75

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
    """

    accelerator: str | None = None
    strategy: str | None = None
    precision: str | None = None
    devices: str | None = None
    num_nodes: int | None = None
    threads_per_rank: int | None = None
    check_collectives: bool = False
    hang_timeout: float | None = None


_current: RunConfig | None = None


def current() -> RunConfig | None:
    """Return the run config of this rank; None when the script was not started by fabric_lite."""
    return _current


def install(config: RunConfig | None) -> None:
    """Set the run config of this process; called once in each rank, before the script's first line."""
    global _current
    _current = config


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
