"""What supervisor, server and ranks say to each other: frozen dataclasses, one JSON line each."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
from typing import Any

__all__ = [
    "Channel",
    "CountDevices",
    "DevicesCounted",
    "EndRanks",
    "FailureNoted",
    "HostStore",
    "JobHangs",
    "Preload",
    "RankExited",
    "RankFailed",
    "RankLeft",
    "RankStarted",
    "RanksEnded",
    "SignalRanks",
    "StartRank",
    "StoreHosted",
]


# From the supervisor to the server.


@dataclasses.dataclass(frozen=True)
class HostStore:
    """Fork the keeper of a TCPStore that listens on this address, for this machine or all; ``StoreHosted`` answers.

    Each attempt has its own: a restarted rank would find the addresses of the ranks before it in an old one.
    """

    address: str
    port: int
    has_other_nodes: bool = False


@dataclasses.dataclass(frozen=True)
class Preload:
    """Import torch._dynamo, which DDP's constructor needs, and ``modules`` before forking; not where that is unsafe."""

    modules: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CountDevices:
    """Fork a probe that counts the accelerators; ``DevicesCounted`` answers."""


@dataclasses.dataclass(frozen=True)
class StartRank:
    """Fork one rank.

    Args:
        local_rank: Which one of all that run at once; with several jobs side by side, not the rank's own LOCAL_RANK.
        environment: The variables to add to the server's own.
        run_config: The fields of :class:`fabric_lite.run_config.RunConfig`.
        error_log: The file that gets its traceback, and what it writes to stderr after that.
        stdout_fd: The inherited descriptor that becomes its stdout; None: the server's own.
        stderr_fd: Likewise.
    """

    local_rank: int
    environment: dict[str, str]
    run_config: dict[str, Any]
    error_log: str
    stdout_fd: int | None = None
    stderr_fd: int | None = None


@dataclasses.dataclass(frozen=True)
class SignalRanks:
    """Send a signal to every rank that runs, but for the local rank ``spared``."""

    number: int
    spared: int | None = None


@dataclasses.dataclass(frozen=True)
class EndRanks:
    """End the store's keeper and every process that the ranks left behind; ``RanksEnded`` answers.

    Args:
        grace_seconds: Between SIGTERM and SIGKILL.
    """

    grace_seconds: float


# From the server to the supervisor.


@dataclasses.dataclass(frozen=True)
class StoreHosted:
    """The store listens on ``port``; or it cannot, because of ``error``."""

    port: int
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class RankStarted:
    """A rank was forked."""

    local_rank: int
    pid: int


@dataclasses.dataclass(frozen=True)
class RankFailed:
    """A rank has an exception that nobody caught; it is about to exit. Ranks send it to the server too.

    Args:
        local_rank: Which one.
        failure: What :func:`fabric_lite.launch.failure.describe_exception` found out.
        exit_code: What it will exit with.
        time: When, by the clock that all processes share.
        is_exit: Whether the exception is SystemExit: the rank's own decision, which no other rank can have caused.
        is_saving: Whether an asynchronous save is under way, for whose end it waits before it exits.
    """

    local_rank: int
    failure: dict[str, Any]
    exit_code: int = 1
    time: float = 0.0
    is_exit: bool = False
    is_saving: bool = False


@dataclasses.dataclass(frozen=True)
class RankLeft:
    """A rank has come to the end of its script, or exits with 0. Ranks send it to the server too.

    Args:
        local_rank: Which one.
        location: The user's line that exits; None at the end of the script.
        time: When, by the clock that all processes share.
    """

    local_rank: int
    location: dict[str, Any] | None = None
    time: float = 0.0


@dataclasses.dataclass(frozen=True)
class JobHangs:
    """A rank has found that the job hangs; ``lines`` are the report. Ranks send it to the server too."""

    local_rank: int
    lines: list[str]
    time: float


@dataclasses.dataclass(frozen=True)
class RankExited:
    """A rank has ended; ``exit_code`` is negative for a signal, as in ``subprocess``."""

    local_rank: int
    exit_code: int


@dataclasses.dataclass(frozen=True)
class RanksEnded:
    """Nothing that the ranks started lives any more."""


@dataclasses.dataclass(frozen=True)
class DevicesCounted:
    """The kind (``"cuda"``, ...; None: no accelerator) and number of devices present."""

    kind: str | None
    count: int


# From the server to a rank that sent RankFailed.


@dataclasses.dataclass(frozen=True)
class FailureNoted:
    """The rank may let go of its connections: what that makes the others do comes after its failure."""


_TYPES = {
    kind.__name__: kind
    for kind in (
        HostStore,
        JobHangs,
        Preload,
        CountDevices,
        StartRank,
        SignalRanks,
        EndRanks,
        StoreHosted,
        RankStarted,
        RankFailed,
        RankLeft,
        RankExited,
        RanksEnded,
        DevicesCounted,
        FailureNoted,
    )
}


class Channel:
    """One end of a socket pair that carries messages."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.is_closed = False
        self._buffer = b""
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message: Any) -> None:
        """Send one message, from any thread; a peer that has gone is noticed by :meth:`receive`, not here."""
        line = json.dumps([type(message).__name__, dataclasses.asdict(message)]) + "\n"
        try:
            with self._sending:
                self.connection.sendall(line.encode())
        except (BrokenPipeError, ConnectionResetError):
            self.is_closed = True

    def receive(self) -> list[Any]:
        """Wait for at least one message and return all that have come; empty and ``is_closed`` when the peer is gone.

        Empty, too, when nothing has come and the socket does not block.
        """
        while b"\n" not in self._buffer:
            try:
                chunk = self.connection.recv(1 << 16)
            except BlockingIOError:
                return []
            except ConnectionResetError:
                chunk = b""
            if not chunk:
                self.is_closed = True
                return []
            self._buffer += chunk
        *lines, self._buffer = self._buffer.split(b"\n")
        return [_TYPES[name](**fields) for name, fields in map(json.loads, lines)]

    def close(self) -> None:
        self.is_closed = True
        self.connection.close()
