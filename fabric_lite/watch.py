"""The hang watch: a thread on each rank that sees when nothing moves on any, and says who did not arrive.

Nothing runs in the training loop for it. The thread reads counters that are there anyhow: how many collectives each
process group has entered, how many calls this rank has come to compare, and what the Fabrics count (steps, forwards,
batches). Movement on any rank is movement of the job: while rank 0 evaluates alone, nothing hangs.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from torch.distributed import DistError

from fabric_lite.collective_check import check_numbers
from fabric_lite.errors import FabricTypeError, FabricValueError
from fabric_lite.mesh import sequence_numbers
from fabric_lite.movement import movement_count
from fabric_lite.run_config import hang_reporter
from fabric_lite.side_store import FAILED_CALL_SECONDS, SideThread, address_of, reconnect
from fabric_lite.watch_position import is_debugged, position_of
from fabric_lite.watch_report import RankStatus, absent_ranks, explain, explain_late

__all__ = ["DEFAULT_HANG_TIMEOUT_SECONDS", "HangWatch", "choose_hang_timeout", "group_timeout_seconds"]

DEFAULT_HANG_TIMEOUT_SECONDS = 600.0

_EXIT_CODE = 1
# torch's own for gloo; for NCCL it is a third of this.
_GROUP_TIMEOUT_SECONDS = 1800.0
# How long ranks wait for the one that reports, and for the launcher to end them.
_REPORT_SECONDS = 5.0
_FLUSH_SECONDS = 1.0

_movements: list[weakref.WeakMethod[Callable[[], Any]]] = []
_numbers = itertools.count()  # every rank makes the same watches in the same order


def choose_hang_timeout(written: Any, told: float | None) -> float:
    """Return the limit in seconds, 0 for no watch: the command line's, else the script's, else the default.

    Raises:
        FabricTypeError: The script's is no number; FabricValueError: it is negative or infinite.
    """
    seconds = DEFAULT_HANG_TIMEOUT_SECONDS if written is None else written
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise FabricTypeError(
            "hang_timeout must be a number.", given=f"hang_timeout={seconds!r}", fix="hang_timeout=600, or 0 for none"
        )
    if not 0 <= seconds < math.inf:
        raise FabricValueError(
            "hang_timeout is a number of seconds.",
            given=f"hang_timeout={seconds}",
            fix="hang_timeout=600, or 0 for none",
        )
    return float(seconds if told is None else told)


def group_timeout_seconds(hang_timeout_seconds: float) -> float | None:
    """The timeout of a watched process group: a backend that gave up first would say less. None: torch's default."""
    return max(_GROUP_TIMEOUT_SECONDS, 2 * hang_timeout_seconds) if hang_timeout_seconds else None


class HangWatch:
    """Watches the thread that makes it; every rank makes one.

    When the job hangs, one rank reports, to the launcher or else to stderr, and all end.

    Args:
        rank: Of this process.
        world_size: The number of ranks.
        limit_seconds: So long nothing may move on any rank.
        movement: A method of an object that is held weakly. It returns counts, whose change is movement, as of any
            other watch of this process. It is called in another thread, and must be fast.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        limit_seconds: float,
        movement: Callable[[], Any],
    ) -> None:
        self._rank = rank
        self._others = [other for other in range(world_size) if other != rank]
        self._limit = limit_seconds
        self._interval = min(max(limit_seconds / 40, 0.05), 5.0)
        self._report = hang_reporter()
        self._movement = weakref.WeakMethod(movement)
        _movements.append(self._movement)
        self._target = threading.get_ident()
        self._clock = _Clock(self._interval)
        self._own = _Own(host=socket.gethostname(), pid=os.getpid())
        self._views: dict[int, _View] = {}
        self._late: dict[int, RankStatus] = {}
        self._waiting = RankStatus()
        self._has_begun = self._has_said_idle = False
        self._talked_at = 0.0
        self._read_at = -math.inf
        self._call_seconds = 0.0
        self._said_late: set[Any] = set()
        self._store_address = ""
        self._thread = SideThread(f"watch {next(_numbers)}", self._run)

    def close(self) -> None:
        """End the watch; the other ranks learn that this one has left."""
        if self._movement in _movements:
            _movements.remove(self._movement)
        self._thread.close()

    # All below runs in the thread.

    def _run(self, thread: SideThread, store: Any) -> None:
        # A rank that serves the store may be the one that is stopped.
        self._store_address = address_of(store)
        timeout_seconds = min(max(0.9, self._limit / 20), 10.0)
        store.set_timeout(_seconds(timeout_seconds))
        self._call_seconds = timeout_seconds + FAILED_CALL_SECONDS
        connection: _Connection | None = _Connection(store)
        at_first, is_hanging = self._moved_by_fabrics(), False
        while True:
            self._clock.tick()
            goes_on = thread.wait(0.0)
            self._look(has_left=not goes_on)
            self._has_begun = self._has_begun or self._moved_by_fabrics() != at_first
            try:
                connection = connection or _Connection(reconnect(store))
                self._talk(connection)
                self._talked_at = self._clock.now
            except (DistError, OSError):
                # Its server ends with the job, or does not respond, or is busy. A call that timed out leaves the
                # answer in the connection, so the next look makes another.
                connection = None
                self._clock.tick(call_seconds=self._call_seconds)
            if not goes_on:
                return
            # Twice, because the last rank may arrive, and leave, between a look at this rank and one at the others.
            was_hanging, is_hanging = is_hanging, self._hangs(connection)
            if was_hanging and is_hanging:
                self._end(connection)
            thread.wait(self._interval)

    def _look(self, *, has_left: bool) -> None:
        """Note what has moved on this rank, and where it stands."""
        own, now = self._own, self._clock.now
        sequence = {**sequence_numbers(), **check_numbers()}
        # Modules are counted for the long imports of a first step.
        moves = (sequence, len(sys.modules), movement_count(), self._moved_by_fabrics())
        if sequence != own.sequence:
            own.arrived_at = now
        debugged = is_debugged(self._target)
        if moves != own.moves or debugged:
            own.moved_at = now
        own.sequence, own.moves = sequence, moves
        age = now - own.moved_at
        own.status = RankStatus(
            beat=own.status.beat + 1,
            age_seconds=age,
            arrived_seconds=now - own.arrived_at,
            sequence=sequence,
            position=position_of(self._target, with_text=has_left or age > self._limit / 2),
            is_debugged=debugged,
            has_left=has_left,
            host=own.host,
            pid=own.pid,
        )

    @staticmethod
    def _moved_by_fabrics() -> Any:
        """What the Fabrics of this process count; of what was set up and not used yet, nothing."""
        counts = [movement() for reference in list(_movements) if (movement := reference()) is not None]
        return [[count for count in each if count] for each in counts]

    def _talk(self, connection: _Connection) -> None:
        """Publish what was noted; read the others' while this rank has not moved for a while."""
        connection.publish(self._rank, self._own.status)
        age = self._own.status.age_seconds
        if age <= 2 * self._interval:
            self._views.clear()
            self._read_at = -math.inf
            came, self._late = self._late, {}
            if came:
                self._say_late(connection, came)
            return
        # Now and then already in the first half of the limit: how long a rank says nothing counts from its last word.
        is_early = age <= self._limit / 2
        if is_early and self._clock.now - self._read_at < self._limit / 10:
            return
        self._read_at = self._clock.now
        for rank, status in connection.read(self._others).items():
            view = self._views.get(rank)
            if view is None or view.status.beat != status.beat:
                self._views[rank] = _View(status, self._clock.now)
        if is_early:
            return
        statuses = self._statuses()
        late = absent_ranks(statuses, self._silent())
        waits = self._own.status.waits
        self._late = {rank: statuses[rank] for rank in late} if waits and self._rank not in late else {}
        self._waiting = self._own.status
        if connection.is_reported():
            self._leave(connection)

    def _statuses(self) -> dict[int, RankStatus]:
        """The last word of each rank, ages as of now."""
        now, statuses = self._clock.now, {self._rank: self._own.status}
        for rank, view in self._views.items():
            silence = now - view.seen_at
            statuses[rank] = dataclasses.replace(
                view.status,
                age_seconds=view.status.age_seconds + silence,
                arrived_seconds=view.status.arrived_seconds + silence,
            )
        return dict(sorted(statuses.items()))

    def _silent(self) -> dict[int, str]:
        """Ranks that have said nothing for a while, and what is known of them."""
        patience = max(5 * self._interval, min(1.0, self._limit / 3))
        quiet = {
            rank: view
            for rank, view in self._views.items()
            if not view.status.has_left and self._clock.now - view.seen_at > patience
        }
        return {rank: _condition(view.status, self._own.host) for rank, view in quiet.items()}

    def _hangs(self, connection: _Connection | None) -> bool:
        """Whether nothing has moved anywhere for the limit, and somebody waits for another."""
        own = self._own.status
        if own.age_seconds < self._limit:
            return False
        if connection is None:
            # Without a word from the others, only a wait of this rank's own is a sign.
            return own.waits and self._clock.now - self._talked_at >= self._limit
        statuses = self._statuses()
        # What the others say is up to an interval old.
        others = [status for rank, status in statuses.items() if rank != self._rank and not status.has_left]
        if any(other.age_seconds < self._limit - 2 * self._interval or other.is_debugged for other in others):
            return False
        if any(status.waits for status in (own, *others)) or self._is_ahead_of_the_left(statuses):
            return True
        if self._others and not others and len(statuses) > len(self._others):
            return False  # all have finished, and this one has work of its own, such as an upload
        if not self._has_begun:
            self._say_idle(connection, statuses)
        return self._has_begun

    def _is_ahead_of_the_left(self, statuses: Mapping[int, RankStatus]) -> bool:
        """Whether this rank has entered a collective that a rank which has left has not: one of CUDA's waits unseen."""
        own = self._own.sequence
        left = [status.sequence for status in statuses.values() if status.has_left]
        return any(count < own.get(group, 0) for sequence in left for group, count in sequence.items())

    def _say_idle(self, connection: _Connection, statuses: Mapping[int, RankStatus]) -> None:
        """Say that no rank moves before the first step: that may be the preparation of data, on all of them."""
        if not self._has_said_idle and connection.may_speak(self._rank, "idle"):
            first, *more = explain(statuses, self._silent(), [], self._limit)
            print("\n".join([f"fabric_lite: {first}; the job goes on", *more]), file=sys.stderr, flush=True)
        self._has_said_idle = True

    def _end(self, connection: _Connection | None) -> None:
        """Let one rank report; then end this one."""
        missing = [rank for rank in self._others if rank not in self._views]
        if connection is None:
            missing = []
        lines = explain(self._statuses(), self._silent(), missing, self._limit)
        if connection is None:
            lines[1:1] = [f"  the other ranks cannot be asked: the store at {self._store_address} does not answer"]
        limit = f"{self._limit:g} s, the limit: --hang-timeout or Fabric(hang_timeout=), 0 for none"
        lines.append(f"  Nothing moved on any rank for {limit}.")
        if connection is None or connection.may_speak(self._rank, "hang"):
            if self._report is None:
                print("\n".join(["fabric_lite: " + lines[0], *lines[1:]]), file=sys.stderr, flush=True)
            else:
                self._report(["fabric-run: " + lines[0], *lines[1:]])
            if connection is not None:
                connection.set_reported()
        self._leave(connection)

    def _leave(self, connection: _Connection | None) -> NoReturn:
        """End this process, once the report is out; a launcher that was told does it by itself."""
        _flush_and_mute()
        if self._report is not None:
            time.sleep(_REPORT_SECONDS)
        deadline = time.monotonic() + _REPORT_SECONDS
        try:
            while connection is not None and not connection.is_reported() and time.monotonic() < deadline:
                time.sleep(self._interval)
        except DistError:
            os._exit(_EXIT_CODE)  # the rank that serves the store has left already
        if self._rank == 0:
            time.sleep(2 * self._interval + _FLUSH_SECONDS)  # it may be the one that serves the store
        os._exit(_EXIT_CODE)

    def _say_late(self, connection: _Connection, late: dict[int, RankStatus]) -> None:
        """Name the ranks that have come after a long wait; once for each line on which they stood."""
        places = frozenset((rank, status.position and status.position.line) for rank, status in late.items())
        if places <= self._said_late:
            return
        self._said_late |= places
        if connection.may_speak(self._rank, f"late {sorted(places, key=str)}"):
            print(f"fabric_lite: {explain_late(late, {self._rank: self._waiting})}", file=sys.stderr, flush=True)


@dataclasses.dataclass
class _Own:
    """What this rank has noted of itself; times by its watch's clock."""

    host: str
    pid: int
    moves: Any = None
    sequence: dict[str, int] = dataclasses.field(default_factory=dict)
    moved_at: float = 0.0
    arrived_at: float = 0.0
    status: RankStatus = dataclasses.field(default_factory=RankStatus)


@dataclasses.dataclass(frozen=True)
class _View:
    """Another rank's last word, and when it came."""

    status: RankStatus
    seen_at: float


class _Clock:
    """Seconds during which this process ran: a suspended machine, or a stopped process, does not age."""

    def __init__(self, interval_seconds: float) -> None:
        self.now = 0.0
        self._interval = interval_seconds
        self._last = time.monotonic()

    def tick(self, *, call_seconds: float = 0.0) -> None:
        """Let it go on; after a call of the store's that has failed, also by the seconds that such a call may take."""
        last, self._last = self._last, time.monotonic()
        elapsed = self._last - last
        self.now += elapsed if elapsed < max(4 * self._interval, 1.0) + call_seconds else self._interval


class _Connection:
    """What the watches of the ranks tell each other."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._known: set[int] = set()

    def publish(self, rank: int, status: RankStatus) -> None:
        self._store.set(f"rank {rank}", json.dumps(dataclasses.asdict(status)))

    def read(self, ranks: Iterable[int]) -> dict[int, RankStatus]:
        """The statuses of those that have published any; asked for another's, the store would wait for it."""
        self._known |= {rank for rank in ranks if rank not in self._known and self._store.check([f"rank {rank}"])}
        known = sorted(self._known)
        values = self._store.multi_get([f"rank {rank}" for rank in known]) if known else []
        return {rank: RankStatus.of(json.loads(value)) for rank, value in zip(known, values, strict=True)}

    def may_speak(self, rank: int, what: str) -> bool:
        """Whether this rank is the one that speaks for all."""
        return bool(self._store.compare_set(f"speaker of {what}", "", str(rank)) == str(rank).encode())

    def set_reported(self) -> None:
        self._store.set("reported", "1")

    def is_reported(self) -> bool:
        return bool(self._store.check(["reported"]))


def _condition(status: RankStatus, host: str) -> str:
    """Why a rank says nothing, as far as this one can see."""
    if status.host != host:
        return "does not respond"
    try:
        with open(f"/proc/{status.pid}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except OSError:
        return f"does not respond (process {status.pid})"
    if state in "Tt":
        return f"is stopped by a signal (process {status.pid})"
    return f"does not respond (process {status.pid}, in code that runs no Python)"


def _seconds(seconds: float) -> Any:
    import datetime

    return datetime.timedelta(seconds=seconds)


def _flush_and_mute() -> None:
    """Let out what was printed, and nothing more: when the first rank ends, all others raise or abort."""

    def flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    # The main thread will not come back, and may hold the lock of a stream.
    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(_FLUSH_SECONDS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
