"""The supervisor: starts the server, watches the ranks, passes signals on, reports the first failure.

It imports no torch, holds no rank, and leaves no process behind.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
from typing import NoReturn

from fabric_lite.launch.ending import begin_to_end, is_by_signal
from fabric_lite.launch.environment import cores, rank_environment
from fabric_lite.launch.failure import Failure, exit_status
from fabric_lite.launch.job import PASSED_ON, Job, Signals, announce_threads, open_job, print_line
from fabric_lite.launch.messages import Preload, StartRank
from fabric_lite.launch.plan import LaunchPlan
from fabric_lite.launch.process_tree import adopt_orphans
from fabric_lite.launch.rank_group import RankGroup
from fabric_lite.launch.requeue import is_first_of_job, requeue
from fabric_lite.run_config import EXIT_PREEMPTED

__all__ = ["launch"]


def launch(plan: LaunchPlan) -> int:
    """Run the plan to its end and return the exit code for the shell.

    Raises:
        LaunchError: The ranks could not be started as asked.
        SystemExit: A signal came while no rank ran.
    """
    try:
        code, may_requeue = _launch(plan)
    except SystemExit as leaving:
        if leaving.code == EXIT_PREEMPTED and plan.requeue and is_first_of_job():
            requeue()
        raise
    if may_requeue and plan.requeue:
        requeue()
    return code


def _launch(plan: LaunchPlan) -> tuple[int, bool]:
    """Run the plan; return the exit code, and whether it is for this process to requeue."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(adopt_orphans())
        for number in PASSED_ON:
            stack.callback(signal.signal, number, signal.signal(number, _leave))
        job = stack.enter_context(open_job(plan))
        if plan.rendezvous is not None:
            # It imports torch, while the server is busy doing the same.
            from fabric_lite.launch.elastic import run_node

            return run_node(plan, plan.rendezvous, job)
        supervisor = _Supervisor(plan, job)
        code = supervisor.run()
        return code, supervisor.was_asked_early or code == EXIT_PREEMPTED


def _leave(number: int, _frame: object) -> NoReturn:
    """While no rank runs, a signal ends the supervisor, and with it the server."""
    raise SystemExit(EXIT_PREEMPTED if number == signal.SIGUSR1 else 128 + number)


class _Supervisor:
    """The event loop of a single node."""

    def __init__(self, plan: LaunchPlan, job: Job) -> None:
        self.plan = plan
        self.job = job
        self.signals = Signals()
        self.reports = 0
        # By SIGUSR1, which has ended ranks that did not listen yet; what they saved before is there all the same.
        self.was_asked_early = False
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
                if failure is None or self._is_stopped_by_signal(failure) or self.signals.ending:
                    break
                if restart_count < self.plan.max_restarts:
                    port = self._host_store()
        return self._conclude(failure)

    def _host_store(self) -> int:
        return self.group.host_store(self.plan.main_address, self.plan.main_port)

    def _attempt(self, port: int, restart_count: int) -> Failure | None:
        local_ranks = range(self.job.local_world_size)
        self.group.start([self._request(local_rank, port, restart_count) for local_rank in local_ranks])
        while not self.group.has_ended:
            self._wait()
            if self.group.is_failure_settled:
                self._report(restart_count)
        self.group.end_leftovers()
        if self.job.logs is not None:
            self.job.logs.drain()
        return self.group.first_failure

    def _wait(self) -> None:
        """Wait for the next event and act on it."""
        for key, _ in self.selector.select(self.group.seconds_to_deadline()):
            key.data()
        self.signals.pass_on(self.group.send_signal)
        begin_to_end(self.group, self.signals, self.job.local_world_size)

    def _report(self, restart_count: int) -> None:
        """Say what has failed: its report, or one line where the ranks start again; once only."""
        failure = self.group.first_failure
        if failure is None or self._is_stopped_by_signal(failure) or self.reports == restart_count + 1:
            return
        self.reports = restart_count + 1
        is_last = restart_count == self.plan.max_restarts or self.signals.ending is not None
        self.job.report(failure, restart_count, restart_count if is_last else self.plan.max_restarts)

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

    def _is_stopped_by_signal(self, failure: Failure) -> bool:
        """Whether the ranks have ended because fabric-run was told to end."""
        return is_by_signal(failure, self.signals.received)

    def _conclude(self, failure: Failure | None) -> int:
        if failure is None and self.group.preempted:
            print_line("fabric-run: stopped for preemption; the ranks have saved their work.")
            return EXIT_PREEMPTED
        if failure is None:
            return 0
        if not self._is_stopped_by_signal(failure):
            return exit_status(failure.exit_code)
        number = signal.Signals(self.signals.ending or signal.SIGUSR1)
        self.was_asked_early = number == signal.SIGUSR1
        print_line(f"fabric-run: ended by {number.name}.")
        # A rank's own choice of exit code counts.
        return failure.exit_code if failure.exit_code > 1 else exit_status(-number)
