"""The driver: numbers the ranks, waits for them, and starts all again after a failure."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pickle
import signal
import time
import uuid
from collections.abc import Sequence
from typing import Any

from fabric_lite.errors import LaunchError
from fabric_lite.launch.ending import is_by_signal
from fabric_lite.launch.failure import Failure
from fabric_lite.launch.function_answers import Answer, is_preempted
from fabric_lite.launch.job import PREEMPTION_GRACE_SECONDS, SAVE_GRACE_SECONDS, SIGNAL_GRACE_SECONDS, print_line
from fabric_lite.ray.actor import Place, Whereabouts
from fabric_lite.ray.cluster import Resources, places, start_actors
from fabric_lite.ray.signals import Asked
from fabric_lite.run_config import EXIT_PREEMPTED, RunConfig

__all__ = ["Job", "RankFailed", "numbered", "run_job"]

# How long a Ray worker may take to start; on a busy machine, or with a runtime environment, that is minutes.
_START_SECONDS = 600.0
# How long after a failure another rank may still turn out to have caused it, by dying without a word.
_SILENT_END_SECONDS = 2.0
# How long a rank that has finished may take for its exit handlers.
_LEAVE_SECONDS = 30.0
# How often the driver looks whether it was sent a signal, while it waits for Ray.
_LOOK_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to run.

    Args:
        program: A function without arguments, pickled by cloudpickle; every rank calls it.
        ranks: How many.
        resources: What each needs.
        config: What each is told, but for devices and nodes, which its place says.
        max_restarts: How often all start again after a failure.
        wait_seconds: How long the cluster may take to find places.
    """

    program: bytes
    ranks: int
    resources: Resources
    config: RunConfig
    max_restarts: int
    wait_seconds: float


class RankFailed(Exception):
    """The first failure of an attempt.

    Args:
        rank: The rank.
        address: Its node's address.
        answers: What ranks have said, this one too unless it died.
        death: What Ray knows of its death, in one line; None where the rank has told its failure itself.
    """

    def __init__(self, rank: int, address: str, answers: dict[int, Answer], death: str | None = None) -> None:
        self.rank, self.address, self.answers, self.death = rank, address, answers, death
        super().__init__(f"rank {rank} on node {address} {self._words()}")

    def _words(self) -> str:
        if self.death is not None:
            return f"died: {self.death}"
        answer = self.answers[self.rank]
        if answer.exit_code is not None:
            return f"failed: exit code {answer.exit_code}"
        return f"failed: {_first_line(answer)}"

    def is_by(self, asked: Asked) -> bool:
        """Whether the rank has ended because it was told to, as :func:`is_by_signal` says.

        Ray does not say of what signal a worker died, if any: a death soon after one was passed on is put down to it.
        """
        if not asked.received:
            return False
        if self.death is not None:
            return time.monotonic() - asked.passed_on_at < SIGNAL_GRACE_SECONDS
        answer = self.answers[self.rank]
        details = {"message": {"message": _first_line(answer)}}
        is_exit = answer.exit_code is not None
        return is_by_signal(Failure(self.rank, answer.exit_code or 1, "", details, is_exit), asked.received)


def run_job(job: Job) -> Any:
    """Run it on the cluster that this process is connected to, and return rank 0's value.

    Nothing of it is left on the cluster afterwards, however this ends.

    Raises:
        RankFailed: The last attempt's first failure; after a SIGTERM no other attempt follows.
        LaunchError: There are no places, or the actors could not be started.
        SystemExit: With ``EXIT_PREEMPTED``: the ranks were asked to leave, and have saved their work.
    """
    try:
        return _run_attempts(job)
    except _EndedBySignal as error:
        ended = error
    # Outside, because what this raises would show the other error as its context.
    print_line(f"fabric_lite.ray: ended by {signal.Signals(ended.number).name}: {ended.failure}")
    os.kill(os.getpid(), ended.number)
    raise ended.failure  # this program goes on, by a handler of its own


class _EndedBySignal(Exception):
    """A rank has ended by a signal that was passed on to it."""

    def __init__(self, number: int, failure: RankFailed) -> None:
        super().__init__(number)
        self.number, self.failure = number, failure


def _run_attempts(job: Job) -> Any:
    run_id = uuid.uuid4().hex[:12]
    with places(job.ranks, job.resources, job.wait_seconds) as group:
        for restart_count in range(job.max_restarts + 1):
            attempt = _Attempt(job, group, run_id, restart_count)
            try:
                with contextlib.closing(attempt):
                    return attempt.run()
            except RankFailed as failure:
                if failure.is_by(attempt.asked):
                    raise _EndedBySignal(attempt.asked.received[0], failure) from failure
                if signal.SIGTERM in attempt.asked.received or restart_count == job.max_restarts:
                    raise
                print_line(f"fabric_lite.ray: restart {restart_count + 1} of {job.max_restarts}: {failure}")
    raise AssertionError("unreachable")


def numbered(whereabouts: Sequence[Whereabouts]) -> list[int]:
    """Return the indices of the actors in the order of their ranks: node by node, in the order of their devices."""
    nodes = list(dict.fromkeys(at.node for at in whereabouts))
    return sorted(
        range(len(whereabouts)),
        key=lambda index: (nodes.index(whereabouts[index].node), whereabouts[index].device or 0, index),
    )


class _Attempt:
    """The actors of one attempt, by rank, from their start to their end."""

    def __init__(self, job: Job, group: Any, run_id: str, restart_count: int) -> None:
        self._job, self._group, self._run_id, self._restart_count = job, group, run_id, restart_count
        self._actors: list[Any] = []
        self._at: list[Whereabouts] = []
        self.asked = Asked()

    def run(self) -> Any:
        """Start the actors and wait for the ranks' end; return rank 0's value."""
        import ray

        self._start()
        port = self._serve()
        program = ray.put(self._job.program)
        pending = {
            self._actors[place.rank].run.remote(place, self._config(place), os.getcwd(), program): place.rank
            for place in self._numbered_places(port)
        }
        with self.asked:
            answers = self._collect(pending)
        self._let_leave()
        if any(is_preempted(rank, answers) for rank in answers):
            raise SystemExit(EXIT_PREEMPTED)
        return answers[0].value

    def close(self) -> None:
        """End all actors, whatever they do."""
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def _start(self) -> None:
        """Start an actor for each rank, and put them in the ranks' order.

        One that dies before any rank has begun was on a node that Ray did not yet know to be gone: all start again.
        """
        import ray

        deadline = time.monotonic() + _START_SECONDS
        while True:
            self._actors = start_actors(self._group, self._job.resources)
            asked = [actor.locate.remote() for actor in self._actors]
            try:
                at = ray.get(asked, timeout=max(0.0, deadline - time.monotonic()))
                break
            except ray.exceptions.GetTimeoutError as error:
                raise self._not_started(f"no answer after {_START_SECONDS:g} seconds") from error
            except ray.exceptions.RayError as error:
                lost_node = isinstance(error, (ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError))
                if not lost_node or "creation task" in str(error) or time.monotonic() > deadline:
                    raise self._not_started(_in_one_line(error)) from error
                self.close()
                if not self._group.wait(self._job.wait_seconds):
                    raise self._not_started(_in_one_line(error)) from error
        order = numbered(at)
        self._actors = [self._actors[index] for index in order]
        self._at = [at[index] for index in order]

    def _not_started(self, why: str) -> LaunchError:
        return LaunchError(
            f"The {self._job.ranks} ranks could not be started on the cluster.",
            given=why,
            fix="the same Python, Ray, torch and fabric_lite on every node; see Ray's logs there",
        )

    def _serve(self) -> int:
        """Let rank 0's actor serve the ranks' store; return its port."""
        import ray

        try:
            return int(ray.get(self._actors[0].serve.remote(self._main_address()), timeout=_START_SECONDS))
        except ray.exceptions.RayActorError as error:
            raise RankFailed(0, self._at[0].address, {}, _in_one_line(error)) from error

    def _main_address(self) -> str:
        # Ranks of one node need not be reached from elsewhere.
        return "127.0.0.1" if len({at.node for at in self._at}) == 1 else self._at[0].address

    def _numbered_places(self, port: int) -> list[Place]:
        nodes = [at.node for at in self._at]
        different = list(dict.fromkeys(nodes))
        return [
            Place(
                rank=rank,
                world_size=len(nodes),
                local_rank=nodes[:rank].count(node),
                local_world_size=nodes.count(node),
                node_rank=different.index(node),
                num_nodes=len(different),
                main_address=self._main_address(),
                main_port=port,
                run_id=self._run_id,
                restart_count=self._restart_count,
                max_restarts=self._job.max_restarts,
            )
            for rank, node in enumerate(nodes)
        ]

    def _config(self, place: Place) -> RunConfig:
        """What a rank is told: its node's devices are those of the node's ranks, in their order."""
        node = self._at[place.rank].node
        devices = [at.device for at in self._at if at.node == node]
        # A comma makes one index a list; without it, it would be a count.
        text, only = ",".join(map(str, devices)) + "," * (len(devices) == 1), None
        if None in devices:
            # They were given no GPU: those of the node are somebody else's.
            text, only = str(len(devices)), "cpu"
        return dataclasses.replace(self._job.config, only_accelerator=only, devices=text, num_nodes=place.num_nodes)

    def _collect(self, pending: dict[Any, int]) -> dict[int, Answer]:
        """Wait for all ranks, or raise the first failure; pass signals on meanwhile."""
        answers: dict[int, Answer] = {}
        deadline = math.inf
        while pending:
            ready = self._ready(pending, time.monotonic() + _LOOK_SECONDS)
            self.asked.pass_on([self._at[rank] for rank in pending.values()])
            self._take(ready, pending, answers)
            if deadline == math.inf and any(is_preempted(rank, answers) for rank in answers):
                # The others have saved the same checkpoint, and may still be writing.
                deadline = time.monotonic() + PREEMPTION_GRACE_SECONDS
            if pending and time.monotonic() > deadline:
                rank = min(pending.values())
                raise RankFailed(rank, self._at[rank].address, answers, "others had left for preemption long before")
        return answers

    def _take(self, ready: Sequence[Any], pending: dict[Any, int], answers: dict[int, Answer]) -> None:
        """Note what these ranks have said. A failure is raised once those have spoken that may have caused it."""
        failed: int | None = None
        until = 0.0
        while ready:
            for reference in ready:
                rank = pending.pop(reference)
                answers |= self._answer(reference, rank, answers)
                if failed is None and rank in answers and answers[rank].is_failure:
                    failed, until = rank, time.monotonic() + _SILENT_END_SECONDS
            # A rank that exits by itself was not made to by another; one that raises may have lost another.
            if failed is None or answers[failed].exit_code is not None or not pending:
                break
            ready = self._ready(pending, until)
        if failed is not None:
            if answers[failed].is_saving:
                self._ready({self._actors[failed].leave.remote(): failed}, time.monotonic() + SAVE_GRACE_SECONDS)
            raise RankFailed(failed, self._at[failed].address, answers)

    def _ready(self, references: dict[Any, int], until: float) -> Sequence[Any]:
        import ray

        ready, _ = ray.wait(list(references), timeout=max(0.0, until - time.monotonic()))
        return ready

    def _answer(self, reference: Any, rank: int, answers: dict[int, Answer]) -> dict[int, Answer]:
        """What the rank has said; raises where it has died."""
        import ray

        try:
            answer = pickle.loads(ray.get(reference))
        except ray.exceptions.RayError as error:
            raise RankFailed(rank, self._at[rank].address, answers, _in_one_line(error)) from error
        # By this process's clock: those of different machines cannot be compared.
        return {rank: dataclasses.replace(answer, time=time.monotonic())}

    def _let_leave(self) -> None:
        """Let all ranks end in order; rank 0, whose process serves the store, last."""
        for actors in (self._actors[1:], self._actors[:1]):
            leaving = {actor.leave.remote(): 0 for actor in actors}
            deadline = time.monotonic() + _LEAVE_SECONDS
            while leaving and (ready := self._ready(leaving, deadline)):
                for reference in ready:
                    del leaving[reference]


def _first_line(answer: Answer) -> str:
    """The type of the exception and the first line of its words."""
    if answer.value is not None:
        return f"{type(answer.value).__name__}: {answer.value}".splitlines()[0]
    # It could not be pickled; its words stand last in the traceback.
    return (answer.trace or "").strip().splitlines()[-1]


def _in_one_line(error: Exception) -> str:
    """What Ray says of an actor's death, without its table of ids and its list of possible causes."""
    text = " ".join(str(error).split())
    for start in ("Worker exit detail: ", "The actor is dead because "):
        if start in text:
            text = text.partition(start)[2]
            break
    for list_of_causes in (" There are some potential root causes", " Some common causes include"):
        text = text.partition(list_of_causes)[0]
    return text[:300]
