"""What a launch holds while it runs: the server, its folder and logs, the signals that come."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from fabric_lite.launch.environment import chosen_threads, server_environment
from fabric_lite.launch.failure import Failure, report, summary
from fabric_lite.launch.logs import RankLogs
from fabric_lite.launch.messages import CountDevices, DevicesCounted, StartRank
from fabric_lite.launch.plan import LaunchPlan, count_in, count_present, parse_devices
from fabric_lite.launch.rank import ScriptCall
from fabric_lite.launch.warm_server import WarmServer

__all__ = [
    "FAILURE_GRACE_SECONDS",
    "PASSED_ON",
    "PREEMPTION_GRACE_SECONDS",
    "SAVE_GRACE_SECONDS",
    "SIGNAL_GRACE_SECONDS",
    "Job",
    "Signals",
    "announce_threads",
    "find_accelerators",
    "open_job",
    "print_line",
]

# After Ctrl-C or SIGTERM ranks may be writing a checkpoint; this long after the first of them has ended.
SIGNAL_GRACE_SECONDS = 30.0
# Ranks that leave with EXIT_PREEMPTED have saved the same checkpoint; one of them may still be writing its part.
PREEMPTION_GRACE_SECONDS = 300.0
# After a failure the other ranks may still say what they failed of, before SIGKILL; SIGTERM would ask them to save.
FAILURE_GRACE_SECONDS = 0.5
# How long a rank that has failed may take to end an asynchronous save, for which it needs the others.
SAVE_GRACE_SECONDS = 300.0

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclasses.dataclass
class Job:
    """What a launch holds while it runs.

    Args:
        server: The server.
        local_world_size: The number of ranks on this node.
        folder: The temporary folder of error files and tracebacks.
        logs: The ranks' logs, where they are asked for.
        threads: The thread count chosen for each rank.
        keeps_folder: Whether the folder stays, because a report has named it.
    """

    server: WarmServer
    local_world_size: int
    folder: str
    logs: RankLogs | None
    threads: int | None
    keeps_folder: bool = False

    def request(self, plan: LaunchPlan, environment: dict[str, str]) -> StartRank:
        """Return the request that starts the rank with this environment."""
        local_rank, attempt = int(environment["LOCAL_RANK"]), environment["TORCHELASTIC_RESTART_COUNT"]
        run_config = dataclasses.replace(plan.run_config, threads_per_rank=self.threads)
        log = None if self.logs is None else self.logs.of(local_rank)
        if self.logs is not None:
            self.logs.keep_errors(False)
        return StartRank(
            local_rank,
            environment,
            dataclasses.asdict(run_config),
            stdout_fd=None if log is None else log.out.write_fd,
            stderr_fd=None if log is None else log.err.write_fd,
            error_log=os.path.join(self.folder, f"attempt_{attempt}_rank_{local_rank}.err")
            if log is None
            else log.err.path,
        )

    def report(self, failure: Failure, restart_count: int, max_restarts: int) -> None:
        """Say what has failed: its report, whose folder stays, or one line where the ranks start again."""
        if restart_count == max_restarts:
            self.keeps_folder = self.logs is None
            print_line(report(failure))
        else:
            print_line(f"fabric-run: restart {restart_count + 1} of {max_restarts}: {summary(failure)}")
        if self.logs is not None:
            self.logs.keep_errors(True)

    def mention(self, failure: Failure) -> None:
        """Say in one line what has failed while the ranks were ending anyhow. The folder stays from now on."""
        self.keeps_folder = self.logs is None
        print_line(f"fabric-run: {summary(failure)}; its traceback is in {failure.log}")

    def error_file(self, local_rank: int, restart_count: int) -> str:
        """Return the path at which this rank tells its exception."""
        return os.path.join(self.folder, f"attempt_{restart_count}_rank_{local_rank}.json")


@contextlib.contextmanager
def open_job(plan: LaunchPlan) -> Iterator[Job]:
    """Start the server and find out how many ranks there are; end everything on leaving."""
    devices = parse_devices(plan.run_config.devices or "auto")
    count = count_in(devices, plan.run_config.accelerator)
    threads = chosen_threads(os.environ, count or 1)
    job: Job | None = None
    with contextlib.ExitStack() as stack:
        # All descriptors must exist before the server does; a count that is not known yet has no logs of its own.
        if count is None and plan.log_dir is not None:
            count = count_present(*find_accelerators(plan.script), plan.run_config.accelerator)
        logs = None if plan.log_dir is None else stack.enter_context(RankLogs(plan.log_dir, count or 1))
        folder = tempfile.mkdtemp(prefix="fabric_run_")
        stack.callback(lambda: _clear(folder, keep_logs=job is not None and job.keeps_folder))
        server = WarmServer(
            plan.script,
            environment=server_environment(os.environ, threads),
            pass_descriptors=[] if logs is None else logs.write_fds,
        )
        stack.callback(server.close)
        if count is None:
            count = count_present(*_find_accelerators(server), plan.run_config.accelerator)
            threads = chosen_threads(os.environ, count)
        job = Job(server, count, folder, logs, threads)
        yield job


def _clear(folder: str, *, keep_logs: bool) -> None:
    """Remove the folder, or only torchelastic's error files, whose content is in the logs too."""
    if not keep_logs:
        shutil.rmtree(folder)
        return
    for name in os.listdir(folder):
        if name.endswith(".json"):
            os.unlink(os.path.join(folder, name))


def find_accelerators(script: ScriptCall) -> tuple[str | None, int]:
    """Return kind and number of this machine's accelerators, found in a server of its own; None: there are none."""
    server = WarmServer(script, environment=os.environ)
    try:
        return _find_accelerators(server)
    finally:
        server.close()


def _find_accelerators(server: WarmServer) -> tuple[str | None, int]:
    server.send(CountDevices())
    (answer,) = server.receive()
    assert isinstance(answer, DevicesCounted)
    return answer.kind, answer.count


class Signals:
    """SIGINT, SIGTERM and SIGUSR1 as something to select on: the numbers that came, in order.

    SIGUSR1 is a job system's early word, and may mean anything to a script; the other two end the job.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._passed_on = 0
        self._reading, self._writing = socket.socketpair()
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1

    @property
    def ending(self) -> int | None:
        """The first signal that ends the job."""
        return next((number for number in self.received if number != signal.SIGUSR1), None)

    @property
    def has_killed(self) -> bool:
        """Whether a second one has killed the ranks."""
        return sum(number != signal.SIGUSR1 for number in self.received[: self._passed_on]) > 1

    def fileno(self) -> int:
        return self._reading.fileno()

    def __enter__(self) -> Signals:
        for end in (self._reading, self._writing):
            end.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        for number in PASSED_ON:
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

    def pass_on(self, send: Callable[[int], None]) -> None:
        """Send the ranks what has come since the last time; the second signal that ends the job kills them."""
        for index in range(self._passed_on, len(self.received)):
            number = self.received[index]
            is_second = number != signal.SIGUSR1 and set(self.received[:index]) - {signal.SIGUSR1}
            send(signal.SIGKILL if is_second else number)
        self._passed_on = len(self.received)

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
