"""The class of a set-up loader: its iterators count what they hand out, its state is a place in the data."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from fabric_lite import adopt
from fabric_lite.collectives import Collectives
from fabric_lite.data.iterables import Around, end_together
from fabric_lite.data.progress import Progress
from fabric_lite.data.samplers import Pass
from fabric_lite.data.workers import WorkerSeed
from fabric_lite.errors import FabricRuntimeError

__all__ = ["REPLACED", "ExtendedLoader", "Holder", "members", "originals_of", "own_samplers"]

# DataLoader guards these against assignment, so they are written through its __dict__.
REPLACED = ("sampler", "batch_sampler", "worker_init_fn")


@dataclasses.dataclass
class Holder:
    """All that a set-up loader carries beside the user's own attributes."""

    progress: Progress
    move: Callable[[Any], Any] | None
    ends: Collectives | None
    originals: dict[str, Any]
    owner: Any = None
    around_start: Around | None = None
    around_batches: Around | None = None


class _Batches:
    """One iterator over a set-up loader; every other attribute is that of torch's iterator.

    Not a generator, which would hold on to the batch that the user has let go.
    """

    def __init__(
        self,
        holder: Holder,
        current: Pass,
        inner: Iterator[Any],
        pin: Callable[[], None],
        apart: contextlib.AbstractContextManager[None],
        kind: str,
    ) -> None:
        self._inner = inner
        self._current = current
        self._pin = pin
        self._apart = apart
        self._note_handed_out = holder.progress.note_handed_out
        self._move = holder.move
        advance = inner.__next__ if holder.ends is None else end_together(inner, holder.ends).__next__
        self._advance = advance if holder.around_batches is None else holder.around_batches(advance)
        self._is_new = True
        self._must_deal = holder.progress.must_deal(current)
        self._kind = kind
        # Without indices, what was seen has to be read again and dropped.
        must_read_again = holder.progress.counts_batches_read and current.start.stream is None
        self._to_drop = current.start.seen if must_read_again else 0

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Any:
        if self._is_new:
            self._start()
        try:
            batch = self._advance()
        except StopIteration:
            self._current.is_finished = True
            raise
        if self._is_new:
            self._is_new = False
            self._check_dealt()
        self._note_handed_out(self._current)
        return batch if self._move is None else self._move(batch)

    def _start(self) -> None:
        if self._current.claims == 0:
            # The user's __iter__ is a generator: only now it comes to torch's own, perhaps after that of another
            # iterator.
            self._pin()
        if self._to_drop:
            with self._apart:
                for _ in range(self._to_drop):
                    next(self._inner, None)
            self._current.rewind()

    def _check_dealt(self) -> None:
        if self._must_deal and self._current.claims == 0:
            raise FabricRuntimeError(
                "This loader's own __iter__ leaves its samplers aside: all ranks would see all data, or see it again.",
                given=f"{self._kind}.__iter__, which yielded a batch without iterating batch_sampler or sampler",
                fix="iterate super().__iter__() in it, or do not shard (use_distributed_sampler=False)",
            )

    def __len__(self) -> int:
        return len(self._inner)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)


class ExtendedLoader(DataLoader[Any]):
    """The mark of an extended loader class.

    As :class:`fabric_lite.adopt.Extended`, but a DataLoader: an object of a Generic class takes no class that has
    another first base ("object layout differs").
    """

    @classmethod
    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Hide from the registries of users."""


def members(kind: type) -> dict[str, Any]:
    """What the extended class of a loader class defines."""
    plain_iter = kind.__iter__  # type: ignore[attr-defined]  # a DataLoader class
    plain_set_epoch = getattr(kind, "set_epoch", None)

    def __iter__(self: Any) -> Iterator[Any]:
        holder: Holder = adopt.extension_of(self)
        current = holder.progress.begin()
        _seed_workers(self, holder)

        def pin() -> None:
            holder.progress.pin(current, has_persistent_workers=self.persistent_workers)

        apart = holder.progress.reading_again(current, self.dataset)
        pin()
        start = current.start
        begin = plain_iter if holder.around_start is None else holder.around_start(plain_iter)
        has_ended = start.stream is not None and start.stream["has_ended"] and start.seen > 0
        with apart:
            inner = iter(()) if has_ended else iter(begin(self))
        current.rewind()
        return _Batches(holder, current, inner, pin, apart, kind.__name__)

    def set_epoch(self: Any, epoch: int) -> None:
        """Let the next iteration be epoch ``epoch``; a place within that epoch that was loaded is kept."""
        adopt.extension_of(self).progress.set_epoch(epoch)
        if plain_set_epoch is not None:
            plain_set_epoch(self, epoch)

    def state_dict(self: Any) -> dict[str, Any]:
        """Return the place of the latest iterator: plain numbers, the same on every rank."""
        return adopt.extension_of(self).progress.state_dict()

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        """Let the next iteration begin at the place ``state_dict``, also of another world size."""
        adopt.extension_of(self).progress.load_state_dict(state_dict)

    def _way_back(self: Any) -> Callable[[], None]:
        return adopt.extension_of(self).progress.way_back()

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        with own_samplers(self):
            return adopt.reduce_plainly(self, protocol)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        with own_samplers(self):
            return adopt.deepcopy_plainly(self, memo)

    return {
        function.__name__: function
        for function in (__iter__, set_epoch, state_dict, load_state_dict, _way_back, __reduce_ex__, __deepcopy__)
    }


@contextlib.contextmanager
def own_samplers(loader: Any) -> Iterator[None]:
    """The user's own samplers in the loader for the length of the block."""
    ours = {name: loader.__dict__[name] for name in REPLACED}
    loader.__dict__.update(originals_of(loader))
    try:
        yield
    finally:
        loader.__dict__.update(ours)


def originals_of(loader: Any) -> dict[str, Any]:
    originals = dict(adopt.extension_of(loader).originals)
    if not isinstance(loader.worker_init_fn, WorkerSeed):
        originals["worker_init_fn"] = loader.worker_init_fn  # the user has set another since
    return originals


def _seed_workers(loader: Any, holder: Holder) -> None:
    current = loader.worker_init_fn
    user_function = current.user_function if isinstance(current, WorkerSeed) else current
    loader.__dict__["worker_init_fn"] = holder.progress.worker_seed(user_function)
