"""SIGTERM and SIGUSR1 to the driver, passed on to the ranks, which may save and leave by them."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fabric_lite.ray.actor import Whereabouts

__all__ = ["Asked", "send_signal"]

_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)
# How long the driver waits for nodes to have sent a signal on. A busy one may need seconds to start a worker for it.
_SEND_SECONDS = 15.0


class Asked:
    """What has come since this was entered; outside the main thread, nothing does.

    A second one means what it did before. Ray's own handler would end the driver at once, and with it the ranks.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.passed_on_at = -math.inf  # by time.monotonic()
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
            send_signal(_by_node(ranks), number)
            self._passed_on += 1
            self.passed_on_at = time.monotonic()


def send_signal(pids: Mapping[str, Sequence[int]], number: int) -> None:
    """Send a signal to processes, given by their nodes. Ray has no other way to an actor that is busy.

    A node that is gone, or does not answer for a while, is left to itself: that its ranks have died, Ray says.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Not again after a failure: a second SIGTERM ends a rank that saves.
    kill = ray.remote(num_cpus=0, max_retries=0)(_kill)
    sent = [
        kill.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(list(own), number)
        for node, own in pids.items()
    ]
    ready, _ = ray.wait(sent, num_returns=len(sent), timeout=_SEND_SECONDS) if sent else ([], [])
    for task in ready:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(task)


def _kill(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(pid, number)


def _by_node(ranks: Iterable[Whereabouts]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for at in ranks:
        found.setdefault(at.node, []).append(at.pid)
    return found
