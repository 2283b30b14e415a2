"""The ranks of this node, as the supervisor sees them: who runs, and who failed first."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from fabric_lite.errors import LaunchError
from fabric_lite.launch.failure import Failure
from fabric_lite.launch.job import FAILURE_GRACE_SECONDS, SAVE_GRACE_SECONDS
from fabric_lite.launch.messages import (
    EndRanks,
    HostStore,
    JobHangs,
    RankExited,
    RankFailed,
    RankLeft,
    RanksEnded,
    RankStarted,
    SignalRanks,
    StartRank,
)
from fabric_lite.launch.warm_server import WarmServer
from fabric_lite.run_config import EXIT_PREEMPTED

__all__ = ["RankGroup"]

# From the first failure on: how long that rank itself may take to leave, and when nothing of the ranks is left.
_FAILED_SECONDS = 1.2
_LEFTOVERS_SECONDS = 1.7
# Between SIGTERM and SIGKILL for what ranks leave behind that have ended well, such as the workers of a loader.
_LEFTOVER_GRACE_SECONDS = 3.0


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
        self.preempted: set[int] = set()
        self.leftovers_ended = False
        self._requests: dict[int, StartRank] = {}
        self._log_starts: dict[int, int] = {}
        self._left: dict[int, dict[str, Any] | None] = {}
        self._failed_at = 0.0
        self._saving: int | None = None
        self._kills: list[tuple[float, int | None]] = []
        self._has_killed = False
        self._is_stopping = False
        self._is_failing = False
        self._waits_for_save = False

    @property
    def has_ended(self) -> bool:
        """Whether every rank has ended."""
        return not self.running

    def host_store(self, address: str, port: int, *, has_other_nodes: bool = False) -> int:
        """Start a store for the next attempt, to which those of other machines may come, and return its port.

        Raises:
            LaunchError: It cannot listen there.
        """
        self._server.send(HostStore(address, port, has_other_nodes))
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
        self.preempted = set()
        self.leftovers_ended = False
        self._left = {}
        self._saving = None
        self._kills = []
        self._has_killed = False
        self._is_stopping = False
        self._is_failing = False
        self._waits_for_save = False
        self._requests = {request.local_rank: request for request in requests}
        # A file of --log-dir has what the attempts before have left.
        self._log_starts = {
            request.local_rank: os.path.getsize(request.error_log) if os.path.exists(request.error_log) else 0
            for request in requests
        }
        self.running = set(self._requests)
        for request in requests:
            self._server.send(request)

    def read(self) -> None:
        """Take in what the server says; waits when it says nothing."""
        for event in self._server.receive():
            self._note(event)

    def send_signal(self, number: int) -> None:
        """Send a signal to every rank that still runs."""
        self._has_killed = self._has_killed or number == signal.SIGKILL
        self._server.send(SignalRanks(number))

    @property
    def is_stopping(self) -> bool:
        """Whether the ranks have been told, or are going to be made, to end."""
        return self._is_stopping

    @property
    def is_failing(self) -> bool:
        """Whether they end because one has failed."""
        return self._is_failing

    @property
    def is_failure_settled(self) -> bool:
        """Whether a rank has failed and no other has anything to say any more: the moment of the report."""
        has_time_passed = self._is_failing and (self._waits_for_save or len(self._kills) < 2)
        return self.first_failure is not None and (self.has_ended or has_time_passed)

    def stop(self, *, grace_seconds: float, number: int | None = signal.SIGTERM) -> None:
        """Begin to end all ranks: a signal now (None: they had theirs), SIGKILL after the grace; once only."""
        if not self._is_stopping:
            self._is_stopping = True
            self._kills = [(time.monotonic() + grace_seconds, None)]
            if number is not None:
                self._server.send(SignalRanks(number))

    def stop_failed(self) -> None:
        """Begin to end all ranks after the first failure, by SIGKILL: SIGTERM would ask them to save their work."""
        failure = self.first_failure
        assert failure is not None
        if self._is_failing:
            return
        self._is_failing = self._is_stopping = True
        if failure.hang or failure.time == math.inf:
            self._kills = [(self._failed_at, None)]
        else:
            self._kills = self._kills_after(self._failed_at, failure)

    def fail_with_others(self) -> None:
        """Take the ranks, none of which has failed, for failed, because ranks of another node have."""
        self._note_failure(min(self.running), 1, time=math.inf)

    def seconds_to_deadline(self) -> float | None:
        """Return how long the ranks may still take to end; None: as long as they like. Kills them when it is over."""
        while self._kills:
            moment, spared = self._kills[0]
            left = moment - time.monotonic()
            if left > 0:
                return left
            if self._saving is not None and self._is_failing and not self._waits_for_save:
                assert self.first_failure is not None
                self._waits_for_save = True
                self._kills = self._kills_after(moment + SAVE_GRACE_SECONDS, self.first_failure)
                return 0.0  # for the report
            del self._kills[0]
            self._has_killed = True
            self._server.send(SignalRanks(signal.SIGKILL, spared))
        return None

    def end_leftovers(self) -> None:
        """End what the ranks left behind, such as workers of a loader, and wait for it; again does nothing."""
        if self.leftovers_ended:
            return
        if len(self.pids) != len(self._requests):
            raise LaunchError(
                "Fewer ranks were started than asked for.",
                given=f"{len(self._requests)} asked for, {len(self.pids)} started",
                fix="see the lines above; the machine may be out of memory or processes",
            )
        grace = _LEFTOVER_GRACE_SECONDS
        if self.first_failure is not None:
            grace = max(0.0, self._failed_at + _LEFTOVERS_SECONDS - time.monotonic())
        self._server.send(EndRanks(grace))
        while not self.leftovers_ended:
            self.read()

    def _kills_after(self, moment: float, failure: Failure) -> list[tuple[float, int | None]]:
        failed = next(local_rank for local_rank in self._requests if self._rank(local_rank) == failure.rank)
        return [(moment + FAILURE_GRACE_SECONDS, failed), (moment + _FAILED_SECONDS, None)]

    def _note(self, event: Any) -> None:
        if isinstance(event, RankStarted):
            self.pids[event.local_rank] = event.pid
        elif isinstance(event, RankFailed):
            known = {"details": event.failure, "is_exit": event.is_exit, "time": event.time}
            if self.first_failure is None and event.is_saving:
                self._saving = event.local_rank
            self._note_failure(event.local_rank, event.exit_code, **known)
        elif isinstance(event, JobHangs):
            self._note_failure(event.local_rank, 1, hang=tuple(event.lines))
        elif isinstance(event, RankLeft):
            self._left[event.local_rank] = event.location
        elif isinstance(event, RankExited):
            self.running.discard(event.local_rank)
            if event.exit_code == 0:
                self._left.setdefault(event.local_rank, None)
            else:
                self._note_failure(event.local_rank, event.exit_code)
            if event.local_rank == self._saving:
                self._end_after_save()
        elif isinstance(event, RanksEnded):
            self.leftovers_ended = True
        else:
            raise LaunchError("The server said something unexpected.", given=event, fix="report this as a bug")

    def _end_after_save(self) -> None:
        """Go on with the others as after a failure of now: one of them may still be at the last of its part."""
        self._saving, self._failed_at = None, time.monotonic()
        if self._is_failing and self.first_failure is not None:
            self._kills = self._kills_after(self._failed_at, self.first_failure)

    def _note_failure(self, local_rank: int, exit_code: int, **known: Any) -> None:
        """Note the first failure; leaving for preemption is none."""
        rank = self._rank(local_rank)
        if exit_code == EXIT_PREEMPTED:
            self.preempted.add(local_rank)
        elif self.first_failure is None:
            log = self._requests[local_rank].error_log
            left = {self._rank(other): location for other, location in self._left.items() if other != local_rank}
            preempted = tuple(self._rank(other) for other in self.preempted if other != local_rank)
            self._failed_at = time.monotonic()
            known = {"time": self._failed_at, "log_start": self._log_starts[local_rank], **known}
            # As it is now: a failure makes us kill the ranks.
            known["is_after_kill"] = self._has_killed
            self.first_failure = Failure(rank, exit_code, log, left=left, preempted=preempted, **known)
        elif self.first_failure.rank == rank and exit_code != -signal.SIGKILL and not self.first_failure.hang:
            # Its exception came first; this is how it then ended, unless it was by our own hand.
            self.first_failure = dataclasses.replace(self.first_failure, exit_code=exit_code)

    def _rank(self, local_rank: int) -> int:
        return int(self._requests[local_rank].environment["RANK"])
