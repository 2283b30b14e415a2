"""Every operation with which a process changes a folder: counted, recorded, and stopped before or after any of them.

The functions of ``os``, ``open`` and the exchange of two names are replaced in this process, which is a rank that a
test has forked. :mod:`tests.faults.test_checkpoint_crashes` compares the record with the system calls that strace
sees, where there is strace.
"""

from __future__ import annotations

import builtins
import dataclasses
import io
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fabric_lite.checkpoint import exchange

__all__ = ["Operation", "Watch", "kill_all_ranks", "kill_this_rank"]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One change.

    Args:
        kind: "create", "write", "truncate", "sync", "mkdir", "rename", "exchange", "unlink" or "rmdir".
        path: What is changed.
        other: The other name of "rename" and "exchange".
        begin: The first byte of "write", the size of "truncate".
        data: The bytes of "write".
        when: Nanoseconds of a clock that all processes share.
    """

    kind: str
    path: str
    other: str = ""
    begin: int = 0
    data: bytes = dataclasses.field(default=b"", repr=False)
    when: int = dataclasses.field(default_factory=time.monotonic_ns, repr=False)


class Watch:
    """Watches the changes below a folder, in this process, from now on.

    Args:
        folder: Changes of anything outside are let pass.
        before: Called with the number of an operation, from 0 on, before it is done.
        after: Called with it when it has been done.
    """

    def __init__(
        self,
        folder: Path,
        before: Callable[[int], None] = lambda _: None,
        after: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.operations: list[Operation] = []
        self._folder, self._before, self._after = os.path.realpath(folder), before, after
        self._open, self._lock = os.open, threading.RLock()
        self._install()

    def within(self, path: Any) -> bool:
        """Whether this is a path below the folder."""
        if isinstance(path, int):
            return False
        absolute = os.path.abspath(os.fsdecode(path))
        return absolute.startswith(self._folder + os.sep)

    def do(self, operation: Operation, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do one operation between the two calls; of several threads, one at a time."""
        with self._lock:
            number = len(self.operations)
            self._before(number)
            self.operations.append(operation)
            try:
                return function(*args, **kwargs)
            finally:  # making a folder fails where its parent has to be made first
                self._after(number)

    def _install(self) -> None:
        for name, kind in (("mkdir", "mkdir"), ("rmdir", "rmdir"), ("unlink", "unlink"), ("remove", "unlink")):
            setattr(os, name, self._of_one_path(kind, getattr(os, name)))
        for name in ("rename", "replace"):
            setattr(os, name, self._of_two_paths("rename", getattr(os, name)))
        for name in ("link", "symlink", "truncate", "ftruncate", "write", "pwrite", "pwritev", "writev", "sendfile"):
            setattr(os, name, self._unknown(name, getattr(os, name)))
        os.open = self._opening(os.open)
        os.fsync = self._syncing(os.fsync)
        os.fdatasync = self._syncing(os.fdatasync)
        io.open = builtins.open = self._opening_file(io.open)
        system = exchange._system_call

        def system_call() -> Any:
            call = system()
            if call is None:
                return None
            return lambda one, other: self.do(_named("exchange", one, other), call, one, other)

        exchange._system_call = system_call  # type: ignore[assignment]

    def _of_one_path(self, kind: str, function: Any) -> Any:
        def watched(path: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.within(path):
                return function(path, *args, **kwargs)
            return self.do(_named(kind, path), function, path, *args, **kwargs)

        return watched

    def _of_two_paths(self, kind: str, function: Any) -> Any:
        def watched(one: Any, other: Any, **kwargs: Any) -> Any:
            if not self.within(other):
                return function(one, other, **kwargs)
            return self.do(_named(kind, one, other), function, one, other, **kwargs)

        return watched

    def _unknown(self, name: str, function: Any) -> Any:
        """A function that the save does not use: if it comes to, the record would have a hole."""

        def watched(first: Any, *args: Any, **kwargs: Any) -> Any:
            if self.within(self._path_of(first) if isinstance(first, int) else first):
                raise AssertionError(f"os.{name} is not watched")
            return function(first, *args, **kwargs)

        return watched

    def _opening(self, function: Any) -> Any:
        def watched(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            creates = dir_fd is None and self.within(path) and bool(flags & os.O_CREAT)
            if creates and (flags & os.O_EXCL or not os.path.lexists(path)):
                return int(self.do(_named("create", path), function, path, flags, mode))
            if creates and flags & os.O_TRUNC:
                return int(self.do(_named("truncate", path), function, path, flags, mode))
            return int(function(path, flags, mode, dir_fd=dir_fd))

        return watched

    def _syncing(self, function: Any) -> Any:
        def watched(file: Any) -> None:
            path = self._path_of(file if isinstance(file, int) else file.fileno())
            # The folder that was there before counts too: what is made in it has its name there.
            if path == self._folder or self.within(path):
                self.do(_named("sync", path), function, file)
            else:
                function(file)

        return watched

    def _opening_file(self, function: Any) -> Any:
        def watched(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
            path = self._path_of(file) if isinstance(file, int) else file
            if not set(mode) & set("wxa+") or not self.within(path):
                return function(file, mode, buffering, *args, **kwargs)
            if "b" not in mode or buffering != -1:
                raise AssertionError(f"open({path}, {mode!r}) is not watched")
            raw = _Raw(self, os.path.abspath(os.fsdecode(path)), file, mode.replace("b", ""))
            return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

        return watched

    def _path_of(self, descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")


class _Raw(io.FileIO):
    """A file without a buffer, each of whose writes is an operation."""

    def __init__(self, watch: Watch, path: str, file: Any, mode: str) -> None:
        # The module's function, so that creating the file is an operation too.
        super().__init__(file, mode, opener=lambda name, flags: os.open(name, flags, 0o666))
        self._watch, self._path = watch, path

    def write(self, data: Any) -> int:
        held = bytes(data)
        operation = Operation("write", self._path, begin=self.tell(), data=held)
        return int(self._watch.do(operation, super().write, held))

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        operation = Operation("truncate", self._path, begin=size)
        return int(self._watch.do(operation, super().truncate, size))


def kill_all_ranks() -> None:
    """End every rank of this call of the nursery at once, this one too."""
    os.killpg(0, signal.SIGKILL)
    signal.pause()


def kill_this_rank() -> None:
    """End this rank alone."""
    os.kill(os.getpid(), signal.SIGKILL)


def _named(kind: str, path: Any, other: Any = "") -> Operation:
    absolute = [os.path.abspath(os.fsdecode(one)) if one else "" for one in (path, other)]
    return Operation(kind, *absolute)
