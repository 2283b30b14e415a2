"""SIGTERM and SIGUSR1 to the driver, passed on to the ranks, which may save and leave by them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterable
from typing import Any

from fabric_lite.ray.actor import Whereabouts

__all__ = ["Asked", "send_signal"]

_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)


class Asked:
    """What has come since this was entered; outside the main thread, nothing does.

    A second one means what it did before. Ray's own handler would end the driver at once, and with it the ranks.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._passed_on = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Asked:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _PASSED_ON}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self.received.append(number)
        signal.signal(number, self._before[number])

    def pass_on(self, ranks: Iterable[Whereabouts]) -> None:
        """Send these ranks what has come since the last time."""
        for number in self.received[self._passed_on :]:
            for node, pids in _by_node(ranks).items():
                send_signal(node, pids, number)
            self._passed_on += 1


def send_signal(node: str, pids: list[int], number: int) -> None:
    """Send a signal to processes of a node. Ray has no other way to an actor that is busy."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(_kill).options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
    ray.get(task.remote(pids, number))


def _kill(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(pid, number)


def _by_node(ranks: Iterable[Whereabouts]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for at in ranks:
        found.setdefault(at.node, []).append(at.pid)
    return found
