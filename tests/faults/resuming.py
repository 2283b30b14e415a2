"""A small training run in which every kind of randomness matters, stopped and gone on with."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, WeightedRandomSampler, get_worker_info

from fabric_lite import DDPStrategy, Fabric
from fabric_lite.data import place_of
from fabric_lite.seed import random_state
from fabric_lite.strategies import FSDPStrategy

SAMPLES, EPOCHS, STOPPED_IN = 32, 3, 1
STOPS = ("first", "middle", "last", "edge")
DATA = ("shuffled map", "weighted sampler", "batch sampler", "iterable", "iterable read again")


def sample(index: int) -> dict[str, Any]:
    """One sample, augmented with draws of all three generators."""
    noise = torch.tensor([random.random(), float(np.random.rand()), index / SAMPLES])
    return {"index": index, "x": torch.cat([noise, torch.randn(5)])}


class Samples(Dataset):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return sample(index)


class Stream(IterableDataset):
    """Splits itself over ranks and workers, and says where it is."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.place = self.first = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers, worker = (1, 0) if info is None else (info.num_workers, info.id)
        mine = range(SAMPLES)[self.rank :: self.world_size][worker::workers]
        self.place, self.first = self.first, 0
        while self.place < len(mine):
            self.place += 1
            yield sample(mine[self.place - 1])

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = self.first = state["place"]


class PlainStream(IterableDataset):
    """The same without a state: what was seen is read again and dropped."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.stream = Stream(rank, world_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.stream)


class Pairs(BatchSampler):
    """Batches of neighbors, in an order that Python's generator draws."""

    def __init__(self) -> None:
        self.batch_size, self.drop_last = 2, False

    def __iter__(self) -> Iterator[list[int]]:
        batches = [[index, index + 1] for index in range(0, SAMPLES, 2)]
        random.shuffle(batches)
        return iter(batches)

    def __len__(self) -> int:
        return SAMPLES // 2


def make_loader(data: str, workers: int, rank: int, world_size: int) -> DataLoader:
    if data == "shuffled map":
        return DataLoader(Samples(), batch_size=2, shuffle=True, num_workers=workers)
    if data == "weighted sampler":
        weights = [1.0 + index % 3 for index in range(SAMPLES)]
        sampler = WeightedRandomSampler(weights, SAMPLES, replacement=False)
        return DataLoader(Samples(), batch_size=2, sampler=sampler, num_workers=workers)
    if data == "batch sampler":
        return DataLoader(Samples(), batch_sampler=Pairs(), num_workers=workers)
    kind = Stream if data == "iterable" else PlainStream
    return DataLoader(kind(rank, world_size), batch_size=2, num_workers=workers)


def make_model(dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16), nn.Dropout(dropout), nn.Sequential(nn.Linear(16, 16), nn.GELU()), nn.Linear(16, 1)
    )


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a run is made of."""

    strategy: str
    precision: str
    workers: int
    data: str
    accumulation: int
    ranks: int = 2
    dropout: float = 0.3


class Run:
    """The objects of one run, as a script makes them from its top.

    Args:
        cell: What to make.
        scramble: Random numbers that another life of the process has drawn before.
        pad: As for ``setup_dataloaders``.
    """

    def __init__(self, cell: Cell, scramble: int = 0, pad: bool | None = None) -> None:
        self.cell = cell
        strategies = {"ddp": DDPStrategy, "fsdp": lambda: FSDPStrategy(auto_wrap_policy={nn.Sequential})}
        strategy = strategies[cell.strategy]()
        self.fabric = Fabric(accelerator="cpu", devices=cell.ranks, strategy=strategy, precision=cell.precision)
        self.fabric.seed_everything(7)
        torch.rand(scramble), np.random.rand(scramble), [random.random() for _ in range(scramble)]
        model = make_model(cell.dropout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        self.model, self.optimizer = self.fabric.setup(model, optimizer)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        rank = self.fabric.global_rank
        loader = make_loader(cell.data, cell.workers, rank, cell.ranks)
        self.loader = self.fabric.setup_dataloaders(loader, pad=pad)
        self.state = {
            "fabric": self.fabric,
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
            "epoch": 0,
        }

    def batches(self, trace: list[Any]) -> Iterator[tuple[int, int, bool]]:
        """Train to the end; yield epoch, number of the batch and whether it ended with a step. After an epoch, 0."""
        for epoch in range(self.state["epoch"], EPOCHS):
            self.state["epoch"] = epoch
            first = place_of(self.loader).batch + 1
            for number, batch in enumerate(self.loader, start=first):
                steps = number % self.cell.accumulation == 0
                with self.fabric.no_backward_sync(self.model, enabled=not steps):
                    loss = self.model(batch["x"]).float().square().mean()
                    self.fabric.backward(loss)
                trace.append((epoch, number, loss.item(), batch["index"].tolist(), digest(batch["x"])))
                if steps:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                yield epoch, number, steps
            self.scheduler.step()
            trace.append((epoch, "between", torch.rand(()).item()))
            self.state["epoch"] = epoch + 1
            yield epoch, 0, True

    def ends(self) -> dict[str, str]:
        """What has to be the same, bit for bit."""
        return {
            "weights": digest(self.model.state_dict()),
            "moments": digest(self.optimizer.state_dict()),
            "schedule": digest(self.scheduler.state_dict()),
            "random": digest(random_state()),
        }


def saved_at(stop: str, cell: Cell, batches: int) -> tuple[int, int]:
    """Epoch and batch after which the state is saved that a run goes on from when it is stopped there.

    States are saved after steps. A run that is stopped within a window goes on from the step before; in the first
    window that is the end of the epoch before.
    """
    if stop == "edge":
        return STOPPED_IN, 0
    batch = {"first": 1, "middle": batches // 2 + 1, "last": batches}[stop]
    batch -= batch % cell.accumulation
    return (STOPPED_IN, batch) if batch else (STOPPED_IN - 1, 0)


def compare(cell: Cell, stops: list[str], folder: str) -> list[dict[str, Any]]:
    """On each rank: a run in one go, and one from each stop; what differs, and what resuming repeats and skips."""
    whole, trace = Run(cell), list[Any]()
    paths = {stop: Path(folder) / f"{stop}.ckpt" for stop in stops}
    traced: dict[str, int] = {}
    per_epoch = SAMPLES // 2 // cell.ranks
    for epoch, batch, _ in whole.batches(trace):
        for stop in stops:
            if saved_at(stop, cell, per_epoch) == (epoch, batch):
                whole.fabric.save(paths[stop], whole.state)
                traced[stop] = len(trace)
    ends = whole.ends()
    whole.fabric.close()
    return [resumed(cell, stop, paths[stop], trace, traced[stop], ends) for stop in stops]


def compare_within_a_window(cell: Cell, folder: str) -> dict[str, Any]:
    """On each rank: as :func:`compare`, saved two batches after a step; with how many warnings."""
    whole, trace, path = Run(cell), list[Any](), Path(folder) / "within.ckpt"
    traced, said = 0, 0
    for epoch, batch, steps in whole.batches(trace):
        if (epoch, batch) == (STOPPED_IN, cell.accumulation + 2):
            assert not steps
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                whole.fabric.save(path, whole.state)
            said = sum("The gradients of the latest 2 batches wait" in str(warning.message) for warning in caught)
            traced = len(trace) - 2
    ends = whole.ends()
    whole.fabric.close()
    return {**resumed(cell, "within", path, trace, traced, ends), "said": said}


def resumed(cell: Cell, stop: str, path: Path, whole: list[Any], traced: int, ends: dict[str, str]) -> dict[str, Any]:
    """Go on to the end, against the ``whole`` trace, of which ``traced`` entries came before what was saved."""
    run = Run(cell, scramble=3 + torch.distributed.get_rank() if cell.ranks > 1 else 3)
    run.state.update(run.fabric.load(path, run.state))
    trace: list[Any] = []
    for _ in run.batches(trace):
        pass
    again = run.ends()
    run.fabric.close()
    differing = [name for name in ends if ends[name] != again[name]]
    expected = whole[traced:]
    if trace != expected:
        pairs = itertools.zip_longest(trace, expected)
        differing.append(f"trace: {next(pair for pair in pairs if pair[0] != pair[1])}")
    seen, should = samples_in(whole[:traced] + trace), samples_in(whole)
    return {
        "stop": stop,
        "differing": differing,
        "repeated": (seen - should).total(),
        "skipped": (should - seen).total(),
    }


def samples_in(trace: list[Any]) -> collections.Counter[tuple[int, int]]:
    """How often each sample was seen in each epoch."""
    return collections.Counter((entry[0], index) for entry in trace if len(entry) > 3 for index in entry[3])


def save_midway(cell: Cell, path: str, batches: int) -> dict[str, Any]:
    """On each rank: train into the second epoch and save; the samples seen in it, and what was saved."""
    run, trace = Run(cell, pad=False), list[Any]()
    for place in run.batches(trace):
        if place[:2] == (STOPPED_IN, batches):
            break
    run.fabric.save(path, run.state)
    seen = [index for entry in trace if entry[0] == STOPPED_IN for index in entry[3]]
    result = {"seen": seen, **whole_ends(run)}
    run.fabric.close()
    return result


def go_on_elsewhere(cell: Cell, path: str) -> dict[str, Any]:
    """On each rank of perhaps another number: load, and train to the end of the epoch."""
    run, trace = Run(cell, scramble=3, pad=False), list[Any]()
    run.state.update(run.fabric.load(path, run.state))
    result = {"place": place_of(run.loader), **whole_ends(run)}
    for _, batch, _ in run.batches(trace):
        if batch == 0:
            break
    batches = [entry for entry in trace if len(entry) > 3]
    result |= {"rest": [index for entry in batches for index in entry[3]], "batches": len(batches)}
    run.fabric.close()
    return result


def whole_ends(run: Run) -> dict[str, str]:
    """Checksums that are the same however a state is laid out over ranks."""
    return {
        "weights": digest(run.model.state_dict(), is_whole=True),
        "moments": digest(run.optimizer.state_dict(), is_whole=True),
    }


def digest(value: Any, is_whole: bool = False) -> str:
    """A checksum of nested data with tensors; of sharded ones their own part, or all if ``is_whole``."""
    hasher = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            local: Any = value
            if hasattr(value, "full_tensor"):
                local = value.full_tensor() if is_whole else value.to_local()
            hasher.update(local.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, inner in value.items():
                hasher.update(repr(key).encode())
                add(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                add(inner)
        else:
            hasher.update(repr(value).encode())

    add(value)
    return hasher.hexdigest()
