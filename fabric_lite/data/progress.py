"""Where a loader is in its data: which epoch comes next, and how far the latest iterator has got."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fabric_lite.collectives import rank as own_rank
from fabric_lite.collectives import results_together
from fabric_lite.collectives import world_size as all_ranks
from fabric_lite.data.order import Position
from fabric_lite.data.place import Place
from fabric_lite.data.randomness import capture, decode, encode, generators_of, replayed
from fabric_lite.data.samplers import Dealer, Pass, length_of
from fabric_lite.data.streams import Stream
from fabric_lite.data.window import Window
from fabric_lite.data.workers import WorkerSeed
from fabric_lite.errors import FabricRuntimeError, FabricValueError
from fabric_lite.seed import worker_seed_base
from fabric_lite.signals import requests

__all__ = ["Progress"]


class Progress:
    """The place of one loader, counted.

    Args:
        dealer: Deals out the loader's items; None for an ``IterableDataset``, whose place is counted in batches.
        seed: The seed of the epochs' orders.
        rank: The rank of this process.
        world_size: The number of ranks.
        generator: The loader's own.
        workers: How many worker processes it has.
        number: Of this loader among those of the run, so that each has random numbers of its own.
        stream: Where an ``IterableDataset`` keeps the place.
        window: Tells which batches' gradients wait for their step.
    """

    def __init__(
        self,
        dealer: Dealer | None,
        *,
        seed: int,
        rank: int,
        world_size: int,
        generator: torch.Generator | None = None,
        workers: int = 0,
        number: int = 0,
        stream: Stream | None = None,
        window: Window | None = None,
    ) -> None:
        self._dealer = dealer
        self._generator = generator
        self._workers = workers
        self._number = number
        self._stream = stream
        self.window = Window() if window is None else window
        own = generators_of(dealer.sampler) if dealer is not None else []
        self._generators = own if generator is None or generator in own else [*own, generator]
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._next: Position | None = Position()  # None: the epoch after that of the latest pass
        self._loaded_world_size = world_size
        self._latest: Pass | None = None
        self._pinned: Pass | None = None
        self._passes = 0
        self._worker_seed: int | None = None  # loaded: it travels with the state, as the seed of the order does
        self._followed: Any = None
        self._followed_epoch: int | None = None
        if dealer is not None:
            self._follow(dealer.original)

    # Iterators

    def begin(self) -> Pass:
        """Start the pass of a new iterator; what the data keep of a loaded place is given back to them."""
        self._obey_followed()
        self._passes += 1
        start = self._upcoming()
        self._latest = Pass(start, self._seed, noise=self._noise(start), number=self._passes)
        self._next = None
        if self._followed is not None:
            self._followed_epoch = self._latest.start.epoch
        if self._stream is not None:
            self._latest.reads = self._stream.reads(start.stream)
            if start.stream is not None:
                self._stream.restore(start.stream)
        return self._latest

    def pin(self, current: Pass, *, has_persistent_workers: bool) -> None:
        """Let the next sampler that is iterated serve ``current``.

        Making an iterator draws a number from the loader's or torch's global generator. An iterator that goes on for
        an earlier one must not draw it again.
        """
        self._pinned = current
        start = current.start
        if start.is_loaded and (start.is_begun or (has_persistent_workers and start.epoch > 0)):
            state = torch.get_rng_state()
            own_states = [generator.get_state() for generator in self._generators]

            def rewind() -> None:
                torch.set_rng_state(state)
                for generator, own_state in zip(self._generators, own_states, strict=True):
                    generator.set_state(own_state)
                current.rewind = _nothing

            current.rewind = rewind

    def reading_again(self, current: Pass, dataset: Any) -> contextlib.AbstractContextManager[None]:
        """Where the process reads what it has read before of an ``IterableDataset``: in the random state of then.

        Only what is drawn when the epoch begins, an order say, is drawn again as it was. What is drawn bit by bit, by
        a shuffle buffer say, depends on what the rest of the script draws between; such a dataset needs a
        ``state_dict``, a generator of its own, or a worker.
        """
        start = current.start
        if self._dealer is not None or self._workers > 0 or start.stream is not None:
            return contextlib.nullcontext()
        current.draws[start.epoch] = capture(dataset) if start.draw is None else start.draw
        return contextlib.nullcontext() if start.draw is None else replayed(dataset, start.draw)[1]

    def note_handed_out(self, current: Pass) -> None:
        """Count a batch that the user is about to be given."""
        if not self.window.waiting:
            current.stepped = current.yielded
        self.window.batches += 1
        current.yielded += 1
        if current.reads is not None and self._stream is not None:
            current.reads.note(self._stream.worker_of_latest_batch())

    def claim(self) -> tuple[Pass, Position]:
        """The pass that the sampler being iterated serves, and where it begins."""
        current = self._pinned
        if current is None or current.is_finished:
            # The user looks at the sampler outside a loop.
            return Pass(self._upcoming(), self._seed), self._upcoming()
        if current.claims and not current.is_dealt:
            # ... or within one.
            return Pass(current.start, self._seed), current.start
        # A loader whose own __iter__ goes round and round takes the next epoch each time.
        return current, Position(current.start.epoch + current.claims) if current.claims else current.start

    def worker_seed(self, user_function: Callable[[int], Any] | None) -> Callable[[int], Any] | None:
        """The ``worker_init_fn`` of the latest pass."""
        if self._workers == 0:
            return user_function
        assert self._latest is not None
        base = self._worker_seed_base
        entropy = None if base is None else (base, self._number, self._latest.start.epoch, self._rank)
        return WorkerSeed(entropy, self._rank, user_function, requests.are_taken)

    @property
    def _worker_seed_base(self) -> int | None:
        return worker_seed_base() if self._worker_seed is None else self._worker_seed

    def _noise(self, start: Position) -> tuple[int, int, int] | None:
        """What the random numbers of the workers' batches are counted from: the seed, or what torch would draw."""
        if self._workers == 0:
            return None
        base = self._worker_seed_base
        if base is None:
            base = start.noise
        if base is None:
            generator = torch.default_generator if self._generator is None else self._generator
            state = generator.get_state()
            base = int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())
            generator.set_state(state)
        return base, self._number, self._rank

    # State

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be epoch ``epoch``, from its first item unless a place within it was loaded."""
        upcoming = self._upcoming()
        self._next = upcoming if upcoming.epoch == epoch else Position(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The place as numbers and strings.

        After the last batch, but within the loop, the place is the end of the epoch: what resumes there sees no batch,
        then the next epoch. While gradients wait for their step, the place is before the first batch of them. Where an
        ``IterableDataset`` keeps a state of its own, every rank calls.
        """
        place = self._place()
        state: dict[str, Any] = {
            "epoch": place.epoch,
            "seen": place.seen,
            "batch": place.batch,
            "unit": self._unit,
            "seed": self._seed,
            "world_size": self._world_size,
            "is_dealt": self._is_dealt,
        }
        if self._generators:
            state["generators"] = [encode(generator.get_state()) for generator in self._generators]
        if place.is_begun and not place.seen:
            state["is_begun"] = True
        if place.draw is not None:
            state["draw"] = place.draw
        if self._worker_seed_base is not None:
            state["worker_seed"] = self._worker_seed_base
        elif place.noise is not None:
            state["noise"] = place.noise
        if self._workers:
            state["loader"] = self._number
        if self._dealer is None:
            state["workers"] = self._workers
        if self._stream is not None:
            stream = self._stream
            state["streams"] = results_together(
                lambda: self._stream_state(stream, place), "state_dict() of a loader", FabricRuntimeError
            )
        self._say_what_waits()
        return state

    def _say_what_waits(self) -> None:
        """Say that gradients are not saved, if this place is one of them."""
        latest = self._latest
        if latest is None or not latest.yielded or self._rank > 0:
            return
        is_place_before = not latest.is_finished and self._stream is None
        self.window.say_what_waits(latest.yielded - latest.stepped, is_place_before)

    def _stream_state(self, stream: Stream, place: Position) -> Any:
        if place.is_loaded:
            return place.stream
        return stream.state(self._latest)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass begin where ``state`` was taken."""
        missing = {"epoch", "seen", "unit", "seed", "world_size", "is_dealt"} - set(state)
        if missing:
            raise FabricValueError(
                "This is not the state of a loader.",
                given=f"keys {sorted(state)}; missing {sorted(missing)}",
                fix="what the state_dict() of a set-up loader returned",
            )
        if state["seen"]:
            self._check_place(state)
        for generator, own_state in zip(self._generators, state.get("generators", ()), strict=False):
            generator.set_state(decode(own_state))
        self._seed = int(state["seed"])
        self._worker_seed = state.get("worker_seed", self._worker_seed)
        self._number = state.get("loader", self._number)
        self._next = Position(
            int(state["epoch"]),
            int(state["seen"]),
            state.get("draw"),
            is_loaded=True,
            is_begun=bool(state.get("is_begun", state["seen"] > 0)),
            batch=int(state.get("batch", 0)),
            noise=state.get("noise"),
            stream=self._own_stream(state),
        )
        self._loaded_world_size = int(state["world_size"])

    def place(self) -> Place:
        """The place that :meth:`state_dict` tells, for a person; after loading, what going on from there costs."""
        now = self._place()
        repeated = skipped = 0
        old = self._loaded_world_size
        is_elsewhere = now.is_loaded and old != self._world_size
        if is_elsewhere and self._dealer is not None:
            total = length_of(self._dealer.sampler)
            if total is not None:
                rest = self._dealer.plan(total, now.seen)
                whole = dataclasses.replace(rest, start=0, world_size=old)
                repeated = max(0, rest.repeated - whole.repeated)
                skipped = max(0, rest.skipped - whole.skipped)
        return Place(now.epoch, now.batch, now.seen, self._unit, repeated, skipped, old if is_elsewhere else None)

    def _check_place(self, state: dict[str, Any]) -> None:
        theirs = (state["unit"], state["is_dealt"], state["world_size"])
        ours = (self._unit, self._is_dealt, self._world_size)
        is_per_rank = any(not is_dealt and world_size > 1 for _, is_dealt, world_size in (theirs, ours))
        if theirs[0] != ours[0] or (is_per_rank and theirs != ours):
            there, here = (
                f"{unit} {'dealt out to' if is_dealt else 'counted on each of'} {ranks} ranks"
                for unit, is_dealt, ranks in (theirs, ours)
            )
            raise FabricValueError(
                "A place within an epoch of other data cannot be found here.",
                given=f"{state['seen']} {there}; here: {here}",
                fix="the same kind of loader and, where each rank reads on its own, the same number of ranks",
            )
        # One worker reads what none would; two read something else each.
        workers = max(1, state.get("workers", self._workers))
        if self._dealer is None and workers != max(1, self._workers):
            raise FabricValueError(
                "Other workers would read an IterableDataset in another order.",
                given=f"{state['seen']} batches read by {workers} workers; here: num_workers={self._workers}",
                fix=f"num_workers={workers} to go on within the epoch",
            )

    def _own_stream(self, state: dict[str, Any]) -> Any:
        streams = state.get("streams")
        if self._stream is None or not streams or state["workers"] != self._stream.workers:
            return None
        return streams[own_rank()] if len(streams) == all_ranks() else None

    def way_back(self) -> Callable[[], None]:
        """What undoes a :meth:`load_state_dict` that follows, also within a loop; communicates nothing."""
        names = ("_seed", "_worker_seed", "_number", "_next", "_loaded_world_size")
        fields = {name: getattr(self, name) for name in names}
        states = [generator.get_state() for generator in self._generators]

        def go_back() -> None:
            vars(self).update(fields)
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)

        return go_back

    def must_deal(self, current: Pass) -> bool:
        """Whether ``current`` would be wrong if the loader did not use its samplers."""
        return self.deals or (self._dealer is not None and current.start.seen > 0)

    @property
    def movement(self) -> tuple[int, int]:
        """What changes with each batch that is handed out; for a look from any thread."""
        latest = self._latest
        return id(latest), 0 if latest is None else latest.yielded

    @property
    def deals(self) -> bool:
        """Whether the loader's items are dealt out to several ranks."""
        return self._dealer is not None and self._dealer.world_size > 1

    @property
    def counts_batches_read(self) -> bool:
        """Whether only batches that were read can be counted, since there are no indices."""
        return self._dealer is None

    @property
    def _unit(self) -> str:
        return "batches" if self._dealer is None or self._dealer.items_are_batches else "samples"

    @property
    def _is_dealt(self) -> bool:
        return self._world_size == 1 or self.deals

    def _upcoming(self) -> Position:
        if self._next is not None:
            return self._next
        assert self._latest is not None
        return Position(self._latest.start.epoch + max(1, self._latest.claims))

    def _place(self) -> Position:
        if self._next is not None or self._latest is None or self._latest.is_finished:
            return self._upcoming()
        is_left_waiting = self.window.is_open and self._stream is None
        return self._place_in(self._latest, self._latest.stepped if is_left_waiting else self._latest.yielded)

    def _place_in(self, latest: Pass, steps: int) -> Position:
        """The place after ``steps`` batches of a pass."""
        start, epoch = latest.start, latest.start.epoch
        noise = None if latest.noise is None else latest.noise[0]
        batch = start.batch + steps
        if self._dealer is None:
            seen = start.seen + steps
            draw = latest.draws.get(epoch) if latest.yielded or start.is_begun else None
        elif latest.total is None:
            seen, draw = start.seen + steps * self._dealer.plan(0).width, latest.draws.get(epoch)
        else:
            plan = self._dealer.plan(latest.total, start.seen)
            while steps > plan.steps > 0:
                steps, epoch, plan = steps - plan.steps, epoch + 1, self._dealer.plan(latest.total)
                batch = steps
            seen, draw = plan.seen_after(steps), latest.draws.get(epoch)
        return Position(epoch, seen, draw, is_begun=True, batch=batch, noise=noise)

    # A sampler that counts epochs itself

    def _follow(self, sampler: Any) -> None:
        """Heed the epoch that the user sets on the own sampler, as scripts with a ``DistributedSampler`` do."""
        for _ in range(8):
            if callable(getattr(sampler, "set_epoch", None)) and type(getattr(sampler, "epoch", None)) is int:
                self._followed, self._followed_epoch = sampler, sampler.epoch
                self._next = Position(sampler.epoch)
                return
            sampler = getattr(sampler, "sampler", None)

    def _obey_followed(self) -> None:
        if self._followed is not None and self._followed.epoch != self._followed_epoch:
            self.set_epoch(self._followed.epoch)


def _nothing() -> None:
    pass
