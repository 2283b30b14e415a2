"""What a launch holds while it runs: the server, its folder and logs, the signals that come."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from fabric_lite.launch.environment import chosen_threads, server_environment
from fabric_lite.launch.logs import RankLogs
from fabric_lite.launch.messages import CountDevices, DevicesCounted, StartRank
from fabric_lite.launch.plan import LaunchPlan, count_in, count_present, parse_devices
from fabric_lite.launch.warm_server import WarmServer

__all__ = [
    "FAILURE_GRACE_SECONDS",
    "SIGNAL_GRACE_SECONDS",
    "Job",
    "Signals",
    "announce_threads",
    "open_job",
    "print_line",
]

FAILURE_GRACE_SECONDS = 5.0
# After Ctrl-C or SIGTERM ranks may be writing a checkpoint; this long after the first of them has ended.
SIGNAL_GRACE_SECONDS = 30.0


@dataclasses.dataclass
class Job:
    """What a launch holds while it runs.

    Args:
        server: The server.
        local_world_size: The number of ranks on this node.
        folder: A temporary folder for error files.
        logs: The ranks' logs, where they are asked for.
        threads: The thread count chosen for each rank.
    """

    server: WarmServer
    local_world_size: int
    folder: str
    logs: RankLogs | None
    threads: int | None

    def request(self, plan: LaunchPlan, environment: dict[str, str]) -> StartRank:
        """Return the request that starts the rank with this environment."""
        local_rank = int(environment["LOCAL_RANK"])
        run_config = dataclasses.replace(plan.run_config, threads_per_rank=self.threads)
        log = None if self.logs is None else self.logs.of(local_rank)
        return StartRank(
            local_rank,
            environment,
            dataclasses.asdict(run_config),
            stdout_fd=None if log is None else log.out.write_fd,
            stderr_fd=None if log is None else log.err.write_fd,
            error_log=None if log is None else log.err.path,
        )

    def error_file(self, local_rank: int, restart_count: int) -> str:
        """Return the path at which this rank tells its exception."""
        return os.path.join(self.folder, f"attempt_{restart_count}_rank_{local_rank}.json")


@contextlib.contextmanager
def open_job(plan: LaunchPlan) -> Iterator[Job]:
    """Start the server and find out how many ranks there are; end everything on leaving."""
    devices = parse_devices(plan.run_config.devices or "auto")
    count = count_in(devices, plan.run_config.accelerator)
    threads = chosen_threads(os.environ, count or 1)
    with contextlib.ExitStack() as stack:
        # All descriptors must exist before the server does; a count that is not known yet has no logs of its own.
        if count is None and plan.log_dir is not None:
            count = _count_in_server_of_its_own(plan)
        logs = None if plan.log_dir is None else stack.enter_context(RankLogs(plan.log_dir, count or 1))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fabric_run_"))
        server = WarmServer(
            plan.script,
            environment=server_environment(os.environ, threads),
            pass_descriptors=[] if logs is None else logs.write_fds,
        )
        stack.callback(server.close)
        if count is None:
            count = _count_devices(server, plan)
            threads = chosen_threads(os.environ, count)
        yield Job(server, count, folder, logs, threads)


def _count_in_server_of_its_own(plan: LaunchPlan) -> int:
    server = WarmServer(plan.script, environment=os.environ)
    try:
        return _count_devices(server, plan)
    finally:
        server.close()


def _count_devices(server: WarmServer, plan: LaunchPlan) -> int:
    server.send(CountDevices())
    (answer,) = server.receive()
    assert isinstance(answer, DevicesCounted)
    return count_present(answer.kind, answer.count, plan.run_config.accelerator)


class Signals:
    """SIGINT and SIGTERM as something to select on: the numbers that came, in order."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._reading, self._writing = socket.socketpair()
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1

    def fileno(self) -> int:
        return self._reading.fileno()

    def __enter__(self) -> Signals:
        for end in (self._reading, self._writing):
            end.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._reading.close()
        self._writing.close()

    def clear(self) -> None:
        """Make the object wait for the next signal."""
        try:
            self._reading.recv(1 << 12)
        except BlockingIOError:
            pass  # nothing has come since the last time

    def _note(self, number: int, _frame: object) -> None:
        self.received.append(number)


def announce_threads(job: Job) -> None:
    """Say once which thread count was chosen."""
    if job.threads is not None:
        print_line(
            f"fabric-run: {job.local_world_size} ranks, {job.threads} thread{'s' * (job.threads > 1)} each; "
            "set OMP_NUM_THREADS for another number."
        )


def print_line(text: str) -> None:
    """Write to stderr at once; what ranks print must not come between the lines."""
    sys.stderr.write(text.rstrip("\n") + "\n")
    sys.stderr.flush()
