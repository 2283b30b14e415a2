"""Setting up a ``DataLoader`` in place: its samplers deal out to the ranks, its batches come on the device, its place
in the data is a few numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from fabric_lite import adopt
from fabric_lite.collectives import Collectives, is_distributed
from fabric_lite.data.extended import REPLACED, ExtendedLoader, Holder, members, originals_of, own_samplers
from fabric_lite.data.iterables import Around, MovedIterable
from fabric_lite.data.move import mover
from fabric_lite.data.place import Place
from fabric_lite.data.progress import Progress
from fabric_lite.data.samplers import (
    CountedBatchSampler,
    CountedSampler,
    Dealer,
    RequestSampler,
    ShardedSampler,
    length_of,
)
from fabric_lite.data.streams import stream_of
from fabric_lite.data.window import Window
from fabric_lite.errors import FabricTypeError, FabricValueError

__all__ = [
    "ExtendedLoader",
    "check_loaders",
    "extend_loader",
    "is_extended_loader",
    "owner_of_loader",
    "place_of",
    "put_around",
    "release_loader",
]


def extend_loader(
    loader: Any,
    *,
    rank: int,
    world_size: int,
    device: torch.device | None,
    shard: bool = True,
    pad: bool | None = None,
    uneven: str | None = None,
    seed: int = 0,
    owner: Any = None,
    window: Window | None = None,
    number: int = 0,
    collectives: Collectives | None = None,
) -> Any:
    """Set ``loader`` up in place and return it.

    An iterable that is no ``DataLoader`` cannot be changed: it comes back inside a
    :class:`~fabric_lite.data.iterables.MovedIterable`, every rank seeing all of it.

    The order is a function of seed, epoch and place, which is all that ``state_dict`` keeps. A sampler with a random
    state of its own that is neither a torch generator nor a global one (a numpy ``Generator``) must make it a function
    of the epoch in ``set_epoch``, or it resumes in another order; so must one that draws from a global generator bit
    by bit while the script draws too. Two live iterators go their own ways, except over persistent workers, where
    torch itself has one iterator.

    Random numbers in workers are a function of (seed, loader, epoch, rank, batch), whatever the number of workers;
    without a seed for workers, of the number that torch draws for an epoch. Only a ``worker_init_fn`` that seeds
    torch's generator takes them over; they are not resumed then, nor is a generator that a worker makes for itself.

    An ``IterableDataset`` with a ``state_dict`` that needs no arguments goes on from that, under workers through
    torchdata's ``StatefulDataLoader`` within an epoch. Without, what was seen is read again and dropped, by as many
    workers as before: exact if reading is. What is not: an order drawn bit by bit from the global generators of this
    process, or in the ``__iter__`` itself (not its first item) in persistent workers.

    Args:
        loader: A ``DataLoader`` of any subclass, or any other iterable of batches.
        rank: The rank to deal to; every rank calls this with its own.
        world_size: Ranks among which the data is dealt out. 1 in a process of several means that all ranks get the same
            batches (tensor parallelism), so the order is counted there too: one that is drawn from the global generator
            would differ on a rank that has drawn a number alone.
        device: Where batches come; None leaves them where the loader makes them.
        shard: Whether to deal out. An ``IterableDataset`` never is: it splits itself in its ``__iter__``. A
            ``DistributedSampler`` that is there already deals by itself.
        pad: True repeats items until all ranks have equally many (None too). False gives every sample exactly once,
            and every rank equally many batches.
        uneven: ``"stop"`` ends all ranks as soon as one has ended, at the cost of one tiny reduction per batch. For
            data whose length is not known. Every rank must then leave the loop at the same batch.
        seed: The seed of the order, as in ``DistributedSampler``.
        owner: Who sets the loader up; found again with :func:`owner_of_loader`.
        window: Tells which batches' gradients wait for their step.
        number: Of this loader among those that ``owner`` sets up, the same on all ranks.
        collectives: The run's own, through which ranks end together; None makes plain ones.

    Raises:
        FabricValueError: The loader is set up already, or ``pad`` or ``uneven`` cannot be had with it.
        FabricTypeError: ``loader`` is not iterable, or of a class that cannot be extended.
    """
    if isinstance(loader, MovedIterable) and loader.owner is not owner:
        loader = loader.iterable  # there is nothing to take off: another owner's wrapper goes on by itself
    if is_extended_loader(loader):
        raise _set_up_already(loader)
    check_loaders([loader], world_size=world_size, shard=shard, pad=pad, uneven=uneven, owner=owner)
    move = None if device is None else mover(device)
    ends = None
    if uneven == "stop" and world_size > 1:
        ends = collectives or Collectives(device or torch.device("cpu"))
    if not isinstance(loader, DataLoader):
        is_shared = shard and world_size > 1 and rank == 0
        return MovedIterable(loader, move=move, together=ends, is_shared=is_shared, owner=owner, window=window)
    dealer = _dealer_for(loader, rank, world_size, shard, pad, is_counted=shard and is_distributed())
    progress = Progress(
        dealer,
        seed=seed,
        rank=rank,
        world_size=world_size,
        generator=loader.generator,
        workers=loader.num_workers,
        number=number,
        stream=stream_of(loader),
        window=window,
    )
    holder = Holder(progress, move, ends, {name: loader.__dict__[name] for name in REPLACED}, owner)
    loader.__dict__.update(_requests(loader, progress) if dealer is None else _samplers(loader, dealer, progress))
    # Persistent workers of an earlier iteration would go on with the samplers that have just been taken out.
    loader.__dict__["_iterator"] = None
    adopt.extend(loader, members, holder, mark=ExtendedLoader)
    return loader


def check_loaders(
    loaders: Sequence[Any],
    *,
    world_size: int,
    shard: bool = True,
    pad: bool | None = None,
    uneven: str | None = None,
    owner: Any = None,
) -> None:
    """Raise what :func:`extend_loader` would raise for any of ``loaders``; none of them is changed.

    A loader that another owner set up passes: it has to be released before it is extended again.

    Raises:
        FabricValueError: A loader is given twice, was set up by ``owner`` before, or ``pad`` or ``uneven`` cannot be
            had with it.
        FabricTypeError: A loader is not iterable, or of a class that cannot be extended.
    """
    if uneven not in (None, "stop"):
        raise FabricValueError(
            "This way to end uneven ranks does not exist.", given=f"uneven={uneven!r}", fix='uneven="stop" or None'
        )
    for position, loader in enumerate(loaders):
        is_again = is_extended_loader(loader) and owner_of_loader(loader) is owner
        if is_again or any(earlier is loader for earlier in loaders[:position]):
            raise _set_up_already(loader)
        plain = loader.iterable if isinstance(loader, MovedIterable) else loader
        if isinstance(plain, DataLoader):
            with own_samplers(plain) if isinstance(plain, ExtendedLoader) else contextlib.nullcontext():
                _dealer_for(plain, 0, world_size, shard, pad)
            adopt.check_extendable(plain, members, ExtendedLoader)
        else:
            _check_iterable(plain, pad)


def owner_of_loader(loader: Any) -> Any:
    """Return the ``owner`` given to :func:`extend_loader`; None for a plain loader."""
    if isinstance(loader, MovedIterable):
        return loader.owner
    return getattr(adopt.extension_of(loader), "owner", None)


def place_of(loader: Any) -> Place:
    """Return where a set-up loader goes on; communicates nothing.

    Raises:
        FabricValueError: ``pad=False`` leaves some rank without a sample at this world size.
    """
    own: Any = loader if isinstance(loader, MovedIterable) else adopt.extension_of(loader).progress
    place: Place = own.place()
    return place


def put_around(loader: Any, *, start: Around, batches: Around) -> None:
    """Let the iterators of a set-up loader that begin from now on do so through others' functions.

    Args:
        loader: Any that :func:`extend_loader` has returned.
        start: Takes what starts an iterator, workers and all, and returns what is called instead.
        batches: Takes what returns the next batch, or raises StopIteration, and returns what is called instead.
    """
    own: Any = loader if isinstance(loader, MovedIterable) else adopt.extension_of(loader)
    own.around_start, own.around_batches = start, batches


def release_loader(loader: Any) -> Any:
    """Give the plain object back: the user's class, samplers and ``worker_init_fn``."""
    if isinstance(loader, MovedIterable):
        loader.owner = None
        return loader.iterable
    originals = originals_of(loader)
    adopt.release(loader)
    loader.__dict__.update(originals)
    loader.__dict__["_iterator"] = None
    return loader


def is_extended_loader(loader: Any) -> bool:
    """Whether :func:`extend_loader` returned ``loader``."""
    return isinstance(loader, (ExtendedLoader, MovedIterable))


def _set_up_already(loader: Any) -> FabricValueError:
    return FabricValueError(
        "This loader is already set up, or given twice.",
        given=type(loader).__name__,
        fix="set up each loader once, and use the object everywhere",
    )


def _check_iterable(iterable: Any, pad: bool | None) -> None:
    if not hasattr(iterable, "__iter__") and not hasattr(iterable, "__getitem__"):
        raise FabricTypeError(
            "A loader must be iterable.", given=type(iterable).__name__, fix="a DataLoader or any iterable of batches"
        )
    if pad is not None:
        raise FabricValueError(
            "Only a DataLoader can be padded.",
            given=f"pad={pad} with {type(iterable).__name__}",
            fix='a DataLoader, or uneven="stop" to end all ranks together',
        )


def _dealer_for(
    loader: DataLoader, rank: int, world_size: int, shard: bool, pad: bool | None, is_counted: bool = False
) -> Dealer | None:
    """The dealer of a loader over indices; None for an ``IterableDataset``."""
    if isinstance(loader.dataset, IterableDataset):
        if pad is not None:
            raise FabricValueError(
                "An IterableDataset has no indices to deal out or pad.",
                given=f"pad={pad} with {type(loader.dataset).__name__}",
                fix='uneven="stop" to end all ranks together, and split the data in the dataset\'s __iter__',
            )
        return None
    is_custom = loader.batch_size is None and loader.batch_sampler is not None
    sampler: Any = loader.batch_sampler if is_custom else loader.sampler
    deals_by_itself = _is_distributed(sampler)
    is_dealt = shard and not deals_by_itself
    if deals_by_itself and pad is False and world_size > 1:
        raise FabricValueError(
            "A DistributedSampler pads by itself.",
            given="pad=False with a loader that has a DistributedSampler",
            fix="leave the DistributedSampler out",
        )
    dealer = Dealer(
        sampler=sampler,
        original=loader.sampler if loader.batch_sampler is None else loader.batch_sampler,
        batch_size=loader.batch_size,
        drop_last=loader.drop_last,
        items_are_batches=is_custom,
        rank=rank if is_dealt else 0,
        world_size=world_size if is_dealt else 1,
        pad=pad is not False,
        is_counted=is_counted and is_dealt,
    )
    if not dealer.pad and dealer.world_size > 1:
        _check_exact(dealer)
    return dealer


def _check_exact(dealer: Dealer) -> None:
    total = length_of(dealer.sampler)
    if total is None:
        raise FabricValueError(
            "Without padding, the number of samples must be known.",
            given=f"pad=False with {type(dealer.sampler).__name__}, which has no length",
            fix='a sampler with __len__, or uneven="stop"',
        )
    dealer.plan(total)  # raises where a rank would have nothing


def _is_distributed(sampler: Any) -> bool:
    inner = getattr(sampler, "sampler", None)
    is_wrapper = inner is not None and inner is not sampler
    return isinstance(sampler, DistributedSampler) or (is_wrapper and _is_distributed(inner))


def _samplers(loader: DataLoader, dealer: Dealer, progress: Progress) -> dict[str, Any]:
    """What stands in the loader's ``__dict__`` while it is set up."""
    if loader.batch_sampler is None:
        return {"sampler": CountedSampler(dealer, progress.claim)}
    batches = CountedBatchSampler(dealer, progress.claim)
    if dealer.world_size == 1 or dealer.items_are_batches:
        return {"batch_sampler": batches}
    batches.sampler = ShardedSampler(dealer, progress.claim, progress.set_epoch)
    return {"batch_sampler": batches, "sampler": batches.sampler}


def _requests(loader: DataLoader, progress: Progress) -> dict[str, Any]:
    """What stands in the ``__dict__`` of a loader over an ``IterableDataset``."""
    if loader.batch_size is None:
        return {"sampler": RequestSampler(loader.sampler, None, progress.claim)}
    return {"batch_sampler": RequestSampler(loader.batch_sampler, [None] * loader.batch_size, progress.claim)}
