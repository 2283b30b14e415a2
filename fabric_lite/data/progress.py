"""Where a loader is in its data: which epoch comes next, and how far the latest iterator has got."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fabric_lite.data.order import Position
from fabric_lite.data.place import Place
from fabric_lite.data.randomness import decode, encode, generators_of
from fabric_lite.data.samplers import Dealer, Pass, length_of
from fabric_lite.data.workers import WorkerSeed
from fabric_lite.errors import FabricValueError
from fabric_lite.seed import worker_seed_base

__all__ = ["Progress"]


class Progress:
    """The place of one loader, counted.

    Args:
        dealer: Deals out the loader's items; None for an ``IterableDataset``, whose place is counted in batches.
        seed: The seed of the epochs' orders.
        rank: The rank of this process.
        world_size: The number of ranks.
        generator: The loader's own.
    """

    def __init__(
        self, dealer: Dealer | None, *, seed: int, rank: int, world_size: int, generator: torch.Generator | None = None
    ) -> None:
        self._dealer = dealer
        own = generators_of(dealer.sampler) if dealer is not None else []
        self._generators = own if generator is None or generator in own else [*own, generator]
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._next: Position | None = Position()  # None: the epoch after that of the latest pass
        self._loaded_world_size = world_size
        self._latest: Pass | None = None
        self._pinned: Pass | None = None
        self._followed: Any = None
        self._followed_epoch: int | None = None
        if dealer is not None:
            self._follow(dealer.original)

    # Iterators

    def begin(self) -> Pass:
        """Start the pass of a new iterator."""
        self._obey_followed()
        self._latest = Pass(self._upcoming(), self._seed)
        self._next = None
        if self._followed is not None:
            self._followed_epoch = self._latest.start.epoch
        return self._latest

    def pin(self, current: Pass, *, has_persistent_workers: bool) -> None:
        """Let the next sampler that is iterated serve ``current``.

        Making an iterator draws a number from the loader's or torch's global generator. An iterator that goes on for
        an earlier one must not draw it again.
        """
        self._pinned = current
        start = current.start
        if start.is_loaded and (start.seen > 0 or (has_persistent_workers and start.epoch > 0)):
            state = torch.get_rng_state()
            own_states = [generator.get_state() for generator in self._generators]

            def rewind() -> None:
                torch.set_rng_state(state)
                for generator, own_state in zip(self._generators, own_states, strict=True):
                    generator.set_state(own_state)
                current.rewind = _nothing

            current.rewind = rewind

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
        base = worker_seed_base()
        if base is None and self._rank == 0:
            return user_function  # nothing to add to torch's own seeds
        assert self._latest is not None
        start = self._latest.start
        entropy = None if base is None else (base, start.epoch, start.seen, self._rank)
        return WorkerSeed(entropy, self._rank, user_function)

    # State

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be epoch ``epoch``, from its first item unless a place within it was loaded."""
        upcoming = self._upcoming()
        self._next = upcoming if upcoming.epoch == epoch else Position(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The place as numbers and strings.

        After the last batch, but within the loop, the place is the end of the epoch: what resumes there sees no batch,
        then the next epoch.
        """
        place = self._place()
        state = {
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
        if place.seen and place.draw is not None:
            state["draw"] = place.draw
        return state

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
        self._next = Position(
            int(state["epoch"]), int(state["seen"]), state.get("draw"), True, int(state.get("batch", 0))
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

    def must_deal(self, current: Pass) -> bool:
        """Whether ``current`` would be wrong if the loader did not use its samplers."""
        return self.deals or (self._dealer is not None and current.start.seen > 0)

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
        latest, start, epoch, steps = self._latest, self._latest.start, self._latest.start.epoch, self._latest.yielded
        seen, batch = start.seen, start.batch + steps
        if self._dealer is None:
            return Position(epoch, seen + steps, batch=batch)
        if latest.total is None:
            width = self._dealer.plan(0).width
            return Position(epoch, seen + steps * width, latest.draws.get(epoch), batch=batch)
        plan = self._dealer.plan(latest.total, seen)
        while steps > plan.steps > 0:
            steps, epoch, plan = steps - plan.steps, epoch + 1, self._dealer.plan(latest.total)
            batch = steps
        return Position(epoch, plan.seen_after(steps), latest.draws.get(epoch), batch=batch)

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
