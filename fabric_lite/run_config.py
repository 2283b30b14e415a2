"""What ``fabric-run`` tells the script: one frozen object, handed over in memory to each rank it starts.

No environment variable is involved, so a program that the script starts does not inherit it.
"""

from __future__ import annotations

import dataclasses

__all__ = ["EXIT_PREEMPTED", "RUN_ID_PREFIX", "RunConfig", "current", "install"]

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
    """

    accelerator: str | None = None
    strategy: str | None = None
    precision: str | None = None
    devices: str | None = None
    num_nodes: int | None = None
    threads_per_rank: int | None = None
    check_collectives: bool = False


_current: RunConfig | None = None


def current() -> RunConfig | None:
    """Return the run config of this rank; None when the script was not started by fabric_lite."""
    return _current


def install(config: RunConfig | None) -> None:
    """Set the run config of this process; called once in each rank, before the script's first line."""
    global _current
    _current = config
