"""Short-lived ranks for fault tests: forked from one warm process, so that one that is killed costs milliseconds.

    with Nursery() as nursery:
        ends = nursery.run(save_and_be_killed, path, ranks=2)     # one End per rank

A function is at the top level of a module. With more than one rank, the ranks are joined by gloo when it is called.
The ranks of one call are a process group of their own: ``os.killpg(0, SIGKILL)`` in one of them ends all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["End", "Nursery"]

TIMEOUT = datetime.timedelta(seconds=30)
# What the ranks would each import: torch's compiler, at the first sharded tensor, takes half a second.
PRELOAD = (
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "fabric_lite.fabric",
    "fabric_lite.checkpoints",
)


@dataclasses.dataclass(frozen=True)
class End:
    """How a rank ended: its exit code, negative for a signal, and what its function returned, if it did."""

    code: int
    value: Any = None


class Nursery:
    """A warm process that forks ranks on demand; a context manager.

    Args:
        preload: Modules that it imports once, for all ranks.
    """

    def __init__(self, preload: Sequence[str] = PRELOAD) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, list(sys.path), tuple(preload)), daemon=False)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()
        self._process.join()

    def run(
        self, function: Callable[..., Any], *args: Any, ranks: int = 1, kill: tuple[Path, float] | None = None
    ) -> list[End]:
        """Call ``function(*args)`` on new ranks and wait until all have ended; an End for each, by rank.

        With ``kill``, a path and seconds, all are killed so long after there is a file of that name.
        """
        self._pipe.send((function, args, ranks, kill))
        return self._pipe.recv()  # type: ignore[no-any-return]


def _serve(pipe: Any, path: list[str], preload: tuple[str, ...]) -> None:
    sys.path[:] = path
    import torch

    for name in preload:
        importlib.import_module(name)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(_forked(*pipe.recv()))


def _forked(
    function: Callable[..., Any], args: tuple[Any, ...], ranks: int, kill: tuple[Path, float] | None
) -> list[End]:
    with tempfile.TemporaryDirectory(prefix="fabric_lite_nursery_") as folder:
        processes: list[int] = []
        for rank in range(ranks):
            process = os.fork()
            if process == 0:
                os.setpgid(0, processes[0] if processes else 0)
                _live(function, args, rank, ranks, Path(folder))
            # Here too: whoever comes first.
            with contextlib.suppress(OSError):
                os.setpgid(process, processes[0] if processes else process)
            processes.append(process)
        if kill is not None:
            _kill_later(processes, *kill)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        files = [Path(folder) / f"value-{rank}" for rank in range(ranks)]
        values = [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]
    return [End(code, value) for code, value in zip(codes, values, strict=True)]


def _kill_later(processes: list[int], ready: Path, seconds: float) -> None:
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(seconds)
    os.killpg(processes[0], signal.SIGKILL)


def _live(function: Callable[..., Any], args: tuple[Any, ...], rank: int, ranks: int, folder: Path) -> None:
    code = 1
    try:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
            GROUP_RANK="0", GROUP_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
        )  # fmt: skip
        if ranks > 1:
            import torch.distributed as dist

            store = dist.FileStore(str(folder / "store"), ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
        value = function(*args)
        written = folder / f"value-{rank}.part"
        written.write_bytes(pickle.dumps(value))
        written.rename(folder / f"value-{rank}")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
