"""The supervisor of one of several nodes: torchelastic's agent, with ranks from this node's own server.

Rendezvous, the numbering of ranks, restarts and membership are torchelastic's; only how a rank starts is ours.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

from fabric_lite.errors import LaunchError
from fabric_lite.launch.board import Board
from fabric_lite.launch.ending import begin_to_end, is_by_signal
from fabric_lite.launch.environment import cores, rank_environment
from fabric_lite.launch.failure import Failure, exit_status, summary
from fabric_lite.launch.job import (
    PREEMPTION_GRACE_SECONDS,
    SIGNAL_GRACE_SECONDS,
    Job,
    Signals,
    announce_threads,
    print_line,
)
from fabric_lite.launch.messages import Preload, StartRank
from fabric_lite.launch.plan import LaunchPlan, Rendezvous
from fabric_lite.launch.rank_group import RankGroup
from fabric_lite.launch.rendezvous import LOST_SECONDS, rendezvous_handler
from fabric_lite.run_config import EXIT_PREEMPTED
from fabric_lite.side_store import end_when_lost

__all__ = ["run_node"]

_MONITOR_INTERVAL_SECONDS = 0.1
# How long a node that has told its failure, and may hold the store, stays for the others.
_OTHERS_TELL_SECONDS = 1.5
# How long ranks of other nodes may take to notice a failure, by which they fail themselves.
_FAILURE_ELSEWHERE_SECONDS = 0.3


def run_node(plan: LaunchPlan, rendezvous: Rendezvous, job: Job) -> tuple[int, bool]:
    """Run this node's ranks to their end; return the exit code, and whether it is for this node to requeue the job.

    Raises:
        LaunchError: The nodes have not met, or have lost the store in which they meet.
    """
    announce_threads(job)
    if job.local_world_size > cores():
        job.server.send(Preload())
    try:
        # What the user should know is said here; torchelastic, and torch's C++ code when a store is gone, say it again
        # at length.
        with contextlib.nullcontext() if "LOGLEVEL" in os.environ else _torch_silenced(job), _ended_by_signals():
            return _run_agent(plan, rendezvous, job)
    except (RendezvousError, DistError) as error:
        # One that has timed out has no words.
        words = (str(error).splitlines() or [type(error).__name__])[0]
        raise LaunchError(
            "The nodes could not meet, or have lost the store in which they meet.",
            given=f"--rdzv-backend {rendezvous.backend}, {rendezvous.endpoint}: {words}",
            fix="start all nodes again; they meet on a machine that all reach, best one that trains nothing",
        ) from error


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process: a wait inside torch's store runs no Python, so nothing else could."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _torch_silenced(job: Job) -> Iterator[None]:
    """Send what is written to descriptor 2 to a file of the job's folder; what Python prints goes to the terminal."""
    logging.disable(logging.CRITICAL)
    sys.stderr.flush()
    terminal = os.dup(2)
    file = os.open(os.path.join(job.folder, "node.err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    os.dup2(file, 2)
    os.close(file)
    try:
        with open(terminal, "w", closefd=False) as stream, contextlib.redirect_stderr(stream):
            yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def _run_agent(plan: LaunchPlan, rendezvous: Rendezvous, job: Job) -> tuple[int, bool]:
    handler = rendezvous_handler(rendezvous)
    spec = WorkerSpec(
        role="default",
        local_world_size=job.local_world_size,
        rdzv_handler=handler,
        max_restarts=plan.max_restarts,
        monitor_interval=_MONITOR_INTERVAL_SECONDS,
        entrypoint=plan.script.target,
    )
    number: signal.Signals | None = None
    with contextlib.closing(_Agent(spec, plan, job)) as agent:
        try:
            agent.run()
        except SignalException as error:
            number = error.sigval
            print_line(f"fabric-run: ended by {number.name}.")
        finally:
            # The node that held the store may have left.
            with contextlib.suppress(RendezvousError, DistError):
                handler.shutdown()
        failure, is_main = agent.group.first_failure, agent.get_worker_group().group_rank == 0
    if number is not None:
        # SIGUSR1 has ended ranks that did not listen yet; what they saved before is there all the same.
        return exit_status(-number), is_main and number == signal.SIGUSR1
    if failure is not None:
        return exit_status(failure.exit_code), False
    if agent.group.preempted:
        print_line("fabric-run: stopped for preemption; the ranks have saved their work.")
        return EXIT_PREEMPTED, is_main
    return 0, False


class _Agent(SimpleElasticAgent):
    """torchelastic's agent whose workers are forked from the server."""

    def __init__(self, spec: WorkerSpec, plan: LaunchPlan, job: Job) -> None:
        super().__init__(spec)
        self.group = RankGroup(job.server)
        self._plan = plan
        self._job = job
        self._signals: Signals | None = None
        self._attempts = 0
        self._has_told = False
        self._look_at = 0.0
        self._knows_failure = False
        self._board: tuple[Any, Board] | None = None

    def close(self) -> None:
        """Give the signals back."""
        if self._signals is not None:
            self._signals.__exit__()

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        # torch's handler tells the address of the first meeting ever after, and tells it in the first meeting's store
        # alone: a node that joins later would wait for it until both give up.
        handler: Any = worker_group.spec.rdzv_handler
        if hasattr(handler, "_bootstrap_store_info"):
            handler._bootstrap_store_info = None
        with self._waiting():
            super()._rendezvous(worker_group)
        # torchelastic asks it ten times a second whether nodes have come.
        end_when_lost(worker_group.store, LOST_SECONDS)

    def _exit_barrier(self) -> None:
        # Ranks that have left because of a signal are on their way out, and the signal may come again.
        is_asked = self._signals is not None and bool(self._signals.received)
        with contextlib.nullcontext() if is_asked else _ended_by_signals():
            super()._exit_barrier()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """While this node waits for others, and no rank runs."""
        with _ended_by_signals():
            if self._signals is not None and self._signals.ending is not None:
                raise SignalException("while no rank runs", signal.Signals(self._signals.ending))
            yield

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with self._waiting():
            attempt = self._agree_on_attempt(worker_group)
            port = self._agree_on_port(worker_group, attempt)
        if self._signals is None:
            self._signals = Signals().__enter__()
        self._has_told = self._knows_failure = False
        self.group.start([self._request(worker_group, worker, attempt, port) for worker in worker_group.workers])
        while len(self.group.pids) < len(worker_group.workers):
            self.group.read()
        return dict(self.group.pids)

    def _agree_on_attempt(self, worker_group: WorkerGroup) -> int:
        """Return how often ranks were started before, the same on every node.

        torchelastic counts a node's own failures only: a node that restarts because another one did stays behind.
        """
        store: Any = worker_group.store
        nodes = worker_group.group_world_size or 1
        store.set(f"fabric_lite/attempt/{worker_group.group_rank}", str(self._attempts))
        attempt = max(self._attempts, *(int(store.get(f"fabric_lite/attempt/{node}")) for node in range(nodes)))
        self._attempts = attempt + 1
        return attempt

    def _agree_on_port(self, worker_group: WorkerGroup, attempt: int) -> int:
        """Return the port of this attempt's store, which node 0 serves.

        torchelastic's own agents hand one store to all attempts, and restarted ranks hang on the old ranks' addresses.
        """
        store: Any = worker_group.store
        key = f"fabric_lite/port/{attempt}"
        if worker_group.group_rank == 0:
            # Before any node can read them.
            nodes = range(worker_group.group_world_size or 1)
            for kind in ("any", *nodes, *(f"told by {node}" for node in nodes)):
                store.set(f"fabric_lite/failure/{attempt}/{kind}", "")
            store.set(key, str(self.group.host_store(str(worker_group.master_addr), 0, has_other_nodes=True)))
        return int(store.get(key))

    def _request(self, worker_group: WorkerGroup, worker: Any, attempt: int, port: int) -> StartRank:
        spec = worker_group.spec
        assert worker_group.group_rank is not None
        assert worker_group.group_world_size is not None
        environment = rank_environment(
            rank=worker.global_rank,
            world_size=worker.world_size,
            local_rank=worker.local_rank,
            local_world_size=spec.local_world_size,
            node_rank=worker_group.group_rank,
            num_nodes=worker_group.group_world_size,
            main_address=str(worker_group.master_addr),
            main_port=port,
            error_file=self._job.error_file(worker.local_rank, attempt),
            run_id=spec.rdzv_handler.get_run_id(),
            restart_count=attempt,
            max_restarts=spec.max_restarts,
            role_name=spec.role,
            role_rank=worker.role_rank,
            role_world_size=worker.role_world_size,
        )
        return self._job.request(self._plan, environment)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._read_events(0)
        signals = self._signals
        assert signals is not None
        signals.pass_on(self.group.send_signal)
        begin_to_end(self.group, signals, len(worker_group.workers))
        if self.group.is_stopping and not self.group.is_failing:
            self._wait_for_end(signals.received)
        failure = self.group.first_failure
        if failure is not None and is_by_signal(failure, signals.received):
            self.group.stop(grace_seconds=SIGNAL_GRACE_SECONDS, number=None)
            self._wait_for_end(signals.received)
            number = signal.Signals(signals.ending or signal.SIGUSR1)
            raise SignalException("passed on to the ranks, which have ended", number)
        if failure is not None:
            if signals.ending:
                self._remaining_restarts = 0
            self._stop_failed(worker_group, failure)
            return RunResult(WorkerState.FAILED, failures={failure.rank: self._process_failure(worker_group)})
        if self.group.has_ended and self._are_asked_to_change(worker_group, signals):
            return RunResult(WorkerState.HEALTHY)
        if not self.group.has_ended and self._is_failure_elsewhere(worker_group):
            # Ranks that are stopped, or in no collective, would not notice.
            self.group.fail_with_others()
        elif self.group.has_ended:
            self.group.end_leftovers()
            return RunResult(WorkerState.SUCCEEDED, return_values={w.global_rank: None for w in worker_group.workers})
        return RunResult(WorkerState.HEALTHY)

    def _is_failure_elsewhere(self, worker_group: WorkerGroup) -> bool:
        """Whether a rank of another node has failed a moment ago; looked at now and then."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _FAILURE_ELSEWHERE_SECONDS
            was_known, key = self._knows_failure, f"fabric_lite/failure/{self._attempts - 1}/any"
            # Who held the store may have finished, which is no reason to end ranks that still work.
            self._knows_failure = self._board_of(worker_group).ask(lambda store: bool(store.get(key)), False)
            return was_known and self._knows_failure
        return False

    def _board_of(self, worker_group: WorkerGroup) -> Board:
        if self._board is None or self._board[0] is not worker_group.store:
            self._board = (worker_group.store, Board(worker_group.store))
        return self._board[1]

    def _are_asked_to_change(self, worker_group: WorkerGroup, signals: Signals) -> bool:
        """Whether the ranks have left because another node has told its own to, for a node that comes."""
        is_asked = self.group.preempted and not signals.received
        return bool(is_asked and worker_group.spec.rdzv_handler.num_nodes_waiting() > 0)

    def _stop_failed(self, worker_group: WorkerGroup, failure: Failure) -> None:
        """End all ranks after a failure; say what has failed, unless it was on another node."""
        attempt, node = self._attempts - 1, worker_group.group_rank
        # Of several nodes the order is by their clocks, and an exception may be what another's end without a word made.
        is_effect = (
            failure.time == math.inf
            or (failure.details is not None and not failure.is_exit)
            or (failure.details is None and failure.exit_code == -signal.SIGABRT)
        )
        order = [is_effect, time.time() - (time.monotonic() - failure.time)]
        board, key = self._board_of(worker_group), f"fabric_lite/failure/{attempt}"
        told = json.dumps([*order, node, summary(failure)])
        self.group.stop_failed()
        board.ask(lambda store: (store.set(f"{key}/any", "yes"), store.set(f"{key}/{node}", told)), None)
        while not self.group.has_ended:
            self._read_events(self.group.seconds_to_deadline())
            if self._signals is not None:
                self._signals.pass_on(self.group.send_signal)
            if self.group.is_failure_settled and not self._has_told:
                self._tell(board, key, told, worker_group, failure)
        if not self._has_told:
            self._tell(board, key, told, worker_group, failure)
        self.group.end_leftovers()
        self._read_logs()
        if self._remaining_restarts == 0:
            self._let_others_tell(board, key, worker_group.group_world_size or 1)

    def _tell(self, board: Board, key: str, own: str, worker_group: WorkerGroup, failure: Failure) -> None:
        self._has_told = True
        keys = [f"{key}/{node}" for node in range(worker_group.group_world_size or 1)]
        nothing: list[str] = []
        told = board.ask(lambda store: [store.get(each).decode() for each in keys], nothing)
        *_, node, words = min(json.loads(each) for each in (own, *told) if each)
        board.ask(lambda store: store.set(f"{key}/told by {worker_group.group_rank}", "yes"), None)
        max_restarts = worker_group.spec.max_restarts
        if node == worker_group.group_rank:
            self._job.report(failure, max_restarts - self._remaining_restarts, max_restarts)
        elif self._remaining_restarts == 0:
            print_line(f"fabric-run: ended because on node {node} {words}")

    def _let_others_tell(self, board: Board, key: str, nodes: int) -> None:
        """Wait a moment for the other nodes, which read in the store that this one may hold what has failed first."""
        deadline = time.monotonic() + _OTHERS_TELL_SECONDS
        # Who held the store has waited as long, and left.
        keys = [f"{key}/told by {node}" for node in range(nodes)]
        while time.monotonic() < deadline and not board.ask(lambda store: all(map(store.get, keys)), True):
            time.sleep(_MONITOR_INTERVAL_SECONDS / 4)

    def _process_failure(self, worker_group: WorkerGroup) -> ProcessFailure:
        failure = self.group.first_failure
        assert failure is not None
        (local_rank,) = (w.local_rank for w in worker_group.workers if w.global_rank == failure.rank)
        error_file = self._job.error_file(local_rank, self._attempts - 1)
        return ProcessFailure(local_rank, self.group.pids[local_rank], failure.exit_code, error_file)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:  # torchelastic's signature
        if self.group.first_failure is not None:
            return  # all have ended
        print_line("fabric-run: nodes come or go; all ranks start again.")
        self._stop(PREEMPTION_GRACE_SECONDS, signal.SIGTERM)
        failure = self.group.first_failure
        if failure is not None and not is_by_signal(failure, [signal.SIGTERM]):
            self._job.mention(failure)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self._stop(timeout, death_sig)

    def _stop(self, grace_seconds: float, number: int | None) -> None:
        """End all ranks and what they have started, and wait until they have."""
        if self.group.has_ended:
            return
        self.group.stop(grace_seconds=grace_seconds, number=number)
        self._wait_for_end([] if number is None else [number])

    def _wait_for_end(self, numbers: Sequence[int]) -> None:
        """Wait until all ranks have ended that were sent these signals, and what they have started; not for long once
        one has failed."""
        while not self.group.has_ended:
            self._read_events(self.group.seconds_to_deadline())
            if self._signals is not None:
                self._signals.pass_on(self.group.send_signal)
                numbers = [*numbers, *self._signals.received]
            failure = self.group.first_failure
            if failure is not None and not is_by_signal(failure, numbers):
                self.group.stop_failed()
        self.group.end_leftovers()
        self._read_logs()

    def _read_events(self, timeout_seconds: float | None) -> None:
        channel = self._job.server.channel
        wait = _MONITOR_INTERVAL_SECONDS if timeout_seconds is None else min(timeout_seconds, _MONITOR_INTERVAL_SECONDS)
        while select.select([channel], [], [], wait)[0]:
            self.group.read()
            wait = 0
        self._read_logs()

    def _read_logs(self) -> None:
        if self._job.logs is not None:
            self._job.logs.drain()
