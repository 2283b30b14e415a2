"""A thread beside the training loop that talks to the other ranks through the store, never through collectives."""

from __future__ import annotations

import atexit
import encodings.idna  # noqa: F401 # else the first connection's, in the watch's thread, which counts modules as movement
import math
import os
import select
import socket
import stat
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from fabric_lite.errors import CollectiveError

__all__ = ["FAILED_CALL_SECONDS", "SideThread", "address_of", "connect", "end_when_lost", "reconnect"]

_JOIN_SECONDS = 10.0
_CONNECT_SECONDS = 0.9
# After so long without a sign from the other machine the system ends a connection: see end_when_lost().
_LOST_SECONDS = 3
# How long a call may take beyond its timeout before it fails: the connection is made anew, or found to be lost.
FAILED_CALL_SECONDS = _CONNECT_SECONDS + _LOST_SECONDS


def connect(name: str) -> Any:
    """A connection of the caller's own to the store of the default process group, its keys apart under ``name``.

    The group's own connection is held for as long as a call on it waits; this one is nobody else's. Every rank that
    asks with the same name sees the same keys; they stay until the store ends, so a name is used once in a process.

    Raises:
        CollectiveError: The group, one not made here, has no store (MPI's has none), or one that takes no
            other connection.
    """
    # The one name that torch has for the store that a group was made with, whoever made it.
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    try:
        return PrefixStore(f"fabric_lite/{name}", _clone(store))
    except (AttributeError, RuntimeError) as error:
        # Any other error is not of all ranks alike: its server does not answer, say.
        if isinstance(error, RuntimeError) and "pure virtual" not in str(error):
            raise
        raise CollectiveError(
            "The process group has no store that the ranks could talk through.",
            given=f"a group of backend {dist.get_backend()} with {type(store).__name__}",
            fix="let Fabric make the process group, or make it with a TCPStore",
        ) from error


def reconnect(store: Any) -> Any:
    """Another connection to the same keys; a call that timed out leaves its answer in the old one.

    Raises:
        OSError: Nobody listens where the store was; DistError: it does not answer.
    """
    server = _server_of(store)
    if hasattr(server, "port"):
        # torch would try for long, and write lines about each try.
        socket.create_connection((server.host, server.port), timeout=_CONNECT_SECONDS).close()
    return _clone(store)


def address_of(store: Any) -> str:
    """Where the store is served, ``host:port``, as far as it says."""
    server = _server_of(store)
    return f"{getattr(server, 'host', '?')}:{getattr(server, 'port', '?')}"


def _server_of(store: Any) -> Any:
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


def _clone(store: Any) -> Any:
    """Another connection, which ends when the other machine is out of reach."""
    port = getattr(_server_of(store), "port", None)
    before = _connections_to(port)
    connection = store.clone()
    _end_when_lost(_connections_to(port) - before, _LOST_SECONDS)
    return connection


def end_when_lost(store: Any, seconds: int) -> None:
    """Let the system end this process's connections to the store's server when it gives no sign for so long.

    torch waits without a limit for most answers, also for that to its own "I wait no longer" after a timeout: when a
    cable is pulled, its thread would stay there for as long as the system tries, which is a quarter of an hour.
    """
    _end_when_lost(_connections_to(getattr(_server_of(store), "port", None)), seconds)


def _end_when_lost(descriptors: set[int], seconds: int) -> None:
    for descriptor in descriptors:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (("KEEPIDLE", 1), ("KEEPINTVL", 1), ("USER_TIMEOUT", 1000 * seconds)):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{option}"), value)


def _connections_to(port: int | None) -> set[int]:
    """The descriptors of this process that are connected to a port; none where the system does not list them."""
    found: set[int] = set()
    if port is None or not os.path.isdir("/proc/self/fd"):
        return found
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                if connection.family != socket.AF_UNIX and connection.getpeername()[1] == port:
                    found.add(descriptor)
        except OSError:
            continue  # closed since the listing, or listening
    return found


class SideThread:
    """A daemon thread with its own store connection, which :meth:`close` or :meth:`let_go` ends, or the process's end.

    It has to end before Python does: one that comes back from torch's C++ later aborts a process that has finished
    well. So ``work`` never waits in the store; it looks, and waits in :meth:`wait`. A forked child has no such thread,
    and its copy of this object does nothing.

    Args:
        name: For the thread and for the keys in the store.
        work: Called in the thread with this object and the store; it returns when :meth:`wait` says so. What it
            raises goes to ``threading.excepthook``, unless :meth:`close` was called or the store is gone.

    Raises:
        CollectiveError: There is no store for it, see :func:`connect`.
    """

    def __init__(self, name: str, work: Callable[[SideThread, Any], None]) -> None:
        self._work = work
        self._store = connect(name)
        self._process = os.getpid()
        self._receiver, self._sender = os.pipe()
        os.set_blocking(self._receiver, False)
        os.set_blocking(self._sender, False)
        self._descriptors = [weakref.finalize(self, os.close, each) for each in (self._receiver, self._sender)]
        for descriptor in self._descriptors:
            descriptor.atexit = False  # the thread may still wait then
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name=f"fabric_lite {name}", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def wait(self, seconds: float, *descriptors: int) -> bool:
        """Wait, in the thread, until time is up, :meth:`wake` is called or one of ``descriptors`` can be read.

        Returns:
            Whether to go on: False once :meth:`close` was called.
        """
        if not self._is_closing:
            # Not select(): it takes no descriptor above 1023, of which a process with many files has some.
            poll = select.poll()
            for descriptor in (self._receiver, *descriptors):
                poll.register(descriptor, select.POLLIN)
            if any(descriptor == self._receiver for descriptor, _ in poll.poll(math.ceil(1000 * seconds))):
                os.read(self._receiver, 4096)
        return not self._is_closing

    def wake(self) -> None:
        """End the thread's :meth:`wait` now, or its next one. From any thread, and from a signal handler."""
        if not self._is_closing:
            self._write()

    def close(self) -> None:
        """End the thread and wait until it has; again does nothing."""
        atexit.unregister(self.close)
        self.let_go()
        if os.getpid() != self._process:
            return
        self._thread.join(_JOIN_SECONDS)
        if not self._thread.is_alive():
            self._store = None
            for descriptor in self._descriptors:
                descriptor()

    def let_go(self) -> None:
        """End the thread and do not wait for it: from any thread, also in the middle of a collection of garbage."""
        if not self._is_closing and os.getpid() == self._process:
            self._is_closing = True
            self._write()

    def _write(self) -> None:
        try:
            os.write(self._sender, b"\0")
        except BlockingIOError:
            return  # so many bytes wait there that it wakes anyhow

    def _run(self) -> None:
        try:
            self._work(self, self._store)
        except dist.DistNetworkError:
            # The rank or the launcher that keeps the store has ended, and the run with it. That is theirs to say.
            return
        except Exception:
            if not self._is_closing:
                raise
        finally:
            if self._is_closing:
                atexit.unregister(self.close)  # which else holds this object until then
