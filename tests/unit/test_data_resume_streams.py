"""Random augmentation in workers, and streams, go on where they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from fabric_lite import seed_everything
from fabric_lite.data import extend_loader
from fabric_lite.errors import FabricValueError
from tests.unit.test_data_resume import KINDS, WORKERS, flat, plain, resumes_everywhere, set_up

COUNT = 22


# torchdata 0.11 calls what torch 2.13 has deprecated.
torchdata = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


def noise() -> list[float]:
    """A draw from each of the generators that augmentations use, exact in float64."""
    return [torch.rand((), dtype=torch.float64).item(), random.random(), float(np.random.rand())]


class Noisy(Dataset):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, *noise()], dtype=torch.float64)


class NoisyInBatches(Noisy):
    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        assert type(indices) is list, "nothing of ours shows"
        return [self[index] for index in indices]


class Shuffling(IterableDataset):
    """A shuffle buffer, drawing from global generators; each worker has its share."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        mine = range(COUNT) if info is None else range(info.id, COUNT, info.num_workers)
        buffer: list[int] = []
        for index in mine:
            buffer.append(index)
            if len(buffer) == 5:
                yield torch.tensor([buffer.pop(random.randrange(5)), *noise()], dtype=torch.float64)
        for index in buffer:
            yield torch.tensor([index, *noise()], dtype=torch.float64)


class InOrderOf(IterableDataset):
    """Draws its order when it is iterated, at once or at the first item."""

    def __init__(self, is_eager: bool) -> None:
        self.is_eager = is_eager

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(COUNT).tolist()) if self.is_eager else self._later()

    def _later(self) -> Iterator[int]:
        yield from torch.randperm(COUNT).tolist()


class Stateful(IterableDataset):
    """Says where it is, and counts what it reads. At its end it says so until it is iterated again."""

    def __init__(self, ends: list[int] | None = None) -> None:
        self.place = self.first = 0
        self.ends = ends or [COUNT]
        self.read: list[int] = []

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        number, workers = (0, 1) if info is None else (info.id, info.num_workers)
        self.place, self.first = self.first, 0
        while self.place < self.ends[number % len(self.ends)]:
            self.place += 1
            index = self.place * workers + number
            self.read.append(index)
            yield torch.tensor([index, *(noise() if info else [])], dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = self.first = state["place"]


class GoesBack(Stateful):
    """At its end it is at its beginning; counts its epochs too."""

    epoch = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.first = self.place
        for item in super().__iter__():
            yield item + 100 * self.epoch
        self.place, self.epoch = 0, self.epoch + 1

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place, self.epoch = state["place"], state["epoch"]


@pytest.fixture(params=["seeded", "not seeded"])
def seeding(request: pytest.FixtureRequest) -> Iterator[str]:
    seed_everything(3, workers=request.param == "seeded")
    yield request.param
    seed_everything(0, workers=False)


@pytest.mark.usefixtures("seeding")
@pytest.mark.parametrize(("kind", "world_size"), [(Noisy, 1), (NoisyInBatches, 2)])
@pytest.mark.parametrize("workers", WORKERS[1:])
def test_random_augmentation_in_workers_goes_on_bit_for_bit(
    kind: Any, world_size: int, workers: dict[str, Any]
) -> None:
    resumes_everywhere(
        lambda: set_up(DataLoader(kind(), batch_size=3, shuffle=True, **workers), world_size - 1, world_size),
        cuts=lambda batches: (0, 1, 2, batches),
    )


@pytest.mark.usefixtures("seeding")
@pytest.mark.parametrize("batch_size", [3, None])
@pytest.mark.parametrize("workers", WORKERS[1:])
def test_a_shuffling_stream_in_workers_goes_on_bit_for_bit(workers: dict[str, Any], batch_size: int | None) -> None:
    resumes_everywhere(
        lambda: set_up(DataLoader(Shuffling(), batch_size=batch_size, **workers)),
        cuts=lambda batches: (0, 3, batches),
    )


def test_augmentation_is_the_same_with_any_number_of_workers() -> None:
    def epoch(workers: int) -> list[Any]:
        seed_everything(3, workers=True)
        return plain(set_up(DataLoader(Noisy(), batch_size=3, num_workers=workers)))

    try:
        assert epoch(1) == epoch(2)
    finally:
        seed_everything(0, workers=False)


def test_augmentation_differs_over_batches_epochs_and_ranks() -> None:
    seed_everything(3, workers=True)
    try:
        loaders = [set_up(DataLoader(Noisy(), batch_size=3, num_workers=2), rank, 2, shard=False) for rank in range(2)]
        draws = [row[1:] for loader in loaders for _ in range(2) for batch in plain(loader) for row in batch]
    finally:
        seed_everything(0, workers=False)
    assert len(draws) == 4 * COUNT
    for generator in range(3):
        assert len({draw[generator] for draw in draws}) == len(draws)


def test_two_loaders_of_a_run_make_two_views_and_each_goes_on_with_its_own() -> None:
    def new(number: int) -> Any:
        seed_everything(3, workers=True)
        return set_up(DataLoader(Noisy(), batch_size=3, num_workers=2), number=number)

    try:
        first, second = (plain(new(number)) for number in range(2))
        assert [[row[0] for row in batch] for batch in first] == [[row[0] for row in batch] for batch in second]
        assert not {row[1] for batch in first for row in batch} & {row[1] for batch in second for row in batch}
        loader = new(1)
        iterator = iter(loader)
        next(iterator)
        again = new(0)
        again.load_state_dict(loader.state_dict())
        assert plain(again) == second[1:]
    finally:
        seed_everything(0, workers=False)


def test_the_seed_of_the_workers_travels_with_the_state() -> None:
    def new(seed: int) -> Any:
        seed_everything(seed, workers=True)
        return set_up(DataLoader(Noisy(), batch_size=3, num_workers=1))

    try:
        loader = new(3)
        iterator = iter(loader)
        next(iterator)
        state, rest, epoch_after = loader.state_dict(), plain(iterator), plain(loader)
        again = new(4)
        again.load_state_dict(state)
        assert plain(again) == rest
        assert plain(again) == epoch_after
    finally:
        seed_everything(0, workers=False)


@pytest.mark.parametrize("is_eager", [True, False])
def test_a_stream_that_draws_its_order_when_it_begins_resumes_in_that_order(is_eager: bool) -> None:
    resumes_everywhere(
        lambda: set_up(DataLoader(InOrderOf(is_eager), batch_size=3)), cuts=lambda batches: range(batches + 1)
    )


@pytest.mark.parametrize("kind", [Stateful, GoesBack])
@pytest.mark.parametrize("batch_size", [3, 2, None])
def test_a_stream_with_a_state_of_its_own_is_not_read_again(kind: Any, batch_size: int | None) -> None:
    new = lambda: set_up(DataLoader(kind(), batch_size=batch_size))  # noqa: E731
    resumes_everywhere(new, cuts=lambda batches: range(batches + 1))
    loader = new()
    iterator = iter(loader)
    seen = plain(next(iterator) for _ in range(2))
    again = new()
    again.load_state_dict(loader.state_dict())
    rest = plain(again)
    assert again.dataset.read == [int(row[0]) for part in rest for row in (part if batch_size else [part])]
    assert seen + rest == plain(new())


@torchdata
@pytest.mark.parametrize(("ends", "snapshots"), [([9], 1), ([4, 9], 1), ([4, 18], 1), ([12, 12], 3)])
@pytest.mark.parametrize("workers", WORKERS)
def test_torchdatas_loader_keeps_the_state_of_streams_in_workers(
    workers: dict[str, Any], ends: list[int], snapshots: int
) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    seed_everything(3, workers=True)
    try:
        resumes_everywhere(
            lambda: set_up(
                stateful.StatefulDataLoader(
                    # Within snapshots torchdata goes on by itself, and cannot over persistent workers.
                    Stateful(ends),
                    batch_size=3,
                    snapshot_every_n_steps=1 if "persistent_workers" in workers else snapshots,
                    **workers,
                )
            ),
            cuts=lambda batches: (
                range(batches + 1) if max(ends) > 9 and len(workers) == 1 else (0, 1, batches - 1, batches)
            ),
        )
    finally:
        seed_everything(0, workers=False)


@torchdata
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", WORKERS)
def test_torchdatas_loader_over_indices_goes_on_bit_for_bit(workers: dict[str, Any], world_size: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    kind = Noisy if workers else lambda: range(COUNT)
    resumes_everywhere(
        lambda: set_up(
            stateful.StatefulDataLoader(kind(), batch_size=3, shuffle=True, **workers), world_size - 1, world_size
        ),
        cuts=lambda _: (0, 1),
    )


def test_another_number_of_workers_cannot_go_on_within_a_stream_but_from_the_next_epoch() -> None:
    loader = set_up(DataLoader(Shuffling(), batch_size=3, num_workers=2))
    next(iter(loader))
    other = set_up(DataLoader(Shuffling(), batch_size=3))
    with pytest.raises(FabricValueError, match=r"(?s)another order.*1 batches read by 2 workers.*num_workers=0"):
        other.load_state_dict(loader.state_dict())
    list(loader)
    other.load_state_dict(loader.state_dict())
    assert other.state_dict()["epoch"] == 2


def test_another_number_of_workers_goes_on_with_the_same_samples_of_a_map() -> None:
    whole = flat(extend_loader(KINDS["shuffled"](num_workers=2), rank=0, world_size=2, device=None))
    loader = extend_loader(KINDS["shuffled"](num_workers=2), rank=0, world_size=2, device=None)
    seen = flat([next(iter(loader))])
    for workers in (0, 1):
        again = extend_loader(KINDS["shuffled"](num_workers=workers), rank=0, world_size=2, device=None)
        again.load_state_dict(loader.state_dict())
        assert seen + flat(again) == whole
