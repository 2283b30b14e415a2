"""The ranks of this node, as the supervisor sees them: who runs, and who failed first."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Sequence
from typing import Any

from fabric_lite.errors import LaunchError
from fabric_lite.launch.failure import Failure
from fabric_lite.launch.messages import (
    EndRanks,
    HostStore,
    RankExited,
    RankFailed,
    RankLeft,
    RanksEnded,
    RankStarted,
    SignalRanks,
    StartRank,
)
from fabric_lite.launch.warm_server import WarmServer

__all__ = ["RankGroup"]


class RankGroup:
    """The ranks that one server runs on this node; :meth:`start` may be called again when all have ended.

    Args:
        server: Where they are forked.
    """

    def __init__(self, server: WarmServer) -> None:
        self._server = server
        self.pids: dict[int, int] = {}
        self.running: set[int] = set()
        self.first_failure: Failure | None = None
        self.leftovers_ended = False
        self._requests: dict[int, StartRank] = {}
        self._left: dict[int, dict[str, Any] | None] = {}
        self._kill_at: float | None = None

    @property
    def has_ended(self) -> bool:
        """Whether every rank has ended."""
        return not self.running

    def host_store(self, address: str, port: int) -> int:
        """Start a store for the next attempt and return its port.

        Raises:
            LaunchError: It cannot listen there.
        """
        self._server.send(HostStore(address, port))
        (answer,) = self._server.receive()
        if answer.error is not None:
            raise LaunchError(
                "The ranks' store cannot listen where it should.",
                given=f"--main-address {address} --main-port {port}: {answer.error}",
                fix="an address of this machine, and a free port or none",
            )
        return int(answer.port)

    def start(self, requests: Sequence[StartRank]) -> None:
        """Start one rank per request and wait until the server has forked them all."""
        self.pids = {}
        self.first_failure = None
        self.leftovers_ended = False
        self._left = {}
        self._kill_at = None
        self._requests = {request.local_rank: request for request in requests}
        self.running = set(self._requests)
        for request in requests:
            self._server.send(request)

    def read(self) -> None:
        """Take in what the server says; waits when it says nothing."""
        for event in self._server.receive():
            self._note(event)

    def send_signal(self, number: int) -> None:
        """Send a signal to every rank that still runs."""
        self._server.send(SignalRanks(number))

    def stop(self, *, grace_seconds: float, number: int | None = signal.SIGTERM) -> None:
        """Begin to end all ranks: a signal now (None: they had theirs), SIGKILL after the grace; once only."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + grace_seconds
            if number is not None:
                self._server.send(SignalRanks(number, spare_failing=True))

    def seconds_to_deadline(self) -> float | None:
        """Return how long the ranks may still take to end; None: as long as they like. Kills them when it is over."""
        if self._kill_at is None:
            return None
        left = self._kill_at - time.monotonic()
        if left > 0:
            return left
        self.send_signal(signal.SIGKILL)
        return None

    def end_leftovers(self) -> None:
        """End what the ranks left behind, such as workers of a loader, and wait for it."""
        if len(self.pids) != len(self._requests):
            raise LaunchError(
                "Fewer ranks were started than asked for.",
                given=f"{len(self._requests)} asked for, {len(self.pids)} started",
                fix="see the lines above; the machine may be out of memory or processes",
            )
        self._server.send(EndRanks())
        while not self.leftovers_ended:
            self.read()

    def _note(self, event: Any) -> None:
        if isinstance(event, RankStarted):
            self.pids[event.local_rank] = event.pid
        elif isinstance(event, RankFailed):
            self._note_failure(event.local_rank, details=event.failure, exit_code=event.exit_code)
        elif isinstance(event, RankLeft):
            self._left[event.local_rank] = event.location
        elif isinstance(event, RankExited):
            self.running.discard(event.local_rank)
            if event.exit_code == 0:
                self._left.setdefault(event.local_rank, None)
            else:
                self._note_failure(event.local_rank, exit_code=event.exit_code)
        elif isinstance(event, RanksEnded):
            self.leftovers_ended = True
        else:
            raise LaunchError("The server said something unexpected.", given=event, fix="report this as a bug")

    def _note_failure(self, local_rank: int, *, details: dict[str, Any] | None = None, exit_code: int) -> None:
        request = self._requests[local_rank]
        rank = self._rank(local_rank)
        if self.first_failure is None:
            log = request.error_log if details else None
            left = {self._rank(other): location for other, location in self._left.items() if other != local_rank}
            self.first_failure = Failure(rank, exit_code, details, log, left)
        elif self.first_failure.rank == rank and exit_code != -signal.SIGKILL:
            # Its exception came first; this is how it then ended, unless it was by our own hand.
            self.first_failure = dataclasses.replace(self.first_failure, exit_code=exit_code)

    def _rank(self, local_rank: int) -> int:
        return int(self._requests[local_rank].environment["RANK"])
