"""Runs of the user's script, one after the other, in ranks that are forked from one warm server."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fabric_lite.bench.files import OBSERVER, figures_file
from fabric_lite.bench.results import THE_SCRIPTS, Combination
from fabric_lite.bench.turns import Turns
from fabric_lite.launch.environment import chosen_threads, rank_environment, server_environment
from fabric_lite.launch.failure import Failure, line_of, remedy, summary
from fabric_lite.launch.messages import Preload, StartRank
from fabric_lite.launch.process_tree import adopt_orphans
from fabric_lite.launch.rank import ScriptCall
from fabric_lite.launch.rank_group import RankGroup
from fabric_lite.launch.warm_server import WarmServer
from fabric_lite.run_config import RunConfig

__all__ = ["Outcome", "Runs"]

_PRELOADED = ("fabric_lite.bench.observer", "fabric_lite.fabric", "torch.distributed.fsdp")
_ADDRESS = "127.0.0.1"
_LITTLE_ROOM = 1 << 20


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run has ended.

    Args:
        folder: What the ranks have left.
        failure: In one line, what went wrong; None if nothing did.
        figures: What each rank has measured, by rank; empty after a failure.
    """

    folder: Path
    failure: str | None
    figures: list[dict[str, Any]]


class Runs:
    """A context in which the script can be run; on leaving it nothing of the ranks is left.

    Args:
        script: What every rank runs.
        folder: For what the ranks leave.
        accelerator: As in ``Fabric(accelerator=)``; None is the script's own choice.
        timeout_seconds: A run that takes longer is ended, and has failed.
    """

    def __init__(self, script: ScriptCall, folder: Path, accelerator: str | None, timeout_seconds: float) -> None:
        self._script, self._folder, self._accelerator = script, folder, accelerator
        self._timeout = timeout_seconds
        self._count = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Runs:
        with contextlib.ExitStack() as stack:
            stack.enter_context(adopt_orphans())
            self._output = os.open(self._folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            stack.callback(os.close, self._output)
            environment = server_environment(os.environ, None)
            self._server = WarmServer(self._script, environment=environment, pass_descriptors=[self._output])
            stack.callback(self._server.close)
            self._selector = stack.enter_context(selectors.DefaultSelector())
            self._group = RankGroup(self._server)
            self._selector.register(self._server.channel, selectors.EVENT_READ, self._group.read)
            # Once, instead of in every rank of every run.
            self._server.send(Preload(_PRELOADED))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, combination: Combination, **options: Any) -> Outcome:
        """Run the script once, watched by a :class:`~fabric_lite.bench.observer.StepObserver` with these options."""
        folder = self._new_folder()
        requests = self._requests(combination, folder, 0, self._timeout, options)
        is_late = self._run_to_end(requests, self._timeout)
        return self._outcome(folder, combination.devices, is_late=is_late)

    def run_in_turns(
        self,
        combinations: Sequence[Combination],
        *,
        steps_of_turns: Sequence[int],
        warmup: int,
        steps: int,
        timeout_seconds: float,
    ) -> list[Outcome] | None:
        """Run the script in all combinations at once, which take turns after their first step.

        None where anything has failed or all of it takes longer than the timeout: which of them that was is seen when
        they run one after the other.
        """
        folders = [self._new_folder() for _ in combinations]
        ranks = [combination.devices for combination in combinations]
        options = {"warmup": warmup, "steps": steps, "takes_turns": True}
        requests: list[StartRank] = []
        for combination, folder in zip(combinations, folders, strict=True):
            requests += self._requests(combination, folder, len(requests), timeout_seconds, options)
        turns = Turns(folders, ranks, first=warmup, last=warmup + steps, steps=steps_of_turns, seed=self._count)
        self._selector.register(turns.reports, selectors.EVENT_READ, turns.read)
        try:
            is_late = self._run_to_end(requests, timeout_seconds, turns)
        finally:
            self._selector.unregister(turns.reports)
            turns.close()
        outcomes = [self._outcome(folder, count, is_late=is_late) for folder, count in zip(folders, ranks, strict=True)]
        if turns.have_ended and all(outcome.failure is None for outcome in outcomes):
            return outcomes
        for folder in folders:
            shutil.rmtree(folder)
        return None

    def _new_folder(self) -> Path:
        folder = self._folder / f"run_{self._count}"
        folder.mkdir()
        self._count += 1
        return folder

    def _run_to_end(self, requests: Sequence[StartRank], limit: float, turns: Turns | None = None) -> bool:
        """Start these ranks and wait until nothing is left of them; whether they took longer than so many seconds."""
        deadline = time.monotonic() + limit
        # Nobody reads what earlier runs have printed, which would fill the disk in time.
        os.ftruncate(self._output, 0)
        self._group.start(requests)
        while not self._group.has_ended:
            left = [deadline - time.monotonic()] if not self._group.is_stopping else []
            limits = [seconds for seconds in (self._group.seconds_to_deadline(), *left) if seconds is not None]
            for key, _ in self._selector.select(max(min(limits), 0.0) if limits else None):
                key.data()
            if self._group.first_failure is not None:
                self._group.stop_failed()
            elif time.monotonic() > deadline or self._is_turn_lost(turns, len(requests)):
                self._group.stop(grace_seconds=0.0, number=signal.SIGKILL)
        is_late = time.monotonic() > deadline
        self._group.end_leftovers()
        return is_late

    def _is_turn_lost(self, turns: Turns | None, ranks: int) -> bool:
        """Whether some have left in the middle, which the others would wait for."""
        return turns is not None and not turns.have_ended and len(self._group.running) < ranks

    def _outcome(self, folder: Path, ranks: int, *, is_late: bool) -> Outcome:
        failure = self._group.first_failure
        if failure is not None and not (is_late and failure.is_after_kill):
            return Outcome(folder, _said_of_failure(failure, folder), [])
        if is_late:
            return Outcome(folder, f"took longer than {self._timeout:g} s", [])
        files = [figures_file(folder, rank) for rank in range(ranks)]
        if not all(map(Path.exists, files)):
            return Outcome(folder, "the script never set up an optimizer with fabric.setup()", [])
        return Outcome(folder, None, [json.loads(file.read_text()) for file in files])

    def _requests(
        self, combination: Combination, folder: Path, first: int, limit: float, options: dict[str, Any]
    ) -> list[StartRank]:
        """The ranks of a job of so many seconds, which the server knows by numbers from ``first`` on."""
        port = self._group.host_store(_ADDRESS, 0)  # the first time it waits until the server has loaded torch
        ranks = combination.devices
        config = RunConfig(
            accelerator=self._accelerator,
            strategy=_said(combination.strategy),
            precision=_said(combination.precision),
            devices=str(ranks),
            threads_per_rank=chosen_threads(os.environ, ranks),
            hang_timeout=limit / 2,
            callback=OBSERVER,
            callback_options=options
            | {"folder": str(folder), "batch_size": combination.batch_size, "started_at": time.monotonic()},
            scratch_folder=str(folder / "scratch"),
        )
        return [
            StartRank(
                first + rank,
                _environment(rank, ranks, port, folder),
                dataclasses.asdict(config),
                stdout_fd=self._output,
                stderr_fd=self._output,
                error_log=str(folder / f"error_{rank}.txt"),
            )
            for rank in range(ranks)
        ]


def _environment(rank: int, ranks: int, port: int, folder: Path) -> dict[str, str]:
    return rank_environment(
        rank=rank,
        world_size=ranks,
        local_rank=rank,
        local_world_size=ranks,
        node_rank=0,
        num_nodes=1,
        main_address=_ADDRESS,
        main_port=port,
        error_file=str(folder / f"error_{rank}.json"),
    )


def _said_of_failure(failure: Failure, folder: Path) -> str:
    """Rank, cause, the user's line and what to try in one line, with a guess at what a cause does not say itself."""
    hint = " (perhaps the machine ran out of memory)" if failure.exit_code == -signal.SIGKILL else ""
    if shutil.disk_usage(folder).free < _LITTLE_ROOM:
        hint += f" (there is no room left in {folder.parent})"
    line = line_of(failure)
    place = "" if line is None else f", at {line}"
    return "; ".join(filter(None, (summary(failure).removesuffix(".") + place + hint, remedy(failure))))


def _said(name: str) -> str | None:
    return None if name == THE_SCRIPTS else name
