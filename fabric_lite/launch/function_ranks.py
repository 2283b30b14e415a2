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
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Literal, NoReturn

from fabric_lite import process_end, run_config
from fabric_lite.call_site import names_of
from fabric_lite.errors import LaunchError
from fabric_lite.launch.environment import chosen_threads, listen_on, rank_environment, serve_store
from fabric_lite.launch.failure import ending, python_exit_code
from fabric_lite.launch.job import (
    FAILURE_GRACE_SECONDS,
    PASSED_ON,
    PREEMPTION_GRACE_SECONDS,
    SAVE_GRACE_SECONDS,
    SIGNAL_GRACE_SECONDS,
    Signals,
)
from fabric_lite.launch.process_tree import adopt_orphans, descendants, die_with_parent, end_descendants
from fabric_lite.launch.rank import run_to_end
from fabric_lite.run_config import EXIT_PREEMPTED, RunConfig

__all__ = ["RankTraceback", "StartMethod", "run_function"]

StartMethod = Literal["spawn", "fork", "forkserver"]
# Between SIGTERM and SIGKILL for what ranks leave behind, such as the workers of a loader.
_LEFTOVER_SECONDS = 1.0
# How long after a failure another rank may still turn out to have caused it, by ending without a word.
_SILENT_END_SECONDS = 0.1


class RankTraceback(Exception):
    """The traceback of an exception in another process, as text; the cause of the exception that is raised here."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f"on rank {rank}:\n{text}")


class _EndedBySignal(Exception):
    """A rank has ended by a signal that was passed on to it."""

    def __init__(self, number: int, error: LaunchError) -> None:
        super().__init__(number)
        self.number = number
        self.error = error


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What a rank says at its end.

    Args:
        value: The function's value; with a trace, its exception, or None for one that cannot be pickled.
        trace: The traceback as text; for a rank that exits, too.
        exit_code: What the rank exits with, where it has called ``sys.exit``.
        time: When, by the clock that all processes share.
        is_saving: Whether an asynchronous save is under way, for whose end it waits before it exits.
    """

    value: Any
    trace: str | None = None
    exit_code: int | None = None
    time: float = dataclasses.field(default_factory=time.monotonic)
    is_saving: bool = dataclasses.field(default_factory=process_end.is_pending)

    @property
    def is_failure(self) -> bool:
        return self.trace is not None and self.exit_code not in (0, EXIT_PREEMPTED)


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

    # What a forked process has inherited is not its garbage: stores and groups crash when their threads are missing.
    gc.freeze()
    die_with_parent(os.getppid())
    # Out of the terminal's foreground: Ctrl-C comes from the launching program alone, and only once.
    os.setpgrp()
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        sys.exit(1)
    os.environ.update(environment)
    run_config.install(config)
    if config.threads_per_rank is not None:
        torch.set_num_threads(config.threads_per_rank)
    rank = os.getpid()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        value = run_to_end(lambda: function(*args, **kwargs))
        answer = _pickled_value(value if environment["RANK"] == "0" else None)
    except BaseException as error:
        if os.getpid() != rank:
            raise  # a process that the function has forked does not speak for the rank
        # Now, because gloo's connections close when the process ends, and the others fail by that.
        result.send_bytes(_pickled_error(error))
        sys.exit(error.code if isinstance(error, SystemExit) else 1)
    if os.getpid() == rank:
        result.send_bytes(answer)


def _pickled_value(value: Any) -> bytes:
    try:
        # Pickled by value: a tensor sent the way torch's queues do would need this process to live on.
        return pickle.dumps(_Answer(value))
    except Exception as error:
        raise LaunchError(
            "The function's return value cannot be pickled, so it cannot come back from rank 0.",
            given=f"a value of type {type(value).__qualname__}: {error}",
            fix="return numbers, tensors, state dicts or nothing; save the rest to a file",
        ) from error


def _pickled_error(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    if isinstance(error, SystemExit):
        return pickle.dumps(_Answer(None, text, python_exit_code(error)))
    answer = _Answer(error, text)
    try:
        packed = pickle.dumps(answer)
        pickle.loads(packed)
    except Exception:
        # An exception may need arguments that it does not keep, or hold what cannot be pickled: its words travel.
        return pickle.dumps(dataclasses.replace(answer, value=None))
    return packed


def _collect(started: list[tuple[BaseProcess, Connection]], signals: Signals | None) -> Any:
    """Wait for all ranks, or for the first failure, which is raised; pass signals on meanwhile."""
    answers: dict[int, _Answer] = {}
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
                    answers.setdefault(rank, _Answer(None, time=0.0))
            failed = {rank: code for rank, code in ended.items() if not _is_preempted(rank, answers)}
            try:
                _raise_first_failure(failed, answers)
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
    if any(_is_preempted(rank, answers) for rank in answers):
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


def _deadline(answers: Mapping[int, _Answer], signals: Signals | None) -> float | None:
    """Until when the others may run, now that a rank has ended, as under fabric-run; None: as long as they like."""
    if any(_is_preempted(rank, answers) for rank in answers):
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


def _is_preempted(rank: int, answers: Mapping[int, _Answer]) -> bool:
    """Whether the rank has left because it was asked to, and has saved its work; the others take their time for it."""
    return rank in answers and answers[rank].exit_code == EXIT_PREEMPTED


def _look(waiting: Mapping[int, tuple[BaseProcess, Connection]], answers: dict[int, _Answer]) -> dict[int, int]:
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


def _raise_first_failure(ended: Mapping[int, int], answers: Mapping[int, _Answer]) -> None:
    """Raise if a rank has failed: of several, for the one that made the others fail."""
    failed = sorted((rank for rank in answers if answers[rank].is_failure), key=lambda rank: answers[rank].time)
    silent = {rank: code for rank, code in ended.items() if code != 0 and rank not in answers}
    for rank, code in silent.items():
        if code > 0:
            _raise_exit(rank, code, answers)
    # A rank that leaves by itself can make gloo abort the others; one that is killed makes them raise.
    if failed and answers[failed[0]].exit_code is not None:
        _raise_failure(failed[0], answers)
    for rank, code in ended.items():
        if code < 0:
            _raise_exit(rank, code, answers)
    if failed:
        _raise_failure(failed[0], answers)
    for rank, code in ended.items():
        _raise_exit(rank, code, answers)


def _receive(pipe: Connection) -> _Answer | None:
    """Return what a rank has said, if it has; one that ends without a word has its exit code to tell."""
    try:
        return pickle.loads(pipe.recv_bytes()) if not pipe.closed and pipe.poll() else None
    except EOFError:
        # Once the end was seen, waiting for it again would return at once, for ever.
        pipe.close()
        return None


def _raise_failure(rank: int, answers: Mapping[int, _Answer]) -> NoReturn:
    answer = answers[rank]
    text = answer.trace or ""
    error = answer.value
    if answer.exit_code is not None:
        _raise_exit(rank, answer.exit_code, answers, RankTraceback(rank, text))
    if error is None:
        error = LaunchError(
            f"Rank {rank} failed: {text.strip().splitlines()[-1]}", fix="see its traceback, the cause of this error"
        )
    raise error from RankTraceback(rank, "\n".join([text.rstrip("\n"), *_departures(answers, answer.time)]))


def _raise_exit(
    rank: int, exit_code: int | None, answers: Mapping[int, _Answer], cause: RankTraceback | None = None
) -> None:
    if exit_code is not None and exit_code < 0:
        what = f"Rank {rank} was {ending(exit_code)}."
        given = " ".join(_departures(answers, time.monotonic())) or None
        raise LaunchError(what, given=given, fix="see the system's log: the machine may have run out of memory")
    if exit_code:
        given = None if cause is None else str(cause).strip().splitlines()[-1]
        raise LaunchError(
            f"Rank {rank} exited with code {exit_code}.", given=given, fix="return from the function instead"
        ) from cause


def _departures(answers: Mapping[int, _Answer], before: float) -> list[str]:
    """Who was missing when the others still waited: the likely reason for an error inside a collective."""
    left = [rank for rank, answer in answers.items() if not answer.is_failure and answer.time <= before]
    return [f"Before it, rank {rank} had left without a failure." for rank in sorted(left)]


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
