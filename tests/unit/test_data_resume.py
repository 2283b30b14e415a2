"""A loader goes on where it was, whatever stopped it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)

from fabric_lite import Fabric
from fabric_lite.data import extend_loader, place_of
from fabric_lite.errors import CheckpointError, FabricValueError

CPU = torch.device("cpu")
COUNT = 22


class Numbers(Dataset):
    def __init__(self, count: int = COUNT) -> None:
        self.count = count
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        self.loaded.append(index)
        return index


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(COUNT))


class Unsized(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(COUNT).tolist())


class Doubling(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield 2 * batch


KINDS: dict[str, Any] = {
    "in order": lambda **options: DataLoader(Numbers(), batch_size=3, **options),
    "shuffled": lambda **options: DataLoader(Numbers(), batch_size=3, shuffle=True, **options),
    "drop_last": lambda **options: DataLoader(Numbers(), batch_size=3, shuffle=True, drop_last=True, **options),
    "generator": lambda **options: DataLoader(
        Numbers(), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(1), **options
    ),
    "weighted": lambda **options: DataLoader(
        Numbers(), batch_size=3, sampler=WeightedRandomSampler([1.0, 2.0] * (COUNT // 2), COUNT), **options
    ),
    "batches": lambda **options: DataLoader(
        Numbers(), batch_sampler=BatchSampler(RandomSampler(range(COUNT)), 3, False), **options
    ),
    "no length": lambda **options: DataLoader(Numbers(), batch_size=3, sampler=Unsized(), **options),
    "unbatched": lambda **options: DataLoader(Numbers(), batch_size=None, shuffle=True, **options),
    "own iter": lambda **options: Doubling(Numbers(), batch_size=3, shuffle=True, **options),
}


def set_up(loader: Any, rank: int = 0, world_size: int = 1, **options: Any) -> Any:
    return extend_loader(loader, rank=rank, world_size=world_size, device=CPU, **options)


def plain(batches: Any) -> list[Any]:
    return [batch.tolist() if isinstance(batch, torch.Tensor) else batch for batch in batches]


def flat(batches: Any) -> list[int]:
    return [index for batch in plain(batches) for index in (batch if isinstance(batch, list) else [batch])]


def written_and_read(state: Any) -> Any:
    """A checkpoint on disk: JSON, and a file without code."""
    buffer = io.BytesIO()
    torch.save(json.loads(json.dumps(state)), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


WORKERS = [
    pytest.param({}, id="0 workers"),
    pytest.param({"num_workers": 2}, id="2 workers"),
    pytest.param({"num_workers": 1, "persistent_workers": True}, id="persistent"),
]


def resumes_everywhere(new: Any, cuts: Any) -> None:
    """Three epochs in one go against the same, cut within the second epoch and gone on with in a new process."""
    torch.manual_seed(7)
    torch.rand(3)
    loader = new()
    whole = []
    states: dict[int, Any] = {}
    for _ in range(3):
        batches = []
        for number, batch in enumerate(loader, start=1):
            batches += plain([batch])
            torch.rand(2)  # dropout, say
            if len(whole) == 1:
                states[number] = (loader.state_dict(), torch.get_rng_state())
        whole.append([batches, torch.rand(2).tolist()])
        if len(whole) == 2:
            states[0] = (loader.state_dict(), torch.get_rng_state())
    for cut in cuts(len(whole[1][0])):
        state, generator = states[cut]
        torch.manual_seed(99)
        again = new()
        again.load_state_dict(written_and_read(state))
        assert again.state_dict() == state, "loading and saving again changes nothing"
        torch.set_rng_state(generator)
        rest = []
        for epoch in range(1 if cut else 2, 3):
            batches = []
            for batch in again:
                batches += plain([batch])
                torch.rand(2)
            rest.append([batches, torch.rand(2).tolist()])
            del epoch
        expected = [[whole[1][0][cut:], whole[1][1]], whole[2]] if cut else [whole[2]]
        assert rest == expected, f"cut after {cut} batches"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_cut_after_any_batch_it_goes_on_bit_for_bit(kind: str, world_size: int) -> None:
    resumes_everywhere(
        lambda: set_up(KINDS[kind](), world_size - 1, world_size), cuts=lambda batches: range(batches + 1)
    )


@pytest.mark.parametrize("workers", WORKERS[1:])
@pytest.mark.parametrize("kind", ["shuffled", "generator"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_cut_with_batches_in_flight_it_goes_on_bit_for_bit(kind: str, world_size: int, workers: dict[str, Any]) -> None:
    resumes_everywhere(
        lambda: set_up(KINDS[kind](**workers), world_size - 1, world_size), cuts=lambda batches: (0, 1, batches)
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_nothing_that_was_seen_is_loaded_again(world_size: int) -> None:
    loader = set_up(KINDS["shuffled"](), 0, world_size)
    iterator = iter(loader)
    seen = flat(next(iterator) for _ in range(2))
    again = set_up(KINDS["shuffled"](), 0, world_size)
    again.load_state_dict(loader.state_dict())
    rest = flat(again)
    assert again.dataset.loaded == rest
    assert not set(seen) & set(rest)


@pytest.mark.parametrize("kind", ["in order", "shuffled", "weighted", "batches", "generator", "unbatched", "no length"])
@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("steps", [1, 2])
def test_at_another_world_size_the_rest_of_the_epoch_is_seen_exactly_once(
    kind: str, old: int, new: int, steps: int
) -> None:
    def draw(world_size: int, rank: int) -> Any:
        torch.manual_seed(world_size)
        return set_up(KINDS[kind](), rank, world_size)

    states, seen, left = [], [], []
    for rank in range(old):
        loader = draw(old, rank)
        iterator = iter(loader)
        seen += flat(next(iterator) for _ in range(steps))
        states.append(loader.state_dict())
        left += flat(iterator)
    assert all(state == states[0] for state in states), "the place is the same on every rank"
    rest = []
    lengths = set()
    for rank in range(new):
        loader = draw(new, rank)
        loader.load_state_dict(written_and_read(states[0]))
        batches = list(loader)
        lengths.add(len(batches))
        rest += flat(batches)
    assert len(lengths) == 1, "every rank has as many batches"
    if kind == "weighted":
        # Drawn with replacement: what is left and, for padding, what came first.
        assert set(left) - set(seen) <= set(rest) <= set(left) | set(seen)
        return
    assert set(seen) | set(rest) == set(range(COUNT))
    repeated = len(rest) - (COUNT - len(seen))
    assert 0 <= repeated < (3 * new if kind == "batches" else new), "only padding"
    assert new > 1 or repeated == 0


def test_without_padding_another_world_size_repeats_nothing() -> None:
    loaders = [set_up(KINDS["shuffled"](), rank, 2, pad=False) for rank in range(2)]
    iterators = [iter(loader) for loader in loaders]
    seen = [index for iterator in iterators for index in next(iterator).tolist()]
    for rank in range(3):
        loader = set_up(KINDS["shuffled"](), rank, 3, pad=False)
        loader.load_state_dict(loaders[0].state_dict())
        seen += flat(loader)
    assert sorted(seen) == list(range(COUNT))


def test_saved_after_the_loop_the_next_epoch_comes_and_after_the_last_batch_the_loop_ends() -> None:
    loader = set_up(KINDS["shuffled"](), 0, 2)
    in_loop = [loader.state_dict() for _ in loader][-1]
    after = loader.state_dict()
    assert (in_loop["epoch"], in_loop["seen"]) == (0, COUNT)
    assert (after["epoch"], after["seen"]) == (1, 0)
    again = set_up(KINDS["shuffled"](), 0, 2)
    again.load_state_dict(in_loop)
    assert plain(again) == []
    assert plain(again) == plain(loader)


def test_set_epoch_to_the_loaded_epoch_keeps_the_place_and_another_epoch_leaves_it() -> None:
    loader = set_up(KINDS["shuffled"](), 0, 2)
    whole = plain(loader)
    iterator = iter(set_up(KINDS["shuffled"](), 0, 2))
    del iterator
    loader.set_epoch(0)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    again = set_up(KINDS["shuffled"](), 0, 2)
    again.load_state_dict(state)
    again.set_epoch(0)
    assert plain(again) == whole[1:]
    again.load_state_dict(state)
    again.set_epoch(1)
    assert len(plain(again)) == len(whole)


def test_the_seed_travels_with_the_state() -> None:
    loader = set_up(KINDS["shuffled"](), 0, 2, seed=5)
    whole = plain(loader)
    loader.set_epoch(0)
    iterator = iter(loader)
    next(iterator)
    again = set_up(KINDS["shuffled"](), 0, 2, seed=6)
    again.load_state_dict(loader.state_dict())
    assert plain(again) == whole[1:]


def test_a_users_distributed_sampler_resumes_too_and_only_at_its_world_size() -> None:
    def new() -> Any:
        return set_up(DataLoader(Numbers(), batch_size=3, sampler=DistributedSampler(Numbers(), 2, 0)), 0, 2)

    resumes_everywhere(new, cuts=lambda batches: range(batches + 1))
    loader = new()
    next(iter(loader))
    with pytest.raises(FabricValueError, match=r"(?s)on each of 2 ranks.*on each of 3 ranks.*same number"):
        set_up(KINDS["shuffled"](), 0, 3, shard=False).load_state_dict(loader.state_dict())


def test_a_stream_resumes_by_reading_what_was_seen() -> None:
    resumes_everywhere(lambda: set_up(DataLoader(Stream(), batch_size=3)), cuts=lambda batches: range(batches + 1))


def test_a_loader_that_goes_round_and_round_resumes_in_a_later_epoch() -> None:
    class RoundAndRound(DataLoader):
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield from super().__iter__()

    for world_size in (1, 2):
        torch.manual_seed(0)
        loader = set_up(RoundAndRound(Numbers(), batch_size=3, shuffle=True), 0, world_size)
        iterator = iter(loader)
        for _ in range(13):
            next(iterator)
        state = loader.state_dict()
        expected = plain(next(iterator) for _ in range(2))
        again = set_up(RoundAndRound(Numbers(), batch_size=3, shuffle=True), 0, world_size)
        again.load_state_dict(state)
        assert plain(batch for _, batch in zip(range(2), again, strict=False)) == expected


@pytest.mark.parametrize("batches", [[1, 2, 3, 4], range(1, 5)])
def test_a_list_of_batches_resumes(batches: Any) -> None:
    loader = set_up(batches)
    iterator = iter(loader)
    next(iterator)
    again = set_up(batches)
    again.load_state_dict(written_and_read(loader.state_dict()))
    assert again.state_dict() == loader.state_dict()
    assert list(again) == [2, 3, 4]
    assert list(again) == [1, 2, 3, 4]


def test_what_is_no_state_of_a_loader_is_refused() -> None:
    with pytest.raises(FabricValueError, match=r"(?s)not the state of a loader.*missing.*epoch"):
        set_up(KINDS["shuffled"]()).load_state_dict({"step": 3})


def test_a_place_in_batches_is_not_one_in_samples() -> None:
    loader = set_up(KINDS["batches"](), 0, 2)
    next(iter(loader))
    with pytest.raises(FabricValueError, match=r"(?s)1?2 batches dealt out to 2 ranks; here: samples"):
        set_up(KINDS["shuffled"](), 0, 2).load_state_dict(loader.state_dict())


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_place_in_words_counts_batches_over_every_stop(world_size: int) -> None:
    loader = set_up(KINDS["shuffled"](), 0, world_size)
    list(loader)
    batches = len(loader)
    for expected in range(1, batches):
        iterator = iter(loader)
        next(iterator)
        state = written_and_read(loader.state_dict())
        loader = set_up(KINDS["shuffled"](), 0, world_size)
        loader.load_state_dict(state)
        assert str(place_of(loader)) == f"epoch 1, batch {expected}; 0 samples repeated, 0 skipped"
    assert len(list(loader)) == 1
    assert str(place_of(loader)) == "epoch 2, batch 0; 0 samples repeated, 0 skipped"


def test_the_place_in_words_tells_what_another_world_size_costs() -> None:
    loader = set_up(KINDS["drop_last"](), 0, 2)  # 22 samples: 3 steps of 6, 4 are dropped
    next(iter(loader))
    for world_size, skipped in [(1, 0), (2, 0), (4, 0), (8, 12)]:
        again = set_up(KINDS["drop_last"](), 0, world_size)
        again.load_state_dict(loader.state_dict())
        assert place_of(again).skipped == skipped
    loader = set_up(KINDS["shuffled"](), 0, 2)
    next(iter(loader))
    again = set_up(KINDS["shuffled"](), 0, 3)
    again.load_state_dict(loader.state_dict())
    assert str(place_of(again)) == "epoch 0, batch 1 on 2 ranks; 2 samples repeated, 0 skipped"
    assert len(flat(again)) * 3 == 18, "16 samples are left, and 2 come again"


def test_the_place_in_words_of_a_list_of_batches() -> None:
    loader = set_up([1, 2, 3])
    next(iter(loader))
    assert str(place_of(loader)) == "epoch 0, batch 1; 0 batches repeated, 0 skipped"


def train(fabric: Any, batches: Any, model: Any, optimizer: Any, accumulate: int, seen: list[int]) -> Iterator[int]:
    """Steps after every ``accumulate`` batches; yields after each batch how many wait."""
    waiting = 0
    for batch in batches:
        seen += batch.tolist()
        fabric.backward(model(batch[:, None].float()).sum())
        waiting = (waiting + 1) % accumulate
        if waiting == 0:
            optimizer.step()
            optimizer.zero_grad()
        yield waiting


@pytest.mark.parametrize("stop", range(8))
def test_a_state_within_an_accumulation_window_tells_the_place_before_it(stop: int) -> None:
    def new() -> tuple[Any, ...]:
        fabric = Fabric(accelerator="cpu", devices=1)
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters()))
        loader = fabric.setup_dataloaders(
            DataLoader(Numbers(), batch_size=3, shuffle=True, generator=torch.Generator())
        )
        return fabric, loader, model, optimizer

    fabric, loader, model, optimizer = new()
    whole: list[int] = []
    for _ in train(fabric, loader, model, optimizer, 4, whole):
        pass
    expected = model.weight.item()
    fabric.close()

    fabric, loader, model, optimizer = new()
    seen: list[int] = []
    steps = train(fabric, loader, model, optimizer, 4, seen)
    waiting = [next(steps) for _ in range(stop + 1)][-1]
    if waiting:
        with pytest.warns(UserWarning, match=f"The gradients of the latest {waiting} batches wait.*after optimizer"):
            state = loader.state_dict()
        seen = seen[: 3 * (stop + 1 - waiting)]
    else:
        state = loader.state_dict()
    assert state["seen"] == len(seen)
    states = model.state_dict(), optimizer.state_dict()
    fabric.close()
    fabric, loader, model, optimizer = new()
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    loader.load_state_dict(state)
    for _ in train(fabric, loader, model, optimizer, 4, seen):
        pass
    fabric.close()
    assert seen == whole
    assert model.weight.item() == expected


def test_a_loader_of_a_run_without_steps_tells_the_place_that_it_is_at() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(torch.nn.Linear(1, 1))
    loader = fabric.setup_dataloaders(DataLoader(Numbers(), batch_size=3))
    iterator = iter(loader)
    for _ in range(2):
        fabric.backward(model(next(iterator)[:, None].float()).sum())
    assert loader.state_dict()["seen"] == 6
    fabric.close()


def one_step(fabric: Any, model: Any, optimizer: Any = None) -> None:
    fabric.backward(model(torch.ones(1, 1)).sum())
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def test_a_released_optimizer_opens_no_window_any_more() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = torch.nn.Linear(1, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(DataLoader(Numbers(), batch_size=3))
    fabric.release(optimizer)
    for _, _ in zip(range(2), loader, strict=False):
        one_step(fabric, model, optimizer)
    assert loader.state_dict()["seen"] == 6
    fabric.close()


@pytest.mark.parametrize("data", ["loader", "list"])
def test_gradients_that_wait_while_another_optimizer_steps_are_told(data: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    pairs = []
    for _ in range(2):
        model = torch.nn.Linear(1, 1)
        pairs.append(fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    loader = fabric.setup_dataloaders(DataLoader(Numbers(), batch_size=3) if data == "loader" else [1, 2, 3])
    iterator = iter(loader)
    next(iterator)
    for pair in pairs:
        one_step(fabric, *pair)
    loader.state_dict()
    next(iterator)
    one_step(fabric, pairs[0][0])
    one_step(fabric, *pairs[1])
    with pytest.warns(UserWarning, match="Gradients of SGD wait for a step while another optimizer has stepped"):
        loader.state_dict()
    next(iterator)
    pairs[0][1].step()  # its gradients stay where they are
    one_step(fabric, *pairs[1])
    loader.state_dict()
    fabric.close()


def test_gradients_that_wait_after_a_step_that_found_none_are_told() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = torch.nn.Linear(1, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(DataLoader(Numbers(), batch_size=3))
    iterator = iter(loader)
    next(iterator)
    one_step(fabric, model, optimizer)  # its gradients are counted
    optimizer.zero_grad()
    optimizer.step()
    next(iterator)
    model(torch.ones(1, 1)).sum().backward()  # nobody counts these
    with pytest.warns(UserWarning, match="Gradients of SGD wait for a step"):
        loader.state_dict()
    fabric.close()


class Counting:
    """Keeps its place itself."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[int]:
        while self.place < 6:
            self.place += 1
            yield self.place
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def test_a_list_of_batches_heeds_the_window_too() -> None:
    for batches, seen, then in ((list(range(6)), 1, "they come again"), (Counting(), 2, "they are lost")):
        fabric = Fabric(accelerator="cpu", devices=1)
        model = torch.nn.Linear(1, 1)
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        loader = fabric.setup_dataloaders(batches)
        iterator = iter(loader)
        next(iterator)
        one_step(fabric, model, optimizer)
        next(iterator)
        one_step(fabric, model)
        with pytest.warns(UserWarning, match=f"The gradients of the latest 1 batches wait.*{then}"):
            assert loader.state_dict()["seen"] == seen
        fabric.close()


def test_the_place_in_words_of_an_iterable_that_keeps_its_own() -> None:
    loader = set_up(Counting())
    list(loader)
    iterator = iter(loader)
    next(iterator), next(iterator)
    again = set_up(Counting())
    again.load_state_dict(written_and_read(loader.state_dict()))
    assert str(place_of(again)) == str(place_of(loader)) == "epoch 1, batch 2; 0 batches repeated, 0 skipped"
    assert list(again) == [3, 4, 5, 6]
    assert str(place_of(again)) == "epoch 2, batch 0; 0 batches repeated, 0 skipped"
    again.load_state_dict({"place": 4})  # of a run in which it was not set up
    assert list(again) == [5, 6]


class Unloadable:
    def state_dict(self) -> dict[str, int]:
        return {"value": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise ValueError("not today")


@pytest.mark.parametrize("kind", ["map", "stream", "own"])
def test_a_load_that_fails_within_a_loop_leaves_the_loop_and_its_place(kind: str, tmp_path: Any) -> None:
    make = {"map": KINDS["shuffled"], "stream": lambda: DataLoader(Stream(), batch_size=3), "own": Counting}[kind]
    fabric = Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(make())
    objects = {"loader": loader, "other": Unloadable()}
    fabric.save(tmp_path / "a.ckpt", objects)
    iterator = iter(loader)
    next(iterator), next(iterator)
    with pytest.raises(CheckpointError, match="not today"):
        fabric.load(tmp_path / "a.ckpt", objects)
    next(iterator)
    assert place_of(loader).batch == 3
    assert loader.state_dict()["seen"] == (9 if kind == "map" else 3)
    fabric.close()


def test_a_sampler_without_the_generator_of_the_saved_one_is_refused_with_a_reason() -> None:
    def new(generator: torch.Generator | None) -> Any:
        sampler = WeightedRandomSampler([1.0] * COUNT, COUNT, generator=generator)
        return set_up(DataLoader(Numbers(), batch_size=3, sampler=sampler))

    loader = new(torch.Generator())
    next(iter(loader))
    again = new(None)
    again.load_state_dict(loader.state_dict())
    with pytest.raises(
        FabricValueError, match=r"(?s)other generators.*1 in the state; in this WeightedRandomSampler: 0"
    ):
        list(again)
