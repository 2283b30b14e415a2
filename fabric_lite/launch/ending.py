"""What both supervisors decide in the same way: whether ranks end by a signal, and when to end others."""

from __future__ import annotations

import signal
from collections.abc import Collection

from fabric_lite.launch.failure import Failure
from fabric_lite.launch.job import PREEMPTION_GRACE_SECONDS, SIGNAL_GRACE_SECONDS, Signals
from fabric_lite.launch.rank_group import RankGroup

__all__ = ["begin_to_end", "is_by_signal"]


def is_by_signal(failure: Failure, numbers: Collection[int]) -> bool:
    """Whether the rank has ended because it was told to; an error on its way out, such as of its save, is its own.

    Args:
        failure: How it has ended.
        numbers: The signals that the ranks were sent.
    """
    if failure.hang:
        return False
    if failure.details is None:
        is_killed = failure.is_after_kill and bool(numbers) and failure.exit_code == -signal.SIGKILL
        return is_killed or any(failure.exit_code in (-number, 128 + number) for number in numbers)
    # SIGUSR1 may mean anything to a script, an exit with an error too.
    is_told_to_end = bool(set(numbers) - {signal.SIGUSR1})
    return is_told_to_end and (failure.is_exit or failure.exception == "KeyboardInterrupt")


def begin_to_end(group: RankGroup, signals: Signals, number_of_ranks: int) -> None:
    """Begin to end the ranks where it is time to; to be called after every event."""
    failure = group.first_failure
    is_ending = signals.ending is not None
    if failure is not None and not (is_ending and is_by_signal(failure, signals.received)):
        group.stop_failed()
    elif group.preempted:
        group.stop(grace_seconds=PREEMPTION_GRACE_SECONDS, number=None)
    elif is_ending and len(group.running) < number_of_ranks:
        group.stop(grace_seconds=SIGNAL_GRACE_SECONDS, number=None)
