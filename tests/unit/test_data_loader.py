"""A set-up loader is the user's own object."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from fabric_lite.data import check_loaders, extend_loader, is_extended_loader, owner_of_loader, release_loader
from fabric_lite.errors import FabricRuntimeError, FabricTypeError, FabricValueError
from fabric_lite.seed import seed_everything

CPU = torch.device("cpu")


class Numbers(Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


class Draws(Dataset):
    """What a worker's generator gives."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        info = get_worker_info()
        assert info is not None
        return torch.stack([torch.tensor(info.seed), torch.randint(2**60, ())])


class Named(DataLoader):
    """Needs an argument, has attributes and a method."""

    registered: ClassVar[list[str]] = []

    def __init__(self, name: str, dataset: Dataset, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.name = name

    def __init_subclass__(cls, *, needed: int = 0, **kwargs: Any) -> None:
        Named.registered.append(cls.__name__)

    def shout(self) -> str:
        return self.name.upper()


class Doubling(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield 2 * batch


class RoundAndRound(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from super().__iter__()


def set_up(loader: Any, rank: int = 0, world_size: int = 2, device: torch.device | None = CPU, **options: Any) -> Any:
    return extend_loader(loader, rank=rank, world_size=world_size, device=device, **options)


def epoch_of(loader: Any) -> list[Any]:
    return [batch.tolist() for batch in loader]


def test_a_subclass_with_required_arguments_keeps_identity_class_attributes_and_methods() -> None:
    loader = Named("train", Numbers(8), batch_size=2)
    ours = set_up(loader)
    assert ours is loader
    assert isinstance(ours, Named)
    assert (type(ours).__name__, type(ours).__module__) == ("Named", Named.__module__)
    assert type(ours).__doc__ == Named.__doc__
    assert (ours.name, ours.shout()) == ("train", "TRAIN")
    assert Named.registered == [], "the user's registry does not see our class"
    assert epoch_of(ours) == [[0, 2], [4, 6]]
    with pytest.raises(ValueError, match="batch_size attribute should not be set"):
        ours.batch_size = 3
    ours.name = "other"
    assert ours.shout() == "OTHER"


def test_two_loaders_of_one_class_share_one_extended_class() -> None:
    assert type(set_up(DataLoader([1, 2]))) is type(set_up(DataLoader([1, 2])))


def test_setting_up_twice_says_so() -> None:
    for loader in (set_up(DataLoader(Numbers(4))), set_up([1, 2], shard=False)):
        assert is_extended_loader(loader)
        with pytest.raises(FabricValueError, match=r"(?s)already set up.*once"):
            set_up(loader)


class Unextendable(DataLoader):
    """Its class cannot be exchanged."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise TypeError("no other class")
        super().__setattr__(name, value)


WRONG: dict[str, Any] = {
    "no iterable": (lambda: 3, {}, FabricTypeError, "must be iterable"),
    "no class to extend": (lambda: Unextendable(Numbers(4)), {}, FabricTypeError, "cannot be extended"),
    "padded list": (lambda: [1], {"pad": True}, FabricValueError, "Only a DataLoader"),
    "padded stream": (lambda: DataLoader(Stream()), {"pad": False}, FabricValueError, "no indices"),
    "unknown end": (lambda: DataLoader(Numbers(4)), {"uneven": "wait"}, FabricValueError, "uneven='wait'"),
    "too few samples": (lambda: DataLoader(Numbers(1)), {"pad": False}, FabricValueError, "pad=False"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_before_anything_is_changed(name: str) -> None:
    make, options, kind, message = WRONG[name]
    loader, good = make(), DataLoader(Numbers(4))
    before = {id(one): (type(one), dict(getattr(one, "__dict__", {}))) for one in (good, loader)}
    with pytest.raises(kind, match=message):
        check_loaders([good, loader], world_size=2, **options)
    with pytest.raises(kind, match=message):
        extend_loader(loader, rank=0, world_size=2, device=CPU, **options)
    assert before == {id(one): (type(one), dict(getattr(one, "__dict__", {}))) for one in (good, loader)}


def test_the_same_loader_twice_is_said_before_it_is_changed() -> None:
    loader = DataLoader(Numbers(4))
    with pytest.raises(FabricValueError, match="given twice"):
        check_loaders([loader, loader], world_size=1)
    assert type(loader) is DataLoader


@pytest.mark.parametrize("make", [lambda: DataLoader(Numbers(4), batch_size=2), lambda: [[0, 1], [2, 3]]])
def test_a_loader_of_another_owner_passes_the_check_and_can_be_set_up_once_released(make: Any) -> None:
    first, second = object(), object()
    loader = extend_loader(make(), rank=0, world_size=2, device=None, shard=False, owner=first)
    assert owner_of_loader(loader) is first
    with pytest.raises(FabricValueError, match="already set up"):
        check_loaders([loader], world_size=1, owner=first)
    check_loaders([loader], world_size=1, owner=second)
    assert owner_of_loader(loader) is first, "the check changes nothing"
    release_loader(loader)
    assert owner_of_loader(loader) is None
    again = extend_loader(loader, rank=0, world_size=1, device=None, owner=second)
    assert owner_of_loader(again) is second
    assert [list(batch) for batch in again] == [[0, 1], [2, 3]]
    assert is_extended_loader(again)


def test_released_the_loader_is_what_it_was() -> None:
    def user_function(worker: int) -> None: ...

    loader = DataLoader(Numbers(8), batch_size=2, shuffle=True, worker_init_fn=user_function)
    before = dict(loader.__dict__)
    set_up(loader, rank=1)
    list(loader)
    assert release_loader(loader) is loader
    assert type(loader) is DataLoader
    assert loader.__dict__ == before
    assert not is_extended_loader(loader)
    assert len(loader) == 4
    set_up(loader)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))])
@pytest.mark.parametrize("world_size", [1, 2])
def test_copies_and_pickles_are_plain_loaders_over_all_the_data(make: Any, world_size: int) -> None:
    loader = set_up(Named("train", Numbers(8), batch_size=2), world_size=world_size)
    list(loader)
    twin = make(loader)
    assert type(twin) is Named
    assert "_fabric_lite_extension" not in twin.__dict__
    assert twin.worker_init_fn is None
    assert epoch_of(twin) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert is_extended_loader(loader)
    assert len(loader) == 4 // world_size


def test_an_own_iter_is_kept() -> None:
    assert epoch_of(set_up(Doubling(Numbers(8), batch_size=2))) == [[0, 4], [8, 12]]


def test_a_loader_that_goes_round_and_round_takes_the_next_epoch_each_time() -> None:
    endless = iter(set_up(RoundAndRound(Numbers(8), batch_size=2, shuffle=True)))
    loader = set_up(DataLoader(Numbers(8), batch_size=2, shuffle=True))
    assert [next(endless).tolist() for _ in range(6)] == epoch_of(loader) + epoch_of(loader) + epoch_of(loader)


@pytest.mark.parametrize("kind", [DataLoader, Doubling])
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("world_size", [1, 2])
def test_two_live_iterators_do_not_disturb_each_other(kind: Any, num_workers: int, world_size: int) -> None:
    def new() -> Any:
        torch.manual_seed(0)
        loader = kind(Numbers(12), batch_size=2, num_workers=num_workers, shuffle=world_size > 1)
        return set_up(loader, world_size=world_size)

    one_by_one = new()
    expected = [epoch_of(one_by_one), epoch_of(one_by_one)]
    loader = new()
    together = list(zip(loader, loader, strict=True))
    assert [[batch.tolist() for batch in batches] for batches in zip(*together, strict=True)] == expected


def test_persistent_workers_of_an_iteration_before_setup_do_not_keep_the_old_order() -> None:
    loader = DataLoader(Numbers(8), batch_size=2, num_workers=1, persistent_workers=True)
    list(loader)
    assert epoch_of(set_up(loader)) == [[0, 2], [4, 6]]
    assert epoch_of(loader) == [[0, 2], [4, 6]]
    assert epoch_of(release_loader(loader)) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_loader_that_leaves_its_samplers_aside_is_an_error_and_not_silently_doubled() -> None:
    class Cached(DataLoader):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.iterator = super().__iter__()

        def __iter__(self) -> Iterator[Any]:
            for _ in range(len(self)):
                yield next(self.iterator)

    with pytest.raises(FabricRuntimeError, match=r"(?s)leaves its samplers aside.*Cached.__iter__.*super"):
        list(set_up(Cached(Numbers(8), batch_size=2)))
    alone = set_up(Cached(Numbers(8), batch_size=2), world_size=1)
    assert len(list(alone)) == 4
    resumed = set_up(Cached(Numbers(8), batch_size=2), world_size=1)
    resumed.load_state_dict({**alone.state_dict(), "seen": 4})
    with pytest.raises(FabricRuntimeError, match="leaves its samplers aside"):
        next(iter(resumed))
    assert len(list(set_up(Cached(Numbers(8), batch_size=2), shard=False))) == 4


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loader_that_is_dropped_is_freed_at_once(world_size: int) -> None:
    loader = set_up(DataLoader(Numbers(8), batch_size=2), world_size=world_size)
    list(loader)
    gone = [weakref.ref(loader), weakref.ref(loader.dataset)]
    gc.disable()
    try:
        del loader
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def test_the_users_look_at_the_samplers_takes_no_epoch() -> None:
    looked_at, left_alone = (set_up(DataLoader(Numbers(8), batch_size=2, shuffle=True)) for _ in range(2))
    assert list(looked_at.batch_sampler) == epoch_of(left_alone)
    iterator = iter(looked_at)
    first = next(iterator).tolist()
    assert [*looked_at.sampler][:2] == first
    assert next(iter(looked_at.batch_sampler)) == first
    list(iterator)
    assert epoch_of(looked_at) == epoch_of(left_alone)


@pytest.mark.parametrize("through", ["loader", "sampler"])
def test_an_explicit_epoch_wins_for_the_next_iteration(through: str) -> None:
    counted = set_up(DataLoader(Numbers(20), batch_size=2, shuffle=True))
    epochs = [epoch_of(counted) for _ in range(7)]
    loader = set_up(DataLoader(Numbers(20), batch_size=2, shuffle=True))
    (loader if through == "loader" else loader.sampler).set_epoch(5)
    assert [epoch_of(loader), epoch_of(loader)] == epochs[5:7]
    loader.set_epoch(1)
    assert epoch_of(loader) == epochs[1]


def test_set_epoch_of_the_users_own_class_is_called_too() -> None:
    class Telling(DataLoader):
        told: int | None = None

        def set_epoch(self, epoch: int) -> None:
            self.told = epoch

    loader = set_up(Telling(Numbers(4)))
    loader.set_epoch(3)
    assert loader.told == 3
    assert loader.state_dict()["epoch"] == 3


def test_an_iterable_dataset_is_left_whole_and_has_no_length() -> None:
    loader = set_up(DataLoader(Stream(), batch_size=4), rank=1)
    assert epoch_of(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    with pytest.raises(TypeError, match=r"has no len\(\)"):
        len(loader)
    with pytest.raises(FabricValueError, match=r'(?s)no indices.*pad=False with Stream.*uneven="stop"'):
        set_up(DataLoader(Stream()), pad=False)


def test_an_unknown_way_to_end_is_an_error() -> None:
    with pytest.raises(FabricValueError, match=r"(?s)does not exist.*uneven='join'.*stop"):
        set_up(DataLoader(Numbers(4)), uneven="join")


def test_an_iterator_has_the_length_and_the_attributes_of_torchs_own() -> None:
    iterator = iter(set_up(DataLoader(Numbers(8), batch_size=2)))
    assert len(iterator) == 2
    assert iterator._num_workers == 0
    assert iter(iterator) is iterator


def test_a_batch_is_free_once_the_user_lets_go() -> None:
    iterator = iter(set_up(DataLoader(Numbers(8), batch_size=2)))
    batch = next(iterator)
    gone = weakref.ref(batch)
    del batch
    assert gone() is None


def seeds_of(loader: Any) -> list[list[int]]:
    return [row for batch in loader for row in batch.tolist()]


class Collecting(Dataset):
    """Collects garbage in its worker."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        gc.collect()
        return index


class Garbage:
    """In a circle with itself; it writes into a file when it is collected, in whatever process."""

    def __init__(self, path: Path) -> None:
        self.path, self.itself = path, self

    def __del__(self) -> None:
        with self.path.open("a") as file:
            file.write(f"{os.getpid()} ")


def test_a_worker_leaves_the_garbage_of_its_parent_alone(tmp_path: Path) -> None:
    path = tmp_path / "collected"
    loader = set_up(DataLoader(Collecting(), num_workers=1))
    gc.disable()
    try:
        Garbage(path)
        assert list(loader) == [0]
    finally:
        gc.enable()
    gc.collect()
    assert path.read_text().split() == [str(os.getpid())]


def seed_by_number(worker: int) -> None:
    torch.manual_seed(worker)


def test_worker_seeds_differ_per_worker_rank_and_epoch_and_repeat() -> None:
    def run(rank: int) -> list[list[list[int]]]:
        seed_everything(11, workers=True)
        loader = set_up(DataLoader(Draws(), num_workers=2), rank=rank)
        return [seeds_of(loader), seeds_of(loader)]

    try:
        first, again, other = run(0), run(0), run(1)
    finally:
        seed_everything(0, workers=False)
    assert first == again
    seeds = {seed for epochs in (first, other) for epoch in epochs for seed, _ in epoch}
    assert len(seeds) == 8, "2 ranks, 2 epochs, 2 workers"
    draws = [draw for epochs in (first, other) for epoch in epochs for _, draw in epoch]
    assert len(set(draws)) == len(draws)


def test_without_a_seed_for_workers_ranks_with_equal_generators_still_differ() -> None:
    drawn = []
    for rank in range(2):
        seed_everything(1, workers=False)
        drawn.append(seeds_of(set_up(DataLoader(Draws(), num_workers=1), rank=rank)))
    assert not {draw for _, draw in drawn[0]} & {draw for _, draw in drawn[1]}
    assert not {seed for seed, _ in drawn[0]} & {seed for seed, _ in drawn[1]}


def test_the_users_own_worker_function_runs_after_ours() -> None:
    try:
        seed_everything(11, workers=True)
        drawn = []
        for rank in range(2):
            loader = DataLoader(Draws(), num_workers=1, worker_init_fn=seed_by_number)
            drawn.append([draw for _, draw in seeds_of(set_up(loader, rank=rank))])
    finally:
        seed_everything(0, workers=False)
    assert drawn[0] == drawn[1], "both were seeded by the user's function alone"


def test_a_list_of_batches_is_moved_and_keeps_its_ways() -> None:
    batches = [torch.ones(2), torch.zeros(3)]
    loader = set_up(batches, device=torch.device("meta"), world_size=1)
    assert [batch.device.type for batch in loader] == ["meta", "meta"]
    assert len(loader) == 2
    assert loader.index is not None
    assert release_loader(loader) is batches


def test_on_several_ranks_an_iterable_that_cannot_be_dealt_out_says_so() -> None:
    with pytest.warns(UserWarning, match="A list is no DataLoader .* every rank sees all its batches"):
        set_up([1, 2])


def test_a_generator_of_batches_works_once() -> None:
    loader = set_up((torch.ones(1) for _ in range(3)), world_size=1)
    assert len(list(loader)) == 3
    with pytest.raises(TypeError):
        len(loader)


def test_what_cannot_be_iterated_is_an_error() -> None:
    with pytest.raises(FabricTypeError, match=r"(?s)must be iterable.*int"):
        set_up(3)
