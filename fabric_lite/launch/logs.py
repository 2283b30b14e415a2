"""The ranks' logs: each rank's stdout and stderr goes to a file and on to the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import selectors
import sys
from types import TracebackType

__all__ = ["RankLogs"]


@dataclasses.dataclass
class _Stream:
    """One pipe from a rank: what comes out goes to ``path``, and unless quiet to ``terminal_fd``, which it owns."""

    path: str
    terminal_fd: int
    is_quiet: bool = False

    def __post_init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe()
        os.set_blocking(self.read_fd, False)
        # Appending, because the rank itself appends its traceback; an earlier job's log is not ours to keep.
        self.log_fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def pump(self) -> None:
        """Pass on what has come."""
        with contextlib.suppress(BlockingIOError):  # the pipe is empty
            while chunk := os.read(self.read_fd, 1 << 16):
                _write_all(self.log_fd, chunk)
                if not self.is_quiet:
                    _write_all(self.terminal_fd, chunk)

    def close(self) -> None:
        for descriptor in (self.read_fd, self.write_fd, self.log_fd, self.terminal_fd):
            os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class _RankLog:
    out: _Stream
    err: _Stream


class RankLogs:
    """``rank_N.out`` and ``rank_N.err`` in a folder, for every local rank.

    Args:
        folder: Made if need be.
        count: The number of local ranks.
    """

    def __init__(self, folder: str, count: int) -> None:
        os.makedirs(folder, exist_ok=True)
        sys.stdout.flush()
        path = os.path.join(os.path.abspath(folder), "rank_")
        self._logs = [
            _RankLog(_Stream(f"{path}{local_rank}.out", os.dup(1)), _Stream(f"{path}{local_rank}.err", os.dup(2)))
            for local_rank in range(count)
        ]

    @property
    def write_fds(self) -> list[int]:
        """The descriptors that the server has to inherit."""
        return [stream.write_fd for stream in self._streams()]

    def of(self, local_rank: int) -> _RankLog:
        return self._logs[local_rank]

    def register(self, selector: selectors.BaseSelector) -> None:
        """Have the selector pass on what comes."""
        for stream in self._streams():
            selector.register(stream.read_fd, selectors.EVENT_READ, stream.pump)

    def keep_errors(self, are_kept: bool) -> None:
        """Whether what ranks write to stderr stays in the files: after a failure it would bury the report."""
        for log in self._logs:
            log.err.is_quiet = are_kept

    def drain(self) -> None:
        """Pass on what is left, once nobody writes any more."""
        for stream in self._streams():
            stream.pump()

    def __enter__(self) -> RankLogs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams():
            stream.close()

    def _streams(self) -> list[_Stream]:
        return [stream for log in self._logs for stream in (log.out, log.err)]


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
