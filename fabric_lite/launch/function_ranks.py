"""Ranks that run one function, started by multiprocessing from a running program."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Literal, NoReturn

from fabric_lite.call_site import names_of
from fabric_lite.errors import LaunchError
from fabric_lite.launch.environment import chosen_threads, rank_environment
from fabric_lite.launch.function_answers import (
    Answer,
    is_preempted,
    pickled_error,
    pickled_value,
    raise_first_failure,
)
from fabric_lite.launch.job import (
    FAILURE_GRACE_SECONDS,
    PASSED_ON,
    PREEMPTION_GRACE_SECONDS,
    SAVE_GRACE_SECONDS,
    SIGNAL_GRACE_SECONDS,
    Signals,
)
from fabric_lite.launch.process_tree import adopt_orphans, descendants, die_with_parent, end_descendants
from fabric_lite.launch.rank import become_rank, run_to_end
from fabric_lite.listening import listen_on, serve_store
from fabric_lite.run_config import EXIT_PREEMPTED, RunConfig

__all__ = ["StartMethod", "run_function"]

StartMethod = Literal["spawn", "fork", "forkserver"]
# Between SIGTERM and SIGKILL for what ranks leave behind, such as the workers of a loader.
_LEFTOVER_SECONDS = 1.0
# How long after a failure another rank may still turn out to have caused it, by ending without a word.
_SILENT_END_SECONDS = 0.1


class _EndedBySignal(Exception):
    """A rank has ended by a signal that was passed on to it."""

    def __init__(self, number: int, error: LaunchError) -> None:
        super().__init__(number)
        self.number = number
        self.error = error


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

    From the main thread, SIGINT, SIGTERM and SIGUSR1 are passed on to the ranks while they run, and a second one that
    is to end them kills them. Once a rank has ended by such a signal, this program gets it too.

    Raises:
        BaseException: The first failing rank's own exception; its traceback is the cause.
        LaunchError: A rank was killed or has exited, or processes cannot be forked any more.
        SystemExit: With ``EXIT_PREEMPTED``: the ranks were asked to leave, and have saved their work.
    """
    if start_method == "fork":
        _check_can_fork()
    try:
        return _run_function(function, args, kwargs, ranks, start_method, config)
    except _EndedBySignal as error:
        ended = error
    # Outside, because the KeyboardInterrupt that this may raise would show the other error as its context.
    os.kill(os.getpid(), ended.number)
    raise ended.error  # this program goes on, by a handler of its own


def _run_function(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    ranks: int,
    start_method: StartMethod,
    config: RunConfig,
) -> Any:
    threads = 1 if start_method == "fork" else chosen_threads(os.environ, ranks)
    context: Any = multiprocessing.get_context(start_method)
    with contextlib.ExitStack() as stack:
        stack.enter_context(adopt_orphans())
        listener = stack.enter_context(listen_on("127.0.0.1"))
        _start_helpers(start_method)
        others = descendants(os.getpid())
        stack.callback(end_descendants, os.getpid(), keep=others, grace_seconds=_LEFTOVER_SECONDS)
        port = listener.getsockname()[1]
        # What comes now waits, also in the new processes, until it can be passed on and taken.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
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
        store = serve_store(listener)
        try:
            with _signals() as signals:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                return _collect(started, signals)
        finally:
            # An exception's traceback would keep it, until a process that is forked later collects that as garbage and
            # crashes in its threads' absence.
            del store


def _signals() -> contextlib.AbstractContextManager[Signals | None]:
    """What comes from now on; only the main thread may take it."""
    return Signals() if threading.current_thread() is threading.main_thread() else contextlib.nullcontext()


def _check_can_fork() -> None:
    import torch

    if torch.cuda.is_initialized():
        raise LaunchError(
            "Processes cannot be forked once CUDA is in use: CUDA does not work in them.",
            given="start method 'fork' and an initialized CUDA context in this process",
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

    # What a forked process has inherited is not its garbage: stores and groups crash when their threads are missing.
    gc.freeze()
    die_with_parent(os.getppid())
    # Out of the terminal's foreground: Ctrl-C comes from the launching program alone, and only once.
    os.setpgrp()
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        sys.exit(1)
    become_rank(environment, config)
    if config.threads_per_rank is not None:
        torch.set_num_threads(config.threads_per_rank)
    rank = os.getpid()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        value = run_to_end(lambda: function(*args, **kwargs))
        answer = pickled_value(value if environment["RANK"] == "0" else None)
    except BaseException as error:
        if os.getpid() != rank:
            raise  # a process that the function has forked does not speak for the rank
        # Now, because gloo's connections close when the process ends, and the others fail by that.
        result.send_bytes(pickled_error(error))
        sys.exit(error.code if isinstance(error, SystemExit) else 1)
    if os.getpid() == rank:
        result.send_bytes(answer)


def _collect(started: list[tuple[BaseProcess, Connection]], signals: Signals | None) -> Any:
    """Wait for all ranks, or for the first failure, which is raised; pass signals on meanwhile."""
    answers: dict[int, Answer] = {}
    waiting = dict(enumerate(started))
    processes = [process for process, _ in started]
    deadline: float | None = None
    try:
        while waiting:
            pipes = [pipe for _, pipe in waiting.values() if not pipe.closed]
            seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
            _wait([*pipes, *(process.sentinel for process, _ in waiting.values())], seconds, processes, signals)
            ended = _look(waiting, answers)
            for rank, exit_code in ended.items():
                if exit_code == 0:
                    # One that leaves with 0 and without a word has no value to give.
                    answers.setdefault(rank, Answer(None, time=0.0))
            failed = {rank: code for rank, code in ended.items() if not is_preempted(rank, answers)}
            try:
                raise_first_failure(failed, answers)
            except LaunchError as error:
                _raise_if_by_signal(error, failed, signals)
                raise
            for rank in ended:
                del waiting[rank]
            if deadline is None and len(waiting) < len(started):
                deadline = _deadline(answers, signals)
            if waiting and deadline is not None and time.monotonic() >= deadline:
                _kill(waiting, signals)
    finally:
        saving = [processes[rank] for rank, answer in answers.items() if answer.is_failure and answer.is_saving]
        _end(processes, saving, signals)
    if any(is_preempted(rank, answers) for rank in answers):
        raise SystemExit(EXIT_PREEMPTED)
    return answers[0].value


def _wait(
    objects: Sequence[Any], seconds: float | None, processes: Sequence[BaseProcess], signals: Signals | None
) -> None:
    """Wait until one of the objects is ready, or a signal has come, and pass that on."""

    def send(number: int) -> None:
        for process in processes:
            if process.exitcode is None and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):  # a forkserver has seen its end first
                    os.kill(process.pid, number)

    multiprocessing.connection.wait([*objects, *([] if signals is None else [signals.fileno()])], seconds)
    if signals is not None:
        signals.clear()
        signals.pass_on(send)


def _raise_if_by_signal(error: LaunchError, ended: Mapping[int, int], signals: Signals | None) -> None:
    """Raise where a rank has ended by a signal that was passed on; Ctrl-C comes back as KeyboardInterrupt anyhow."""
    if signals is None:
        return
    number = next((-code for code in ended.values() if -code in signals.received), None)
    if number is not None:
        raise _EndedBySignal(number, error)
    if signals.has_killed and signals.ending is not None and -signal.SIGKILL in ended.values():
        words = LaunchError(
            "The ranks were killed, because a second signal came before they had ended by the first.",
            given=", ".join(signal.Signals(number).name for number in signals.received),
            fix="wait after the first: they may be saving their work",
        )
        raise _EndedBySignal(signals.ending, words)


def _deadline(answers: Mapping[int, Answer], signals: Signals | None) -> float | None:
    """Until when the others may run, now that a rank has ended, as under fabric-run; None: as long as they like."""
    if any(is_preempted(rank, answers) for rank in answers):
        return time.monotonic() + PREEMPTION_GRACE_SECONDS
    is_ending = signals is not None and signals.ending is not None
    return time.monotonic() + SIGNAL_GRACE_SECONDS if is_ending else None


def _kill(waiting: Mapping[int, tuple[BaseProcess, Connection]], signals: Signals | None) -> NoReturn:
    """Kill the ranks that still run after the deadline, and raise."""
    for process, _ in waiting.values():
        process.kill()
    error = LaunchError(
        f"Another rank had left long before, so that {names_of(waiting)} had to be killed.",
        fix="let all ranks leave after the same step: if fabric.should_stop: ...",
    )
    if signals is not None and signals.received:
        raise _EndedBySignal(signals.ending or signal.SIGUSR1, error)
    raise error


def _look(waiting: Mapping[int, tuple[BaseProcess, Connection]], answers: dict[int, Answer]) -> dict[int, int]:
    """Add what ranks have said to ``answers`` and return the exit codes of those that have ended.

    A rank that ends makes the others fail, and both may be here at once. Hence looks until one finds nothing new; an
    end that came before a word is then never missing, nor a word that came before an end.
    """
    while True:
        for process, _ in waiting.values():
            if multiprocessing.connection.wait([process.sentinel], timeout=0):
                # It is ending: the system closes what a process has open a moment before it reports the end.
                process.join()
        ended = {rank: process.exitcode for rank, (process, _) in waiting.items() if process.exitcode is not None}
        said = {rank: answer for rank, (_, pipe) in waiting.items() if (answer := _receive(pipe)) is not None}
        answers |= said
        has_failure = any(ended.values()) or any(answer.is_failure for answer in answers.values())
        others = [process.sentinel for rank, (process, _) in waiting.items() if rank not in {*ended, *answers}]
        if not said and not (has_failure and multiprocessing.connection.wait(others, _SILENT_END_SECONDS)):
            return ended


def _receive(pipe: Connection) -> Answer | None:
    """Return what a rank has said, if it has; one that ends without a word has its exit code to tell."""
    try:
        return pickle.loads(pipe.recv_bytes()) if not pipe.closed and pipe.poll() else None
    except EOFError:
        # Once the end was seen, waiting for it again would return at once, for ever.
        pipe.close()
        return None


def _end(processes: Sequence[BaseProcess], saving: Sequence[BaseProcess], signals: Signals | None) -> None:
    """End the ranks that still run, by SIGKILL after the grace; those that are saving have time for it before.

    Ranks that were told to end may be saving too, if one of them has ended by it already.
    """
    is_ending = signals is not None and signals.ending is not None
    for waited_for, seconds in (
        (saving, SAVE_GRACE_SECONDS),
        (processes, SIGNAL_GRACE_SECONDS if is_ending else FAILURE_GRACE_SECONDS),
    ):
        deadline = time.monotonic() + seconds
        while running := [process.sentinel for process in waited_for if process.exitcode is None]:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            _wait(running, left, processes, signals)
    for process in processes:
        if process.exitcode is None:
            process.kill()
        process.join()
        process.close()
