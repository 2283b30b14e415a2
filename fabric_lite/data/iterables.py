"""Any iterable of batches, set up: a list, a generator, somebody else's loader."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from fabric_lite.collectives import Collectives, gather_objects, is_distributed, rank
from fabric_lite.data.place import Place
from fabric_lite.errors import FabricRuntimeError, FabricValueError

__all__ = ["MovedIterable", "end_together"]

_OF_RANKS = "states of all ranks"


class MovedIterable:
    """An iterable of batches whose batches come on the device; every other attribute is the iterable's own.

    It cannot deal out: every rank sees all batches. It resumes by drawing what was seen and dropping it, unless the
    iterable has a ``state_dict`` of its own.

    Args:
        iterable: What was set up.
        move: Moves one batch; None leaves batches alone.
        together: Ends all ranks together, if given.
        is_shared: Whether to say that each rank sees all batches.
        owner: Who set it up; None once it is released.
    """

    def __init__(
        self,
        iterable: Any,
        *,
        move: Callable[[Any], Any] | None = None,
        together: Collectives | None = None,
        is_shared: bool = False,
        owner: Any = None,
    ) -> None:
        if is_shared:
            warnings.warn(
                f"A {type(iterable).__name__} is no DataLoader and is not dealt out: every rank sees all its batches. "
                "Pass a DataLoader, or use_distributed_sampler=False if that is what you want.",
                stacklevel=4,
            )
        self.iterable = iterable
        self.owner = owner
        self._move = move
        self._together = together
        self._epoch = 0
        self._to_skip = 0
        self._yielded = 0

    def __iter__(self) -> Iterator[Any]:
        inner = iter(self.iterable)
        skip, self._to_skip, self._yielded = self._to_skip, 0, 0
        return self._run(inner, skip)

    def _run(self, inner: Iterator[Any], skip: int) -> Iterator[Any]:
        self._yielded = sum(1 for _ in itertools.islice(inner, skip))
        if self._together is not None:
            inner = end_together(inner, self._together)
        for batch in inner:
            self._yielded += 1
            yield batch if self._move is None else self._move(batch)
        self._epoch, self._yielded = self._epoch + 1, 0

    def __len__(self) -> int:
        return len(self.iterable)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "iterable":
            raise AttributeError(name)
        return getattr(self.iterable, name)

    @property
    def movement(self) -> tuple[int, int]:
        """What changes with each batch that is handed out; for a look from any thread."""
        return self._epoch, self._yielded

    def set_epoch(self, epoch: int) -> None:
        """Note the epoch, and tell the iterable if it wants to know."""
        self._to_skip = self._to_skip if epoch == self._epoch else 0
        self._epoch = epoch
        if callable(own := getattr(self.iterable, "set_epoch", None)):
            own(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the place: the iterable's own state where it has one, of each of several ranks; then every rank
        calls."""
        if callable(own := getattr(self.iterable, "state_dict", None)):
            return {_OF_RANKS: gather_objects(own())} if is_distributed() else own()
        return {"epoch": self._epoch, "seen": self._yielded or self._to_skip}

    def place(self) -> Place:
        """The place for a person, counted in batches."""
        seen = self._yielded or self._to_skip
        return Place(self._epoch, seen, seen, "batches")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration go on at ``state_dict``."""
        if callable(own := getattr(self.iterable, "load_state_dict", None)):
            own(self._own_part(state_dict))
            return
        if iter(self.iterable) is self.iterable and self._yielded:
            raise FabricRuntimeError(
                "An iterator that was begun cannot go back.",
                given=f"{type(self.iterable).__name__} after {self._yielded} batches",
                fix="load before the first batch, or set up a DataLoader",
            )
        self._epoch, self._to_skip, self._yielded = state_dict["epoch"], state_dict["seen"], 0

    def _own_part(self, state_dict: dict[str, Any]) -> Any:
        if list(state_dict) != [_OF_RANKS]:
            return state_dict
        states, ranks = state_dict[_OF_RANKS], dist.get_world_size() if is_distributed() else 1
        if len(states) != ranks:
            raise FabricValueError(
                "The place of an iterable that reads on its own on each rank cannot be dealt out anew.",
                given=f"the states of {len(states)} ranks; here: {ranks}",
                fix="the same number of ranks, or a DataLoader over a dataset with indices",
            )
        return states[rank()]


def end_together(batches: Iterator[Any], ends: Collectives) -> Iterator[Any]:
    """Yield from ``batches`` until some rank has none left; one reduction of one flag per batch.

    A batch is handed out only when every rank has one, so that no rank enters a step that others never reach. An
    exception ends the others too.
    """
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            ends.all_reduce(False, reduce_op="min")
            return
        except Exception:
            ends.all_reduce(False, reduce_op="min")
            raise
        if not ends.all_reduce(True, reduce_op="min"):
            return
        yield batch
