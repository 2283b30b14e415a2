"""Random numbers in worker processes: every batch is made from a seed of its own, so that it can be made again.

A batch's random numbers are a function of (seed, loader, epoch, rank, number of the batch): neither of the worker that
makes it, nor of what that worker made before. The seed travels with the indices and takes effect where they are
unpickled, which torch's worker does right before it fetches. So neither dataset nor worker loop is touched, and
persistent workers follow too. A worker of a stream counts the batches that it makes itself.
"""

from __future__ import annotations

import collections
import dataclasses
import gc
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from fabric_lite.signals import leave_to_parent

__all__ = ["Reads", "WorkerSeed", "seeded_batches", "seeded_requests"]


@dataclasses.dataclass(frozen=True)
class WorkerSeed:
    """A ``worker_init_fn`` that seeds torch, numpy and random, then calls the user's own.

    Args:
        entropy: The numbers that tell one iterator on one rank from another; the worker's number is added. None
            keeps torch's own seed of the worker and adds ``rank`` to it.
        rank: The rank of the process that owns the worker.
        user_function: The user's ``worker_init_fn``. If it seeds torch's generator, the random numbers are left to it.
        leaves_signals: Whether SIGTERM and SIGUSR1 are requests to the process that owns the worker.
    """

    entropy: tuple[int, ...] | None
    rank: int
    user_function: Callable[[int], Any] | None = None
    leaves_signals: bool = False

    def __call__(self, worker_id: int) -> None:
        # What a forked worker has inherited is not its garbage: loaders of before would shut down workers that are not
        # its own, and process groups wait for threads that it has not.
        gc.freeze()
        if self.leaves_signals:
            leave_to_parent()
        entropy = (*self.entropy, worker_id) if self.entropy is not None else (torch.initial_seed(), self.rank)
        if self.entropy is not None or self.rank > 0:
            seed = _seed_from(entropy)
            _seed_generators(seed)
            # Frozen for users, who read it to seed libraries of their own: it must differ over ranks too.
            object.__setattr__(get_worker_info(), "seed", seed)
        _worker.forget()
        if self.user_function is not None:
            before = torch.initial_seed()
            self.user_function(worker_id)
            _worker.is_seeded_by_user = torch.initial_seed() != before


class _Worker:
    """What the worker process that this is remembers; nothing in a process that is none."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.is_seeded_by_user = False
        self.stream: Any = None
        self.requests = 0

    def count(self, stream: Any, first: int) -> int:
        """The number of the request that has come, among those of its stream."""
        if stream != self.stream:
            self.stream, self.requests = stream, first
        self.requests += 1
        return self.requests - 1


_worker = _Worker()


def seeded_batches(batches: Iterator[Any], entropy: tuple[int, ...], first: int) -> Iterator[Any]:
    """The indices of each batch, with the seed that a worker starts it from.

    Args:
        batches: What a batch sampler yields: lists of indices; or single indices.
        entropy: The numbers that tell one epoch on one rank from another.
        first: The number of the first batch in its epoch.
    """
    for number, indices in enumerate(batches, start=first):
        yield _carrying(indices, _seed_worker, (*entropy, number))


def seeded_requests(request: Any, entropy: tuple[int, ...], stream: int, first: tuple[int, ...]) -> Iterator[Any]:
    """The endless requests to the workers of an ``IterableDataset``, each with what its seed is made of.

    Which worker gets a request depends on when others ended, so each worker counts those that it gets.

    Args:
        request: What torch's sampler yields.
        entropy: The numbers that tell one epoch on one rank from another.
        stream: Tells this iterator from others of the loader.
        first: By worker, the number of its first batch; empty where all begin the epoch.
    """
    for _ in itertools.repeat(None):
        yield _carrying(request, _seed_stream_worker, (entropy, stream, first))


class Reads:
    """How many batches of each worker were handed out: which worker is next depends on when others ended.

    Args:
        workers: Their number.
        kept: At most so many batches before the present its loader keeps its place.
        state: What :meth:`state` returned where the stream goes on.
    """

    def __init__(self, workers: int, kept: int, state: dict[str, list[int]] | None = None) -> None:
        counts = [0] * workers if state is None else state["before"]
        self.first = tuple(counts)  # by worker, the number of the batch that it makes first
        self._counts = list(counts)
        self._latest: collections.deque[int] = collections.deque(maxlen=max(1, kept))
        for worker in [] if state is None else state["since"]:
            self.note(worker)

    def note(self, worker: int | None) -> None:
        """Count a batch that was handed out; None is for a loader that deals in turn and does not tell."""
        worker = sum(self._counts) % len(self._counts) if worker is None else worker
        self._counts[worker] += 1
        self._latest.append(worker)

    def state(self, since: int) -> dict[str, list[int]]:
        """By worker, the batches before the latest ``since``; and the workers of these."""
        latest = list(self._latest)[len(self._latest) - since :]
        return {"before": [count - latest.count(worker) for worker, count in enumerate(self._counts)], "since": latest}


class _Indices(list[Any]):
    """A list of indices that carries something to the worker, where it arrives as a plain list."""

    __slots__ = ("carried",)
    carried: tuple[Callable[..., None], Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _arrive, (*self.carried, list(self))


class _Index:
    """As :class:`_Indices`, for what is no list; opaque until it arrives."""

    __slots__ = ("carried", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.carried: Any = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _arrive, (*self.carried, self.value)


def _carrying(indices: Any, act: Callable[..., None], entropy: Any) -> Any:
    carrier: Any = _Indices(indices) if type(indices) is list else _Index(indices)
    carrier.carried = (act, entropy)
    return carrier


def _arrive(act: Callable[..., None], entropy: Any, indices: Any) -> Any:
    # Copies that are made elsewhere seed nothing.
    if get_worker_info() is not None and not _worker.is_seeded_by_user:
        act(entropy)
    return indices


def _seed_worker(entropy: tuple[int, ...]) -> None:
    _seed_generators(_seed_from(entropy))


def _seed_stream_worker(carried: tuple[tuple[int, ...], int, tuple[int, ...]]) -> None:
    entropy, stream, first = carried
    info = get_worker_info()
    assert info is not None
    number = _worker.count((entropy, stream), first=first[info.id] if first else 0)
    _seed_generators(_seed_from((*entropy, info.id, number)))


def _seed_from(entropy: tuple[int, ...]) -> int:
    mixed = np.random.SeedSequence([part % 2**64 for part in entropy])
    return int(mixed.generate_state(1, np.uint64)[0]) >> 1


def _seed_generators(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 100 us for accelerators, which workers lack
    random.seed(seed)
    np.random.seed(seed % 2**32)
