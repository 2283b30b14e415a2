"""The samplers that stand in a set-up loader: they deal out what the user's own sampler yields."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, RandomSampler, Sampler, SequentialSampler

from fabric_lite.data.order import Plan, Position
from fabric_lite.data.randomness import Apart, capture, replayed, seeded
from fabric_lite.data.workers import Reads, seeded_batches, seeded_requests
from fabric_lite.errors import FabricValueError

__all__ = ["CountedBatchSampler", "CountedSampler", "Dealer", "Pass", "RequestSampler", "ShardedSampler", "length_of"]


@dataclasses.dataclass
class Pass:
    """One iterator's way through one epoch, counted as it goes.

    Args:
        start: Where it began.
        seed: The seed of the epochs' orders.
        total: Items in an epoch; None until they are drawn, and where their number is not known.
        draws: The random state from which the user's sampler drew an epoch, where it drew by itself.
        yielded: Batches handed to the user.
        stepped: Those of them before the first whose gradients wait for a step.
        is_finished: Whether the iterator has ended.
        claims: How many samplers have begun to deal for it: one, unless the user's ``__iter__`` goes round.
        is_dealt: Whether the latest of these samplers has been used up.
        rewind: Puts back the random state that an uninterrupted run would have here.
        noise: In a loader with workers, what the random numbers of each batch are counted from: a number that was
            drawn, the loader's and the rank.
        number: Tells the iterators of a loader apart.
        has_ended_early: Whether the latest batch of a stream was not full, so that the stream has come to its end.
        reads: By worker, the batches that were handed out of a stream whose place its loader keeps.
    """

    start: Position
    seed: int
    total: int | None = None
    draws: dict[int, dict[str, Any] | None] = dataclasses.field(default_factory=dict)
    yielded: int = 0
    stepped: int = 0
    is_finished: bool = False
    claims: int = 0
    is_dealt: bool = False
    rewind: Callable[[], None] = lambda: None
    noise: tuple[int, int, int] | None = None
    number: int = 0
    has_ended_early: bool = False
    reads: Reads | None = None


@dataclasses.dataclass(frozen=True)
class Dealer:
    """Deals the items of the user's sampler out to the ranks.

    Args:
        sampler: The user's sampler or, if ``items_are_batches``, batch sampler.
        original: What stood in the loader: iterated as it is wherever nothing is dealt out or resumed.
        batch_size: Samples per batch; None where an item is what the loader fetches at once.
        drop_last: The loader's own setting.
        items_are_batches: Whether each item is a list of sample indices.
        rank: The rank that is dealt to.
        world_size: Ranks among which the items are dealt out; 1 leaves the user's order and random draws alone.
        pad: As in :class:`~fabric_lite.data.order.Plan`.
        is_counted: Whether the order is counted at a ``world_size`` of 1 too.
    """

    sampler: Any
    original: Any
    batch_size: int | None
    drop_last: bool
    items_are_batches: bool
    rank: int = 0
    world_size: int = 1
    pad: bool = True
    is_counted: bool = False

    def plan(self, total: int, start: int = 0) -> Plan:
        """How ``total`` items are dealt out from item ``start`` on.

        Raises:
            FabricValueError: Without ``pad``, some ranks would have nothing.
        """
        is_item_by_item = self.batch_size is None and not self.items_are_batches
        if is_item_by_item and not self.pad and (total - start) % self.world_size:
            raise FabricValueError(
                "Without padding and batches, every rank needs equally many samples.",
                given=f"pad=False and batch_size=None with {total - start} samples left for {self.world_size} ranks",
                fix="a batch_size, or pad=True",
            )
        return Plan(total, start, self.world_size, self.batch_size or 1, self.drop_last, self.pad)

    def deal(self, current: Pass, start: Position) -> Iterator[Any]:
        """Yield what the loader fetches at each step from ``start`` on, and note in ``current`` how it was drawn."""
        items = self._deal(current, start)
        if current.noise is None:
            return items
        return seeded_batches(items, (*current.noise, start.epoch), start.batch)

    def _deal(self, current: Pass, start: Position) -> Iterator[Any]:
        # Counted here and not where the sampler is iterated: torch iterates it twice per multi-worker iterator.
        current.claims, current.is_dealt = current.claims + 1, False
        current.rewind()
        _set_epoch(self.original, start.epoch)
        current.total = length_of(self.sampler)
        is_as_drawn = self.world_size == 1 and not self.is_counted and start.seen == 0 and start.draw is None
        # Of a loader that goes round and round, the last two epochs can be in flight.
        current.draws = {epoch: draw for epoch, draw in current.draws.items() if epoch == start.epoch - 1}
        current.draws[start.epoch] = capture(self.sampler) if is_as_drawn else start.draw
        if is_as_drawn:
            yield from self.original
        elif current.total is None:
            yield from self._deal_unsized(current, start)
        else:
            items = self._draw(current, start)
            current.total = len(items)
            yield from self._deal_planned(items, self.plan(len(items), start.seen))
        current.is_dealt = True

    def _deal_planned(self, items: Sequence[Any], plan: Plan) -> Iterator[Any]:
        total, rank, world_size = plan.total, self.rank, self.world_size
        for share in plan.shares(rank):
            if self.items_are_batches:
                yield self._whole_batch(items, share, plan)
            elif self.batch_size is None:
                yield items[share[0] % total]
            elif share[-1] < total:
                yield list(items[share.start : share.stop : world_size])
            else:
                yield [items[index % total] for index in share]

    def _whole_batch(self, items: Sequence[Any], share: range, plan: Plan) -> Any:
        first = share.start - self.rank
        if share.stop - first == self.world_size:
            return items[share[0] % plan.total]
        # Without padding, the last step takes in the batches that do not go round: their samples are dealt out.
        pool = [sample for item in items[first : share.stop] for sample in item]
        return pool[self.rank :: self.world_size]

    def _deal_unsized(self, current: Pass, start: Position) -> Iterator[Any]:
        """Deal step by step, since the sampler has no length and perhaps no end; pad from the first items, as ever."""
        sampler, apart = self._source(current, start)
        width = self.plan(0).width
        with apart:
            stream = iter(sampler)
            head = list(itertools.islice(stream, self.world_size))
            stream = itertools.islice(itertools.chain(head, stream), start.seen, None)
        while True:
            with apart:
                items = list(itertools.islice(stream, width))
            for share in self.plan(len(items)).shares(self.rank):
                batch = [items[i] if i < len(items) else head[(i - len(items)) % len(head)] for i in share]
                yield batch[0] if self.batch_size is None else batch
            if len(items) < width:
                return

    def _draw(self, current: Pass, start: Position) -> Sequence[Any]:
        """The items of the epoch."""
        if start.draw is None:
            if type(self.sampler) is SequentialSampler:
                return range(len(self.sampler))
            if _is_plain_shuffle(self.sampler):
                generator = torch.Generator()
                generator.manual_seed(current.seed + start.epoch)
                # As DistributedSampler draws it; lists of a slice are made per batch, not of the whole epoch.
                return _Shuffled(torch.randperm(len(self.sampler), generator=generator))
        sampler, apart = self._source(current, start)
        with apart:
            return list(sampler)

    def _source(self, current: Pass, start: Position) -> tuple[Any, Apart]:
        if start.draw is not None:
            return replayed(self.sampler, start.draw)
        return self.sampler, seeded(self.sampler, current.seed, start.epoch)


class _Shuffled(Sequence[int]):
    """A permutation that gives plain ints."""

    def __init__(self, permutation: torch.Tensor) -> None:
        self._permutation = permutation.numpy()

    def __len__(self) -> int:
        return len(self._permutation)

    def __getitem__(self, index: Any) -> Any:
        return self._permutation[index].tolist()


# Says which pass the sampler being iterated serves, and where that begins.
Claim = Callable[[], tuple[Pass, Position]]


class _Counted:
    """What both counted samplers share; every other attribute is that of the sampler they stand for."""

    def __init__(self, dealer: Dealer, claim: Claim) -> None:
        self._dealer = dealer
        self._claim = claim

    def __iter__(self) -> Iterator[Any]:
        # The place is taken now and the items are drawn at the first next (deal is a generator): that is where a
        # torch sampler draws, and two live iterators must not both take the place of the later one.
        current, start = self._claim()
        return self._dealer.deal(current, start)

    def __len__(self) -> int:
        dealer = self._dealer
        return len(dealer.original) if dealer.world_size == 1 else dealer.plan(len(dealer.sampler)).steps

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_dealer":
            raise AttributeError(name)
        return getattr(self._dealer.original, name)


class CountedBatchSampler(_Counted, BatchSampler):
    """Stands in ``loader.batch_sampler``."""


class CountedSampler(_Counted, Sampler):
    """Stands in ``loader.sampler`` of a loader that fetches one item at a time."""


class _Request(list[None]):
    """A request for as many items as it is long; notes in a pass when the data end before it is served."""

    def __init__(self, request: list[None], current: Pass) -> None:
        super().__init__(request)
        self._current = current

    def __iter__(self) -> Iterator[None]:
        self._current.has_ended_early = True
        yield from super().__iter__()
        self._current.has_ended_early = False


class RequestSampler(Sampler):
    """Stands where the loader of an ``IterableDataset`` takes its requests from, which hold no indices."""

    def __init__(self, original: Any, request: Any, claim: Claim) -> None:
        self._original = original
        self._request = request
        self._claim = claim

    def __iter__(self) -> Iterator[Any]:
        return self._requests(*self._claim())

    def _requests(self, current: Pass, start: Position) -> Iterator[Any]:
        current.claims, current.is_dealt = current.claims + 1, True
        if start.stream is not None:
            current.rewind()
        if current.noise is not None:
            first = () if current.reads is None else current.reads.first
            yield from seeded_requests(self._request, (*current.noise, start.epoch), current.number, first)
        elif self._request is None:
            yield from itertools.repeat(None)
        else:
            yield from itertools.repeat(_Request(self._request, current))

    def __len__(self) -> int:
        return len(self._original)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_original":
            raise AttributeError(name)
        return getattr(self._original, name)


class ShardedSampler(Sampler):
    """Shows as ``loader.sampler`` what one rank gets of the user's sampler."""

    def __init__(self, dealer: Dealer, claim: Claim, set_epoch: Callable[[int], None]) -> None:
        self._dealer = dealer
        self._claim = claim
        self.set_epoch = set_epoch

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(CountedBatchSampler(self._dealer, self._claim))

    def __len__(self) -> int:
        return self._dealer.plan(len(self._dealer.sampler)).count(self._dealer.rank)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_dealer":
            raise AttributeError(name)
        return getattr(self._dealer.sampler, name)


def length_of(sampler: Any) -> int | None:
    """The number of items, or None where it is not known."""
    try:
        return len(sampler)
    except (TypeError, NotImplementedError):
        return None


def _set_epoch(sampler: Any, epoch: int) -> None:
    """Tell ``sampler``, and every sampler within it that wants to know, the epoch."""
    for _ in range(8):
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            set_epoch(epoch)
        inner = getattr(sampler, "sampler", None)
        if inner is None or inner is sampler:
            return
        sampler = inner


def _is_plain_shuffle(sampler: Any) -> bool:
    return (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.generator is None
        and sampler.num_samples == len(sampler.data_source)
    )
