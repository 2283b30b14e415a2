"""The supervisor: starts the server, watches the ranks, passes signals on, reports the first failure.

It imports no torch, holds no rank, and leaves no process behind.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
from typing import NoReturn

from fabric_lite.launch.environment import cores, rank_environment
from fabric_lite.launch.failure import Failure, exit_status, report
from fabric_lite.launch.job import (
    FAILURE_GRACE_SECONDS,
    SIGNAL_GRACE_SECONDS,
    Job,
    Signals,
    announce_threads,
    open_job,
    print_line,
)
from fabric_lite.launch.messages import Preload, StartRank
from fabric_lite.launch.plan import LaunchPlan
from fabric_lite.launch.process_tree import adopt_orphans
from fabric_lite.launch.rank_group import RankGroup

__all__ = ["launch"]


def launch(plan: LaunchPlan) -> int:
    """Run the plan to its end and return the exit code for the shell.

    Raises:
        LaunchError: The ranks could not be started as asked.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(adopt_orphans())
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, _leave))
        job = stack.enter_context(open_job(plan))
        if plan.rendezvous is not None:
            # It imports torch, while the server is busy doing the same.
            from fabric_lite.launch.elastic import run_node

            return run_node(plan, plan.rendezvous, job)
        return _Supervisor(plan, job).run()


def _leave(number: int, _frame: object) -> NoReturn:
    """While no rank runs, Ctrl-C and SIGTERM end the supervisor, and with it the server."""
    raise SystemExit(128 + number)


class _Supervisor:
    """The event loop of a single node."""

    def __init__(self, plan: LaunchPlan, job: Job) -> None:
        self.plan = plan
        self.job = job
        self.signals = Signals()
        self.signals_passed_on = 0
        self.group = RankGroup(job.server)
        self.selector = selectors.DefaultSelector()
        self.selector.register(job.server.channel, selectors.EVENT_READ, self.group.read)
        self.selector.register(self.signals, selectors.EVENT_READ, self.signals.clear)
        if job.logs is not None:
            job.logs.register(self.selector)

    def run(self) -> int:
        job = self.job
        announce_threads(job)
        if job.local_world_size > cores():
            # With a core for each rank, each importing it alone takes no longer; with fewer, they would take turns.
            job.server.send(Preload())
        # Answered once torch is imported; signals are not ours to hold back before.
        port = self._host_store()
        with self.signals, self.selector:
            for restart_count in range(self.plan.max_restarts + 1):
                failure = self._attempt(port, restart_count)
                if failure is None or self.signals.received:
                    break
                if restart_count < self.plan.max_restarts:
                    print_line(report(failure) + f"Restart {restart_count + 1} of {self.plan.max_restarts}.")
                    port = self._host_store()
        return self._conclude(failure)

    def _host_store(self) -> int:
        return self.group.host_store(self.plan.main_address, self.plan.main_port)

    def _attempt(self, port: int, restart_count: int) -> Failure | None:
        local_ranks = range(self.job.local_world_size)
        self.group.start([self._request(local_rank, port, restart_count) for local_rank in local_ranks])
        while not self.group.has_ended:
            self._wait()
        self.group.end_leftovers()
        if self.job.logs is not None:
            self.job.logs.drain()
        return self.group.first_failure

    def _wait(self) -> None:
        """Wait for the next event and act on it."""
        for key, _ in self.selector.select(self.group.seconds_to_deadline()):
            key.data()
        self._pass_signals_on()
        if self.signals.received and len(self.group.running) < self.job.local_world_size:
            self.group.stop(grace_seconds=SIGNAL_GRACE_SECONDS, number=None)
        elif self.group.first_failure is not None:
            self.group.stop(grace_seconds=FAILURE_GRACE_SECONDS)

    def _pass_signals_on(self) -> None:
        for number in self.signals.received[self.signals_passed_on :]:
            self.group.send_signal(number if self.signals_passed_on == 0 else signal.SIGKILL)
            self.signals_passed_on += 1

    def _request(self, local_rank: int, port: int, restart_count: int) -> StartRank:
        job = self.job
        environment = rank_environment(
            rank=local_rank,
            world_size=job.local_world_size,
            local_rank=local_rank,
            local_world_size=job.local_world_size,
            node_rank=0,
            num_nodes=1,
            main_address=self.plan.main_address,
            main_port=port,
            error_file=job.error_file(local_rank, restart_count),
            restart_count=restart_count,
            max_restarts=self.plan.max_restarts,
        )
        return job.request(self.plan, environment)

    def _conclude(self, failure: Failure | None) -> int:
        if failure is None:
            return 0
        assert failure.exit_code is not None
        if not self.signals.received:
            print_line(report(failure))
            return exit_status(failure.exit_code)
        number = signal.Signals(self.signals.received[0])
        print_line(f"fabric-run: ended by {number.name}.")
        # A rank's own choice of exit code counts; what it dies of in the middle of its work is the signal's doing.
        return failure.exit_code if failure.exit_code > 1 else exit_status(-number)
