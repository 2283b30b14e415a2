"""The supervisor of one of several nodes: torchelastic's agent, with ranks from this node's own server.

Rendezvous, the numbering of ranks, restarts and membership are torchelastic's; only how a rank starts is ours.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined] # documented, not in torch's __all__
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from fabric_lite.errors import LaunchError
from fabric_lite.launch.environment import cores, listen_on, rank_environment, serve_store
from fabric_lite.launch.failure import exit_status, report
from fabric_lite.launch.job import (
    FAILURE_GRACE_SECONDS,
    SIGNAL_GRACE_SECONDS,
    Job,
    Signals,
    announce_threads,
    print_line,
)
from fabric_lite.launch.messages import Preload, StartRank
from fabric_lite.launch.plan import LaunchPlan, Rendezvous
from fabric_lite.launch.rank_group import RankGroup

__all__ = ["run_node"]

_RENDEZVOUS_TIMEOUT_SECONDS = 600
_MONITOR_INTERVAL_SECONDS = 0.1


def run_node(plan: LaunchPlan, rendezvous: Rendezvous, job: Job) -> int:
    """Run this node's ranks to their end and return the exit code for the shell."""
    announce_threads(job)
    if job.local_world_size > cores():
        job.server.send(Preload())
    handler = _StaticRendezvous(rendezvous) if rendezvous.backend == "static" else _torch_handler(rendezvous)
    spec = WorkerSpec(
        role="default",
        local_world_size=job.local_world_size,
        rdzv_handler=handler,
        max_restarts=plan.max_restarts,
        monitor_interval=_MONITOR_INTERVAL_SECONDS,
        entrypoint=plan.script.target,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        # A wait inside torch's store runs no Python, so only the signal's own default can end it.
        signal.signal(number, signal.SIG_DFL)
    with contextlib.closing(_Agent(spec, plan, job)) as agent:
        try:
            agent.run()
        except SignalException as error:
            print_line(f"fabric-run: ended by {signal.Signals(error.sigval).name}.")
            return exit_status(-error.sigval)
        finally:
            handler.shutdown()
        failure = agent.group.first_failure
    if failure is None:
        return 0
    print_line(report(failure))
    return exit_status(1 if failure.exit_code is None else failure.exit_code)


class _StaticRendezvous(RendezvousHandler):
    """All nodes are known by number; node 0 serves the store in which they meet, on the main address alone."""

    def __init__(self, rendezvous: Rendezvous) -> None:
        assert rendezvous.node_rank is not None
        self._node_rank = rendezvous.node_rank
        self._rendezvous = rendezvous
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        return "static"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        host, port = _split(self._rendezvous.endpoint)
        if self._store is None and self._node_rank == 0:
            self._store = serve_store(self._listen(host, port))
        elif self._store is None:
            timeout = timedelta(seconds=_RENDEZVOUS_TIMEOUT_SECONDS)
            self._store = TCPStore(host, port, None, False, timeout=timeout, wait_for_workers=False)
        return RendezvousInfo(
            PrefixStore(self._rendezvous.run_id, self._store),
            self._node_rank,
            self._rendezvous.num_nodes,
            RendezvousStoreInfo(host, port),
        )

    def _listen(self, host: str, port: int) -> socket.socket:
        try:
            return listen_on(host, port)
        except OSError as error:
            raise LaunchError(
                "Node 0 cannot listen on the main address.",
                given=f"--main-address {host} --main-port {port}: {error}",
                fix="an address of node 0 that the others reach, and a free port",
            ) from error

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._rendezvous.run_id

    def shutdown(self) -> bool:
        return True


def _torch_handler(rendezvous: Rendezvous) -> RendezvousHandler:
    parameters = RendezvousParameters(
        backend=rendezvous.backend,
        endpoint=rendezvous.endpoint,
        run_id=rendezvous.run_id,
        min_nodes=rendezvous.num_nodes,
        max_nodes=rendezvous.num_nodes,
        timeout=_RENDEZVOUS_TIMEOUT_SECONDS,
    )
    return get_rendezvous_handler(parameters)


class _Agent(SimpleElasticAgent):
    """torchelastic's agent whose workers are forked from the server."""

    def __init__(self, spec: WorkerSpec, plan: LaunchPlan, job: Job) -> None:
        super().__init__(spec)
        self.group = RankGroup(job.server)
        self._plan = plan
        self._job = job
        self._signals: Signals | None = None
        self._signals_passed_on = 0
        self._attempts = 0

    def close(self) -> None:
        """Give the signals back."""
        if self._signals is not None:
            self._signals.__exit__()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if self._signals is None:
            self._signals = Signals().__enter__()
        attempt = self._agree_on_attempt(worker_group)
        port = self._agree_on_port(worker_group, attempt)
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
            store.set(key, str(self.group.host_store(str(worker_group.master_addr), 0)))
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
        self._pass_signals_on(signals)
        if signals.received and len(self.group.running) < len(worker_group.workers):
            self._stop(SIGNAL_GRACE_SECONDS, None)
        failure = self.group.first_failure
        if failure is not None and signals.received:
            raise SignalException("passed on to the ranks, which have ended", signal.Signals(signals.received[0]))
        if failure is not None:
            self._stop(FAILURE_GRACE_SECONDS, signal.SIGTERM)
            return RunResult(WorkerState.FAILED, failures={failure.rank: self._process_failure(worker_group)})
        if self.group.has_ended:
            self.group.end_leftovers()
            return RunResult(WorkerState.SUCCEEDED, return_values={w.global_rank: None for w in worker_group.workers})
        return RunResult(WorkerState.HEALTHY)

    def _process_failure(self, worker_group: WorkerGroup) -> ProcessFailure:
        failure = self.group.first_failure
        assert failure is not None
        (local_rank,) = (w.local_rank for w in worker_group.workers if w.global_rank == failure.rank)
        exit_code = 1 if failure.exit_code is None else failure.exit_code
        error_file = self._job.error_file(local_rank, self._attempts - 1)
        return ProcessFailure(local_rank, self.group.pids[local_rank], exit_code, error_file)

    def _pass_signals_on(self, signals: Signals) -> None:
        for number in signals.received[self._signals_passed_on :]:
            self.group.send_signal(number if self._signals_passed_on == 0 else signal.SIGKILL)
            self._signals_passed_on += 1

    def _stop_workers(self, worker_group: WorkerGroup) -> None:  # torchelastic's signature
        self._stop(FAILURE_GRACE_SECONDS, signal.SIGTERM)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self._stop(timeout, death_sig)

    def _stop(self, grace_seconds: float, number: int | None) -> None:
        """End all ranks and what they have started, and wait until they have."""
        if self.group.has_ended:
            return
        self.group.stop(grace_seconds=grace_seconds, number=number)
        while not self.group.has_ended:
            self._read_events(self.group.seconds_to_deadline())
            if self._signals is not None:
                self._pass_signals_on(self._signals)
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


def _split(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    return host, int(port)
