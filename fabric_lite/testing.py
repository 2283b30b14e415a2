"""Running a function on several ranks in tests, fast: the ranks stay warm from one call to the next.

    with RankPool() as pool:
        losses = pool.run(train_two_steps, "bf16-mixed", ranks=2)   # one value per rank

The function is a top-level function of an importable module. In it, ``Fabric(devices=2)`` finds its place as under
``fabric-run``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

__all__ = ["RankError", "RankPool"]


class RankError(Exception):
    """A function failed on a rank; the message is that rank's traceback."""

    def __init__(self, rank: int, kind: str, trace: str) -> None:
        super().__init__(f"rank {rank} raised {kind}\n{trace}")
        self.rank = rank
        self.kind = kind


class RankPool:
    """Warm ranks on CPU, connected by gloo; one group for each number of ranks that is asked for.

    A context manager, or to be closed with :meth:`close`.

    Args:
        timeout_seconds: A rank that takes longer is ended, and its group with it. Also the timeout of collectives.
    """

    def __init__(self, timeout_seconds: float = 60.0) -> None:
        self._timeout_seconds = timeout_seconds
        self._groups: dict[int, _Group] = {}

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, ranks: int = 2, **kwargs: Any) -> list[Any]:
        """Call ``function(*args, **kwargs)`` on each of ``ranks`` ranks; return their values, by rank.

        Args:
            function: Of a module, neither a lambda nor one from within another function: it travels by its name, and
                all else, its value too, is pickled.
            args: What it is called with.
            ranks: How many; those of an earlier call with as many are used again.
            kwargs: What it is called with by name.

        Raises:
            RankError: A rank raised, died or took too long; of several, the one that did so first.
        """
        group = self._groups.get(ranks)
        if group is None:
            group = self._groups[ranks] = _Group.start(ranks, self._timeout_seconds)
        try:
            return group.call(function, args, kwargs, self._timeout_seconds)
        except BaseException:
            # The others may be in the middle of a collective, or about to answer a call that nobody waits for.
            self._groups.pop(ranks).end()
            raise

    def close(self) -> None:
        """End all ranks."""
        while self._groups:
            self._groups.popitem()[1].end()


@dataclasses.dataclass
class _Group:
    processes: list[Any]
    pipes: list[multiprocessing.connection.Connection]
    folder: tempfile.TemporaryDirectory[str]

    @staticmethod
    def start(ranks: int, timeout_seconds: float) -> _Group:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch._dynamo", "fabric_lite.testing"])
        folder = tempfile.TemporaryDirectory(prefix="fabric_lite_ranks_", ignore_cleanup_errors=True)
        processes, pipes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            arguments = (rank, ranks, theirs, folder.name, timeout_seconds, list(sys.path))
            process = context.Process(target=_serve, args=arguments, daemon=False)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        return _Group(processes, pipes, folder)

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any, timeout_seconds: float) -> list[Any]:
        told = 0
        try:
            for pipe in self.pipes:
                pipe.send((function, args, kwargs))
                told += 1
        except OSError:
            raise self._died(told) from None
        values: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_seconds
        while len(values) < len(self.pipes):
            waiting = [rank for rank in range(len(self.pipes)) if rank not in values]
            timeout = max(0.0, deadline - time.monotonic())
            ready = multiprocessing.connection.wait([self.pipes[rank] for rank in waiting], timeout)
            if not ready:
                raise RankError(waiting[0], "nothing", f"ranks {waiting} took too long")
            for rank in [rank for rank in waiting if self.pipes[rank] in ready]:
                try:
                    succeeded, value = self.pipes[rank].recv()
                except (EOFError, OSError):
                    raise self._died(rank) from None
                if not succeeded:
                    raise RankError(rank, *value)
                values[rank] = value
        return [values[rank] for rank in range(len(self.pipes))]

    def _died(self, rank: int) -> RankError:
        self.processes[rank].join(5)
        return RankError(rank, "nothing", f"it died: exit code {self.processes[rank].exitcode}")

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(rank: int, ranks: int, pipe: Any, folder: str, timeout_seconds: float, path: list[str]) -> None:
    """A rank's life: join the group, then run one function after the other."""
    import datetime

    import torch
    import torch.distributed as dist
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    sys.path[:] = path
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    # Else a rank's own processes, data loader workers say, would be started as the rank was: a second's import each.
    multiprocessing.set_start_method(None, force=True)
    # The rank's bootstrap: exactly what a launcher gives it.
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
        GROUP_RANK="0", GROUP_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0", OMP_NUM_THREADS="1",
    )  # fmt: skip
    if ranks > 1:
        store = FileStore(os.path.join(folder, "store"), ranks)
        timeout = datetime.timedelta(seconds=timeout_seconds)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    # The other end closes when a call has failed, here or on another rank: then there is nobody left to tell.
    with contextlib.suppress(EOFError, OSError):
        while True:
            _answer(pipe, pipe.recv_bytes())


def _end_with_parent() -> None:
    """End this rank, wherever it is, when the process that started the pool has ended: killed, say, by a time limit."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _answer(pipe: Any, call: bytes) -> None:
    """Run one function, from the same random state each time, and send its value or its error."""
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    try:
        function, args, kwargs = pickle.loads(call)
        pipe.send((True, function(*args, **kwargs)))
    except BaseException as error:
        pipe.send((False, (type(error).__name__, traceback.format_exc())))
        if not isinstance(error, Exception):
            raise
