"""The server: imports torch once, then forks what the supervisor asks for.

It stays single-threaded and never calls into CUDA: either would break the processes that it forks. A forked child
returns all the way up to :func:`main`, so that the interpreter ends it as it ends any script.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import itertools
import os
import selectors
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn

from fabric_lite.launch.messages import (
    Channel,
    CountDevices,
    DevicesCounted,
    EndRanks,
    FailureNoted,
    HostStore,
    JobHangs,
    Preload,
    RankExited,
    RankFailed,
    RankLeft,
    RanksEnded,
    RankStarted,
    SignalRanks,
    StartRank,
    StoreHosted,
)
from fabric_lite.launch.process_tree import (
    adopt_orphans,
    die_with_parent,
    end_descendants,
    is_ending,
    outlive_parent,
    wait_for_exit,
)
from fabric_lite.launch.rank import ScriptCall, run_rank
from fabric_lite.listening import listen_for_nodes, listen_on, serve_store

__all__ = ["main"]

# Between SIGTERM and SIGKILL once the supervisor is gone, for ranks and for what they have started.
_ORPHANED_GRACE_SECONDS = 0.5
# The system closes what a process has open a moment before it reports the process's end.
_END_TIMEOUT_SECONDS = 1.0

_Child = Callable[[], None]
_News = RankFailed | RankLeft | JobHangs


def main() -> None:
    """Serve until the supervisor closes its end: ``server CONTROL_FD SUPERVISOR_PID -f|-m TARGET [ARGUMENTS...]``."""
    control_fd, supervisor, kind, target, *arguments = sys.argv[1:]
    die_with_parent(int(supervisor))
    control = Channel(socket.socket(fileno=int(control_fd)))
    gc.disable()
    import torch  # noqa: F401 # the import that every rank shares

    # What is here already is no rank's garbage; a collection that touches it would also unshare its pages.
    gc.freeze()
    with adopt_orphans():
        # From here on this loop sees the supervisor end, and takes the ranks' own children along.
        outlive_parent()
        if os.getppid() != int(supervisor):
            os._exit(1)
        child = _Server(control, ScriptCall(target, kind == "-m", tuple(arguments))).serve()
    child()


@dataclasses.dataclass
class _Rank:
    local_rank: int
    channel: Channel
    has_spoken: bool = False
    has_hung_up: bool = False


class _Server:
    def __init__(self, control: Channel, script: ScriptCall) -> None:
        self.control = control
        self.script = script
        self.ranks: dict[int, _Rank] = {}
        self.child_ended, wakeup = socket.socketpair()
        self.wakeup = wakeup
        for end in (self.child_ended, wakeup):
            end.setblocking(False)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector = selectors.DefaultSelector()
        self.selector.register(control, selectors.EVENT_READ, self._read_control)
        self.selector.register(self.child_ended, selectors.EVENT_READ, self._read_child_ended)

    def serve(self) -> _Child:
        """Loop over what happens; returns only in a forked child, with what the child has to do."""
        while True:
            # One at a time: what it does may end what the others are about.
            key, _ = self.selector.select()[0]
            child = key.data()
            if child is not None:
                return child

    def _read_control(self) -> _Child | None:
        for message in self.control.receive():
            child = self._obey(message)
            if child is not None:
                return child
        if self.control.is_closed:
            self._exit()
        return None

    def _obey(self, message: Any) -> _Child | None:
        if isinstance(message, StartRank):
            return self._start_rank(message)
        if isinstance(message, HostStore):
            return self._host_store(message)
        if isinstance(message, CountDevices):
            self.control.send(_count_devices())
        elif isinstance(message, Preload):
            _preload(message.modules)
        elif isinstance(message, SignalRanks):
            for pid, rank in self.ranks.items():
                if rank.local_rank != message.spared:
                    os.kill(pid, message.number)
        elif isinstance(message, EndRanks):
            end_descendants(os.getpid(), grace_seconds=message.grace_seconds)
            self.control.send(RanksEnded())
        return None

    def _start_rank(self, request: StartRank) -> _Child | None:
        ours, theirs = socket.socketpair()
        server = os.getpid()
        pid = _fork()
        if pid == 0:
            die_with_parent(server)
            ours.close()
            self._forget()
            return lambda: run_rank(self.script, request, Channel(theirs))
        theirs.close()
        # A loader's workers may hold the rank's end open when the rank has gone.
        ours.setblocking(False)
        rank = _Rank(request.local_rank, Channel(ours))
        self.ranks[pid] = rank
        self.selector.register(rank.channel, selectors.EVENT_READ, self._read_ranks)
        self.control.send(RankStarted(request.local_rank, pid))
        return None

    def _host_store(self, request: HostStore) -> _Child | None:
        """Fork the keeper of the store; not this process, because the store runs a thread."""
        try:
            if request.has_other_nodes:
                listener = listen_for_nodes(request.address, request.port, timeout_seconds=0)
            else:
                listener = listen_on(request.address, request.port)
        except (OSError, OverflowError) as error:
            self.control.send(StoreHosted(request.port, str(error)))
            return None
        server = os.getpid()
        if _fork() == 0:
            die_with_parent(server)
            self._forget()
            return lambda: _keep_store(listener, request.address)
        with listener:
            self.control.send(StoreHosted(listener.getsockname()[1]))
        return None

    def _forget(self) -> None:
        """Leave the server's business behind, in a forked child."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        for end in (self.child_ended, self.wakeup):
            end.close()
        for channel in (self.control, *(rank.channel for rank in self.ranks.values())):
            channel.close()

    def _read_child_ended(self) -> None:
        try:
            self.child_ended.recv(1 << 12)
        except BlockingIOError:
            pass  # an earlier look has taken it
        self._read_ranks()

    def _read_ranks(self) -> None:
        """Take in what ranks have said and who has ended, and pass it on in the order of causes.

        A rank that ends makes the others fail, and both may be here at once. Hence the look at everything, until a
        look finds nothing new; an end that came before a word is then never missing.
        """
        said: list[_News] = []
        ended: dict[int, int] = {}
        while True:
            news = [message for rank in self.ranks.values() for message in self._receive(rank)]
            has_failure = any(isinstance(message, RankFailed) for message in [*said, *news])
            exits = (self._await_silent(ended) if has_failure else {}) | self._reap()
            if not news and not exits:
                break
            said += news
            ended |= exits
        said.sort(key=lambda message: message.time)
        # A rank's own decision to leave has no cause in others. An end without a word comes before the exceptions that
        # it has caused; one with a word comes after it.
        decisions = list(itertools.takewhile(lambda m: not isinstance(m, RankFailed) or m.is_exit, said))
        silent = {pid: code for pid, code in ended.items() if not self.ranks[pid].has_spoken}
        for message in decisions:
            self._pass_on(message)
        # Of several silent ends an abort is the last: gloo's threads abort when they lose a peer.
        for pid, code in sorted(silent.items(), key=lambda item: item[1] == -signal.SIGABRT):
            self._note_exit(pid, code)
        for message in said[len(decisions) :]:
            self._pass_on(message)
        for pid in ended.keys() - silent.keys():
            self._note_exit(pid, ended[pid])

    def _receive(self, rank: _Rank) -> list[_News]:
        if rank.has_hung_up:
            return []
        messages: list[_News] = rank.channel.receive()
        for message in messages:
            rank.has_spoken |= isinstance(message, (RankFailed, RankLeft))
        if rank.channel.is_closed:
            rank.has_hung_up = True
            self.selector.unregister(rank.channel)
        return messages

    def _pass_on(self, message: _News) -> None:
        self.control.send(message)
        if isinstance(message, RankFailed):
            (rank,) = (rank for rank in self.ranks.values() if rank.local_rank == message.local_rank)
            rank.channel.send(FailureNoted())

    def _await_silent(self, ended: Collection[int]) -> dict[int, int]:
        """Wait for ranks that are ending without a word, and return their exit codes.

        The system closes their connections in any order: others may have failed by that, and said so, before this
        process hears of it.
        """
        exits = {}
        for pid, rank in self.ranks.items():
            if pid not in ended and not rank.has_spoken and (rank.has_hung_up or is_ending(pid)):
                status = wait_for_exit(pid, timeout_seconds=_END_TIMEOUT_SECONDS)
                if status is not None:
                    exits[pid] = os.waitstatus_to_exitcode(status)
        return exits

    def _reap(self) -> dict[int, int]:
        """Return the exit codes of ranks that have ended since the last time."""
        exits: dict[int, int] = {}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return exits
            if pid == 0:
                return exits
            if pid in self.ranks:  # else an orphan of a rank, or the store's keeper
                exits[pid] = os.waitstatus_to_exitcode(status)

    def _note_exit(self, pid: int, exit_code: int) -> None:
        rank = self.ranks.pop(pid)
        if not rank.has_hung_up:
            self.selector.unregister(rank.channel)
        rank.channel.close()
        self.control.send(RankExited(rank.local_rank, exit_code))

    def _exit(self) -> NoReturn:
        end_descendants(os.getpid(), grace_seconds=_ORPHANED_GRACE_SECONDS)
        # Finalizing torch takes a tenth of a second and does nothing for anybody.
        os._exit(0)


def _fork() -> int:
    with warnings.catch_warnings():
        # OpenBLAS has threads, and handlers of its own that make forking safe; Python 3.12 sees the threads alone.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _preload(modules: Iterable[str]) -> None:
    import torch

    # On a build with an accelerator the import may ask the driver for devices, which a fork does not survive.
    if torch.accelerator.current_accelerator(check_available=False) is None:
        for name in ("torch._dynamo", *modules):
            importlib.import_module(name)
        gc.freeze()


def _count_devices() -> DevicesCounted:
    """Count the accelerators in a child: counting may call the driver, and no fork survives that."""
    reading, writing = socket.socketpair()
    pid = _fork()
    if pid == 0:
        import torch

        accelerator = torch.accelerator.current_accelerator(check_available=True)
        kind = None if accelerator is None else accelerator.type
        Channel(writing).send(DevicesCounted(kind, torch.accelerator.device_count()))
        os._exit(0)
    writing.close()
    answers = Channel(reading).receive()
    reading.close()
    os.waitpid(pid, 0)
    return answers[0] if answers else DevicesCounted(None, 0)


def _keep_store(listener: socket.socket, address: str) -> None:
    """Serve the TCPStore of an attempt until it is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _store = serve_store(listener, address)
    while True:
        signal.pause()
