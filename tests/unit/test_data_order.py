"""The order of the data is that of hand-written scripts, and each exception to it is exact."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from fabric_lite.data import extend_loader
from fabric_lite.data.order import Plan
from fabric_lite.errors import FabricValueError

CPU = torch.device("cpu")


class Numbers(Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return index


def on_rank(rank: int, world_size: int, count: int = 23, pad: bool | None = None, **options: Any) -> Any:
    loader = DataLoader(Numbers(count), **options)
    return extend_loader(loader, rank=rank, world_size=world_size, device=CPU, pad=pad)


def in_order(ranks: Any) -> list[int]:
    """The samples in the order in which they were dealt out, from the batches of each rank."""
    return [index for step in zip(*ranks, strict=True) for each in zip(*step, strict=True) for index in each]


def flat(batches: Any) -> list[int]:
    return [index for batch in batches for index in batch]


def epoch_of(loader: Any) -> list[Any]:
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 7, 12, 23])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_order_is_that_of_a_hand_written_script_with_distributed_sampler(
    shuffle: bool, drop_last: bool, count: int, world_size: int
) -> None:
    for rank in range(world_size):
        loader = on_rank(rank, world_size, count, batch_size=3, shuffle=shuffle, drop_last=drop_last)
        sampler = DistributedSampler(Numbers(count), world_size, rank, shuffle=shuffle)
        by_hand = DataLoader(Numbers(count), batch_size=3, sampler=sampler, drop_last=drop_last)
        assert len(loader) == len(by_hand)
        assert len(loader.sampler) == len(sampler) or drop_last
        assert (loader.batch_size, loader.drop_last) == (3, drop_last)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            assert epoch_of(loader) == epoch_of(by_hand)


@pytest.mark.parametrize(
    "options",
    [{}, {"shuffle": True}, {"sampler": WeightedRandomSampler([1.0, 2.0, 3.0] * 7, 30)}],
    ids=["in order", "shuffled", "own sampler"],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_alone_the_order_and_the_use_of_the_global_generator_are_those_of_the_raw_loader(
    options: dict[str, Any], num_workers: int
) -> None:
    raw = DataLoader(Numbers(21), batch_size=4, num_workers=num_workers, **options)
    ours = on_rank(0, 1, 21, batch_size=4, num_workers=num_workers, **options)
    assert ours.sampler is not None
    seen = []
    for loader in (raw, ours):
        torch.manual_seed(3)
        seen.append([epoch_of(loader), epoch_of(loader), torch.rand(4).tolist()])
    assert seen[0] == seen[1]


def test_alone_the_users_sampler_stays_the_same_object() -> None:
    sampler = RandomSampler(Numbers(8))
    loader = DataLoader(Numbers(8), sampler=sampler, batch_size=2)
    assert extend_loader(loader, rank=0, world_size=1, device=None).sampler is sampler


class Skewed(Sampler[int]):
    """Draws from every global generator there is."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(5):
            yield int(torch.randint(100, ()))
            yield random.randrange(100)
            yield int(np.random.randint(100))

    def __len__(self) -> int:
        return 15


class Endless(Sampler[int]):
    """Has no length and no end."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(100).tolist()


OWN_SAMPLERS = {
    "weighted": lambda: WeightedRandomSampler([1.0, 5.0] * 50, 20),
    "subset": lambda: SubsetRandomSampler(range(0, 40, 2)),
    "replacement": lambda: RandomSampler(Numbers(100), replacement=True, num_samples=20),
    "fewer": lambda: RandomSampler(Numbers(100), num_samples=20),
    "generator": lambda: RandomSampler(Numbers(20), generator=torch.Generator().manual_seed(5)),
    "custom": Skewed,
    "list": lambda: [5, 4, 3, 2, 1],
}


@pytest.mark.parametrize("name", OWN_SAMPLERS)
def test_an_own_sampler_is_drawn_once_for_all_ranks_and_dealt_out(name: str) -> None:
    drawn = []
    for rank in range(2):
        torch.manual_seed(rank)  # ranks whose global generators differ must agree all the same
        random.seed(rank)
        np.random.seed(rank)
        loader = on_rank(rank, 2, 100, sampler=OWN_SAMPLERS[name](), batch_size=2)
        before = (random.getstate(), np.random.get_state()[1].tolist())
        with torch.random.fork_rng(devices=[]):
            drawn.append([epoch_of(loader), epoch_of(loader)])
        assert before == (random.getstate(), np.random.get_state()[1].tolist())
        assert [len(batches) for batches in drawn[rank]] == [len(loader)] * 2
    first, second = map(in_order, zip(*drawn, strict=True))
    length = len(OWN_SAMPLERS[name]())
    if name == "generator":
        generator = torch.Generator().manual_seed(5)
        assert first == torch.randperm(20, generator=generator).tolist(), "epoch 0 is that of the script without us"
    if name == "list":
        assert first == [5, 4, 3, 2, 1, 5]
    else:
        assert first[:length] != second[:length], "a new epoch is a new draw"
    if name in ("subset", "generator", "fewer"):
        assert len(set(first[:length])) == length, "nothing is seen twice"


def test_an_endless_sampler_is_drawn_bit_by_bit_without_disturbing_the_global_generator() -> None:
    sequences = []
    for rank in range(2):
        torch.manual_seed(rank)
        iterator = iter(on_rank(rank, 2, 100, sampler=Endless(), batch_size=5))
        before = torch.get_rng_state()
        sequences.append([next(iterator).tolist() for _ in range(30)])
        assert torch.equal(before, torch.get_rng_state())
    dealt = in_order(sequences)
    for start in range(0, 300, 100):
        assert sorted(dealt[start : start + 100]) == list(range(100))


@pytest.mark.parametrize("count", [12, 14])
def test_whole_batches_of_a_batch_sampler_are_dealt_out(count: int) -> None:
    sampler = BatchSampler(range(count), 4, drop_last=False)
    loaders = [on_rank(rank, 2, count, batch_sampler=sampler) for rank in range(2)]
    batches = [batch for pair in zip(*map(epoch_of, loaders), strict=True) for batch in pair]
    assert batches == [*sampler, *sampler][: len(batches)]
    assert all(len(loader) == 2 for loader in loaders)
    assert loaders[0].batch_sampler.batch_size == 4
    assert loaders[0].batch_size is None


def test_without_batches_single_samples_are_dealt_out() -> None:
    loaders = [on_rank(rank, 2, 7, batch_size=None) for rank in range(2)]
    assert [list(loader) for loader in loaders] == [[0, 2, 4, 6], [1, 3, 5, 0]]
    assert [len(loader) for loader in loaders] == [4, 4]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("shuffle", [False, True])
def test_without_padding_every_sample_comes_once_and_every_rank_has_as_many_batches(
    batch_size: int, world_size: int, shuffle: bool
) -> None:
    for count in range(world_size, 31):
        options = {"pad": False, "batch_size": batch_size, "shuffle": shuffle}
        loaders = [on_rank(rank, world_size, count, **options) for rank in range(world_size)]
        ranks = [epoch_of(loader) for loader in loaders]
        assert sorted(index for batches in ranks for batch in batches for index in batch) == list(range(count))
        for loader, batches in zip(loaders, ranks, strict=True):
            assert len(batches) == len(loader)
            assert sum(map(len, batches)) == len(loader.sampler)
        for step in zip(*ranks, strict=True):
            sizes = [len(batch) for batch in step]
            assert min(sizes) >= 1
            assert max(sizes) - min(sizes) <= 1
            assert max(sizes) <= max(batch_size, 2)


def test_seven_samples_on_two_ranks_without_padding() -> None:
    assert epoch_of(on_rank(0, 2, 7, pad=False, batch_size=2)) == [[0, 2], [4, 6]]
    assert epoch_of(on_rank(1, 2, 7, pad=False, batch_size=2)) == [[1, 3], [5]]


def test_without_padding_the_batches_that_do_not_go_round_are_split_up() -> None:
    sampler = BatchSampler(range(13), 3, drop_last=False)
    ranks = [epoch_of(on_rank(rank, 2, 13, pad=False, batch_sampler=sampler)) for rank in range(2)]
    assert [len(batches) for batches in ranks] == [2, 2]
    assert sorted(index for batches in ranks for batch in batches for index in batch) == list(range(13))


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (1, {"batch_size": 2}, r"(?s)some ranks would have no batch.*1 samples left for 2 ranks.*pad=True"),
        (7, {"batch_size": None}, r"(?s)every rank needs equally many samples.*7 samples left for 2 ranks.*batch_size"),
        (7, {"sampler": Endless()}, r"(?s)the number of samples must be known.*Endless.*__len__"),
    ],
)
def test_what_cannot_be_had_without_padding_is_said_at_setup(count: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FabricValueError, match=message):
        on_rank(0, 2, count, pad=False, **options)


def test_a_distributed_sampler_of_the_user_cannot_go_without_padding() -> None:
    with pytest.raises(FabricValueError, match=r"(?s)pads by itself.*leave the DistributedSampler out"):
        on_rank(0, 2, 7, pad=False, sampler=DistributedSampler(Numbers(7), 2, 0))


def test_a_distributed_sampler_of_the_user_is_left_alone_but_told_the_epoch() -> None:
    sampler = DistributedSampler(Numbers(20), 2, 1, seed=4)
    by_hand = DistributedSampler(Numbers(20), 2, 1, seed=4)
    loader = on_rank(1, 2, 20, sampler=sampler, batch_size=5)
    assert loader.sampler is sampler
    for epoch in range(3):
        by_hand.set_epoch(epoch)
        assert flat(epoch_of(loader)) == list(by_hand)
    sampler.set_epoch(9)
    by_hand.set_epoch(9)
    assert flat(epoch_of(loader)) == list(by_hand)
    by_hand.set_epoch(10)
    assert flat(epoch_of(loader)) == list(by_hand)


@pytest.mark.parametrize("cut_after_steps", range(4))
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("new_world_size", [1, 2, 3])
def test_a_plan_cut_anywhere_and_taken_up_by_another_world_covers_the_rest(
    cut_after_steps: int, pad: bool, new_world_size: int
) -> None:
    for total in range(12, 40):
        plan = Plan(total, world_size=2, batch_size=3, pad=pad)
        seen = plan.seen_after(cut_after_steps)
        if not pad and 0 < total - seen < new_world_size:
            continue
        rest = Plan(total, seen, new_world_size, 2, pad=pad)
        dealt = [index for rank in range(new_world_size) for share in rest.shares(rank) for index in share]
        assert sorted(index for index in dealt if index < total) == list(range(seen, total))
        assert len(dealt) - (total - seen) < new_world_size
        assert pad or len(dealt) == total - seen
