"""Any iterable of batches, set up: a list, a generator, somebody else's loader."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from fabric_lite.collectives import Collectives, rank, results_together, world_size
from fabric_lite.data.place import Place
from fabric_lite.data.window import Window
from fabric_lite.errors import FabricRuntimeError, FabricValueError

__all__ = ["Around", "MovedIterable", "end_together"]

# Takes a function, and returns what is called instead of it.
Around = Callable[[Callable[..., Any]], Callable[..., Any]]

_STREAMS = "streams"


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
        window: Tells which batches' gradients wait for their step.
    """

    def __init__(
        self,
        iterable: Any,
        *,
        move: Callable[[Any], Any] | None = None,
        together: Collectives | None = None,
        is_shared: bool = False,
        owner: Any = None,
        window: Window | None = None,
    ) -> None:
        if is_shared:
            warnings.warn(
                f"A {type(iterable).__name__} is no DataLoader and is not dealt out: every rank sees all its batches. "
                "Pass a DataLoader, or use_distributed_sampler=False if that is what you want.",
                stacklevel=4,
            )
        self.iterable = iterable
        self.owner = owner
        self.around_start: Around | None = None
        self.around_batches: Around | None = None
        self._move = move
        self._together = together
        self._window = Window() if window is None else window
        self._epoch = 0
        self._next_seen = 0  # loaded: batches of the epoch before the next iteration
        self._seen = 0  # batches of the epoch, those before it was loaded included
        self._stepped = 0  # those of them before the first whose gradients wait for a step
        self._goes_on_itself = False

    def __iter__(self) -> Iterator[Any]:
        begin = iter if self.around_start is None else self.around_start(iter)
        inner = begin(self.iterable)
        before, self._next_seen = self._next_seen, 0
        self._seen = self._stepped = before
        return self._run(inner, before)

    def _run(self, inner: Iterator[Any], before: int) -> Iterator[Any]:
        if not self._goes_on_itself:
            self._seen = sum(1 for _ in itertools.islice(inner, before))
        self._goes_on_itself = False
        if self._together is not None:
            inner = end_together(inner, self._together)
        if self.around_batches is not None:
            inner = _calls(self.around_batches(inner.__next__))
        window, move = self._window, self._move
        for batch in inner:
            if not window.waiting:
                self._stepped = self._seen
            window.batches += 1
            self._seen += 1
            yield batch if move is None else move(batch)
        self._epoch, self._seen, self._stepped = self._epoch + 1, 0, 0

    def __len__(self) -> int:
        return len(self.iterable)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "iterable":
            raise AttributeError(name)
        return getattr(self.iterable, name)

    @property
    def movement(self) -> tuple[int, int]:
        """What changes with each batch that is handed out; for a look from any thread."""
        return self._epoch, self._seen

    def set_epoch(self, epoch: int) -> None:
        """Note the epoch, and tell the iterable if it wants to know."""
        if epoch != self._epoch:
            self._next_seen = self._seen = 0
        self._epoch = epoch
        if callable(own := getattr(self.iterable, "set_epoch", None)):
            own(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the place: epoch and batches, and of an iterable that keeps a state the states of all ranks.

        Where it keeps one, every rank calls. While gradients wait for their step, the place is before the first batch
        of them, unless the iterable keeps its own.
        """
        own = getattr(self.iterable, "state_dict", None)
        state: dict[str, Any] = {"epoch": self._epoch, "seen": self._place()}
        if callable(own) and self._keeps_state:
            state[_STREAMS] = results_together(
                own, f"state_dict() of {type(self.iterable).__name__}", FabricRuntimeError
            )
        if self._seen and rank() == 0:
            self._window.say_what_waits(self._seen - self._stepped, is_place_before=not self._keeps_state)
        return state

    @property
    def _keeps_state(self) -> bool:
        return all(callable(getattr(self.iterable, name, None)) for name in ("state_dict", "load_state_dict"))

    def _place(self) -> int:
        if self._next_seen:
            return self._next_seen
        return self._stepped if self._window.is_open and not self._keeps_state else self._seen

    def place(self) -> Place:
        """The place for a person, counted in batches."""
        return Place(self._epoch, self._place(), self._place(), "batches")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration go on at ``state_dict``."""
        if self._keeps_state:
            self.iterable.load_state_dict(self._own_part(state_dict))
        elif iter(self.iterable) is self.iterable and self._seen:
            raise FabricRuntimeError(
                "An iterator that was begun cannot go back.",
                given=f"{type(self.iterable).__name__} after {self._seen} batches",
                fix="load before the first batch, or set up a DataLoader",
            )
        self._goes_on_itself = self._keeps_state
        # A state that the iterable made before it was set up tells neither.
        counts = state_dict if _is_ours(state_dict) or not self._keeps_state else {"epoch": 0, "seen": 0}
        self._epoch, self._next_seen = counts["epoch"], counts["seen"]
        self._seen = self._stepped = 0

    def _way_back(self) -> Callable[[], None]:
        """What undoes a :meth:`load_state_dict` that follows; communicates nothing."""
        names = ("_epoch", "_next_seen", "_seen", "_stepped", "_goes_on_itself")
        fields = {name: getattr(self, name) for name in names}
        own = copy.deepcopy(self.iterable.state_dict()) if self._keeps_state else None

        def go_back() -> None:
            if self._keeps_state:
                self.iterable.load_state_dict(own)
            vars(self).update(fields)

        return go_back

    def _own_part(self, state_dict: dict[str, Any]) -> Any:
        states = state_dict[_STREAMS] if _is_ours(state_dict) else [state_dict]
        if len(states) != world_size():
            raise FabricValueError(
                "The place of an iterable that reads on its own on each rank cannot be dealt out anew.",
                given=f"the states of {len(states)} ranks; here: {world_size()}",
                fix="the same number of ranks, or a DataLoader over a dataset with indices",
            )
        return states[rank()]


def _is_ours(state_dict: dict[str, Any]) -> bool:
    return set(state_dict) == {"epoch", "seen", _STREAMS}


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


def _calls(function: Callable[[], Any]) -> Iterator[Any]:
    """What the function returns, until it raises StopIteration."""
    while True:
        try:
            value = function()
        except StopIteration:
            return
        yield value
        del value  # the user may have let it go
