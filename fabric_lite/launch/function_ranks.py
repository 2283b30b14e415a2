"""Ranks that run one function, started by multiprocessing from a running program."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Literal, NoReturn

from fabric_lite import run_config
from fabric_lite.errors import LaunchError
from fabric_lite.launch.environment import chosen_threads, listen_on, rank_environment, serve_store
from fabric_lite.launch.process_tree import adopt_orphans, descendants, die_with_parent, end_descendants
from fabric_lite.run_config import RunConfig

__all__ = ["RankTraceback", "StartMethod", "run_function"]

StartMethod = Literal["spawn", "fork", "forkserver"]
_GRACE_SECONDS = 5.0


class RankTraceback(Exception):
    """The traceback of an exception in another process, as text; the cause of the exception that is raised here."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f"on rank {rank}:\n{text}")


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What a rank says at its end.

    Args:
        value: The function's value; with a trace, its exception, or None for one that cannot be pickled.
        trace: The traceback as text.
        time: When, by the clock that all processes share.
    """

    value: Any
    trace: str | None = None
    time: float = 0.0


def run_function(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    ranks: int,
    start_method: StartMethod,
    config: RunConfig,
) -> Any:
    """Call ``function(*args, **kwargs)`` in ``ranks`` new processes and return rank 0's value.

    Each has torchrun's environment variables and ``config``. With ``"spawn"`` and ``"forkserver"`` function, arguments
    and value are pickled; with ``"fork"`` only the value is, and each rank has one thread.

    Raises:
        BaseException: The first failing rank's own exception; its traceback is the cause.
        LaunchError: A rank was killed or has exited, or processes cannot be forked any more.
    """
    if start_method == "fork":
        _check_can_fork()
    threads = 1 if start_method == "fork" else chosen_threads(os.environ, ranks)
    context: Any = multiprocessing.get_context(start_method)
    with contextlib.ExitStack() as stack:
        stack.enter_context(adopt_orphans())
        listener = stack.enter_context(listen_on("127.0.0.1"))
        _start_helpers(start_method)
        others = descendants(os.getpid())
        stack.callback(end_descendants, os.getpid(), keep=others, grace_seconds=_GRACE_SECONDS)
        port = listener.getsockname()[1]
        started = []
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            stack.callback(ours.close)
            environment = _environment(rank, ranks, port)
            process = context.Process(
                target=_run_rank,
                args=(function, tuple(args), dict(kwargs), environment, _with_threads(config, threads), theirs),
                name=f"rank {rank}",
            )
            process.start()
            theirs.close()
            started.append((process, ours))
        # Only now, because the store runs a thread and forking must come before.
        _store = serve_store(listener)
        return _collect(started)


def _check_can_fork() -> None:
    import torch

    if torch.cuda.is_initialized():
        raise LaunchError(
            "Processes cannot be forked once CUDA is in use: CUDA does not work in them.",
            given="start method 'fork' and an initialised CUDA context in this process",
            fix="launch before the first .cuda() or .to('cuda') (restart the notebook), or strategy='ddp_spawn'",
        )


def _start_helpers(start_method: StartMethod) -> None:
    """Start the processes that multiprocessing keeps for this program, so that they are not taken for the ranks'."""
    if start_method != "fork":
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()
    if start_method == "forkserver":
        from multiprocessing import forkserver

        forkserver.ensure_running()


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    environment = rank_environment(
        rank=rank,
        world_size=ranks,
        local_rank=rank,
        local_world_size=ranks,
        node_rank=0,
        num_nodes=1,
        main_address="127.0.0.1",
        main_port=port,
        error_file="",
    )
    # Exceptions come back as themselves, not by a file.
    del environment["TORCHELASTIC_ERROR_FILE"]
    return environment


def _with_threads(config: RunConfig, threads: int | None) -> RunConfig:
    return dataclasses.replace(config, threads_per_rank=threads)


def _run_rank(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    environment: dict[str, str],
    config: RunConfig,
    result: Connection,
) -> None:
    """The life of one rank: ends by exit code 0 and its value in the pipe, or 1 and its exception."""
    import torch

    die_with_parent(os.getppid())
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        sys.exit(1)
    os.environ.update(environment)
    run_config.install(config)
    if config.threads_per_rank is not None:
        torch.set_num_threads(config.threads_per_rank)
    try:
        value = function(*args, **kwargs)
        # Pickled by value: a tensor sent the way torch's queues do would need this process to live on.
        answer = pickle.dumps(_Answer(value if environment["RANK"] == "0" else None))
    except SystemExit:
        raise
    except BaseException as error:
        result.send_bytes(_pickled_error(error))
        sys.exit(1)
    result.send_bytes(answer)


def _pickled_error(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        packed = pickle.dumps(_Answer(error, text, time.monotonic()))
        pickle.loads(packed)
    except Exception:
        # An exception may need arguments that it does not keep, or hold what cannot be pickled: its words travel.
        return pickle.dumps(_Answer(None, text, time.monotonic()))
    return packed


def _collect(started: list[tuple[BaseProcess, Connection]]) -> Any:
    """Wait for all ranks, or for the first failure, which is raised."""
    answers: dict[int, _Answer] = {}
    waiting = dict(enumerate(started))
    try:
        while waiting:
            pipes = [pipe for _, pipe in waiting.values() if not pipe.closed]
            multiprocessing.connection.wait([*pipes, *(process.sentinel for process, _ in waiting.values())])
            killed = [rank for rank, (process, _) in waiting.items() if (process.exitcode or 0) < 0]
            answers |= {rank: answer for rank, (_, pipe) in waiting.items() if (answer := _receive(pipe)) is not None}
            # A rank that left by itself can make gloo abort the others; one that was killed makes them raise; of
            # several that raise, the first is why.
            left = [
                rank for rank, (process, _) in waiting.items() if rank not in answers and (process.exitcode or 0) > 0
            ]
            for rank in [*left, *killed]:
                _raise_exit(rank, waiting[rank][0].exitcode)
            if failed := [rank for rank, answer in answers.items() if answer.trace is not None]:
                _raise_error(*min(((rank, answers[rank]) for rank in failed), key=lambda pair: pair[1].time))
            for rank in [rank for rank, (process, _) in waiting.items() if process.exitcode is not None]:
                _raise_exit(rank, waiting.pop(rank)[0].exitcode)
    finally:
        _end([process for process, _ in started])
    return answers[0].value if 0 in answers else None


def _receive(pipe: Connection) -> _Answer | None:
    """Return what a rank has said, if it has; one that ends without a word has its exit code to tell."""
    try:
        return pickle.loads(pipe.recv_bytes()) if not pipe.closed and pipe.poll() else None
    except EOFError:
        # Once the end was seen, waiting for it again would return at once, for ever.
        pipe.close()
        return None


def _raise_error(rank: int, answer: _Answer) -> NoReturn:
    text = answer.trace or ""
    error = answer.value
    if error is None:
        error = LaunchError(
            f"Rank {rank} failed: {text.strip().splitlines()[-1]}", fix="see its traceback, the cause of this error"
        )
    raise error from RankTraceback(rank, text)


def _raise_exit(rank: int, exit_code: int | None) -> None:
    if exit_code is not None and exit_code < 0:
        what = f"Rank {rank} was killed by {signal.Signals(-exit_code).name}."
        raise LaunchError(what, fix="see the system's log: the machine may have run out of memory")
    if exit_code:
        raise LaunchError(f"Rank {rank} exited with code {exit_code}.", fix="return from the function instead")


def _end(processes: list[BaseProcess]) -> None:
    """End the ranks that still run: SIGTERM, then SIGKILL after the grace."""
    for process in processes:
        if process.exitcode is None:
            process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
        process.close()
