"""What fails on one rank fails on all, and the system's errors come as errors of the checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fabric_lite.checkpoint.memory import is_out_of_memory
from fabric_lite.checkpoint.remote import Target
from fabric_lite.collectives import (
    broadcast_object,
    gather_objects,
    is_distributed,
    results_together,
)
from fabric_lite.errors import CheckpointError, FabricError

__all__ = ["Together", "lost_ranks_explained", "on_every_rank", "system_errors_explained"]

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Together:
    """How the ranks work together at one checkpoint; every rank calls the same methods in the same order.

    Args:
        group: The process group, of all ranks; None is the default one. A thread beside the training loop has one of
            its own: on a shared one its collectives would be paired with those of the step.
    """

    group: Any = None

    def on_every_rank(self, what: str, function: Callable[..., Result], *args: Any) -> Result:
        """Call ``function`` and raise on every rank if it raised on any."""
        result: Result

        def run() -> None:
            nonlocal result
            result = function(*args)

        self.results(what, run)
        return result

    def results(self, what: str, function: Callable[..., Result], *args: Any) -> list[Result]:
        """:meth:`on_every_rank`, and the results of all ranks, by rank, in one exchange; they must be picklable."""
        own: list[Exception] = []

        def run() -> Result:
            try:
                return function(*args)
            except Exception as error:
                own.append(error)
                raise

        with lost_ranks_explained(what, own):
            return results_together(run, what, CheckpointError, self.group)

    def all_soon(self, mine: bool) -> Callable[[], bool]:
        """Begin to ask whether ``mine`` is true on every rank; the function returned waits for the answer."""
        if not is_distributed():
            return lambda: mine
        answer = torch.tensor(int(mine), device="cpu")
        with lost_ranks_explained("save()"):
            asked = dist.all_reduce(answer, dist.ReduceOp.MIN, group=self.group, async_op=True)

        def waited() -> bool:
            with lost_ranks_explained("save()"):
                asked.wait()
            return bool(answer)

        return waited

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable ``value``, by rank, on every rank."""
        with lost_ranks_explained("save()"):
            return gather_objects(value, self.group)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable ``value``, on every rank."""
        with lost_ranks_explained("save()"):
            return broadcast_object(value, group=self.group)


def on_every_rank(what: str, function: Callable[..., Result], *args: Any) -> Result:
    """:meth:`Together.on_every_rank` through the default group."""
    return Together().on_every_rank(what, function, *args)


@contextlib.contextmanager
def system_errors_explained(target: Target) -> Iterator[None]:
    """Raise CheckpointError for what the system did not allow in writing ``target``."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save has both for a disk that is full
        if isinstance(error, FabricError):
            raise
        cause = _cause(error)
        raise CheckpointError(
            "The checkpoint could not be written; what was there before is as it was.",
            given=f"{target}: {type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause) else ''}",
            fix="a folder that can be written to, on a disk with room for a second copy",
        ) from error


@contextlib.contextmanager
def lost_ranks_explained(what: str, own: Sequence[Exception] = ()) -> Iterator[None]:
    """Raise CheckpointError where ``what`` can't go on because another rank has ended.

    For nothing but the calls that communicate: any RuntimeError in the block is taken for the backend's, but for a lack
    of memory, and for ``own``, what this rank's part raised.
    """
    try:
        yield
    except RuntimeError as error:
        if error in own or isinstance(error, FabricError) or is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{what} could not go on, since the ranks lost each other; what was there before is as it was.",
            given=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            fix="see the messages of the rank that ended first",
        ) from error


def _cause(error: BaseException) -> BaseException:
    """The system's word behind an error: torch.save hides a full disk under "unexpected pos 704 vs 598"."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__context__
    return link or error
