"""What a rank that runs a function says at its end, and which of several failures is the one to raise."""

from __future__ import annotations

import dataclasses
import pickle
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from fabric_lite import process_end
from fabric_lite.errors import LaunchError
from fabric_lite.launch.failure import ending, python_exit_code
from fabric_lite.run_config import EXIT_PREEMPTED

__all__ = ["Answer", "RankTraceback", "is_preempted", "pickled_error", "pickled_value", "raise_first_failure"]


class RankTraceback(Exception):
    """The traceback of an exception in another process, as text; the cause of the exception that is raised here."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f"on rank {rank}:\n{text}")


@dataclasses.dataclass(frozen=True)
class Answer:
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


def pickled_value(value: Any, dumps: Callable[[Any], bytes] = pickle.dumps) -> bytes:
    try:
        # Pickled by value: a tensor sent the way torch's queues do would need this process to live on.
        return dumps(Answer(value))
    except Exception as error:
        raise LaunchError(
            "The function's return value cannot be pickled, so it cannot come back from rank 0.",
            given=f"a value of type {type(value).__qualname__}: {error}",
            fix="return numbers, tensors, state dicts or nothing; save the rest to a file",
        ) from error


def pickled_error(error: BaseException, dumps: Callable[[Any], bytes] = pickle.dumps) -> bytes:
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    if isinstance(error, SystemExit):
        return pickle.dumps(Answer(None, text, python_exit_code(error)))
    answer = Answer(error, text)
    try:
        packed = dumps(answer)
        pickle.loads(packed)
    except Exception:
        # An exception may need arguments that it does not keep, or hold what cannot be pickled: its words travel.
        return pickle.dumps(dataclasses.replace(answer, value=None))
    return packed


def is_preempted(rank: int, answers: Mapping[int, Answer]) -> bool:
    """Whether the rank has left because it was asked to, and has saved its work; the others take their time for it."""
    return rank in answers and answers[rank].exit_code == EXIT_PREEMPTED


def raise_first_failure(ended: Mapping[int, int], answers: Mapping[int, Answer]) -> None:
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


def _raise_failure(rank: int, answers: Mapping[int, Answer]) -> NoReturn:
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
    rank: int, exit_code: int | None, answers: Mapping[int, Answer], cause: RankTraceback | None = None
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


def _departures(answers: Mapping[int, Answer], before: float) -> list[str]:
    """Who was missing when the others still waited: the likely reason for an error inside a collective."""
    left = [rank for rank, answer in answers.items() if not answer.is_failure and answer.time <= before]
    return [f"Before it, rank {rank} had left without a failure." for rank in sorted(left)]
