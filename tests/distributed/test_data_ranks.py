"""Loaders set up by Fabric on real ranks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from fabric_lite import CollectiveError, Fabric
from fabric_lite.data import place_of
from fabric_lite.errors import FabricRuntimeError, FabricValueError
from fabric_lite.testing import RankPool


class Numbers(Dataset):
    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "noise": (torch.rand(()), random.random(), np.random.rand())}


def read(seed: int) -> dict[str, Any]:
    fabric = Fabric(accelerator="cpu", devices=2)
    fabric.seed_everything(seed, workers=True)
    loader = fabric.setup_dataloaders(DataLoader(Numbers(), batch_size=4, shuffle=True, num_workers=1))
    sampler = DistributedSampler(range(23), 2, fabric.global_rank)
    by_hand = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        by_hand.append(list(sampler))
    epochs = [list(loader) for _ in range(2)]
    fabric.close()
    return {
        "by hand": by_hand,
        "indices": [[index for batch in epoch for index in batch["index"].tolist()] for epoch in epochs],
        "noise": [part.tolist() for epoch in epochs for batch in epoch for part in batch["noise"]],
    }


def test_order_is_that_of_the_script_by_hand_and_worker_noise_differs_over_ranks_and_repeats(
    ranks: RankPool,
) -> None:
    first, second = ranks.run(read, 5, ranks=2)
    assert first["indices"] == first["by hand"]
    assert second["indices"] == second["by hand"]
    assert not {x for part in first["noise"] for x in part} & {x for part in second["noise"] for x in part}
    assert ranks.run(read, 5, ranks=2) == [first, second]


class OwnPlace:
    """Somebody else's loader, which reads a part of its own on each rank."""

    def __init__(self, rank: int) -> None:
        self.items = list(range(100 * rank, 100 * rank + 6 - rank))
        self.place = 0

    def __iter__(self) -> Iterator[int]:
        while self.place < len(self.items):
            self.place += 1
            yield self.items[self.place - 1]

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class OwnStream(OwnPlace, IterableDataset):
    """The same within a DataLoader."""


def go_on(kind: str, path: str) -> list[list[Any]]:
    fabric = Fabric(accelerator="cpu", devices=2)

    def new() -> Any:
        mine = OwnPlace(fabric.global_rank) if kind == "loader" else DataLoader(OwnStream(fabric.global_rank))
        return fabric.setup_dataloaders(mine, use_distributed_sampler=kind == "dataset")

    loader = new()
    iterator = iter(loader)
    for _ in range(2 + fabric.global_rank):
        next(iterator)
    fabric.save(path, {"loader": loader})
    again = new()
    fabric.load(path, {"loader": again})
    parts = [[int(item) for item in part] for part in (iterator, again)]
    fabric.close()
    return parts


@pytest.mark.parametrize("kind", ["loader", "dataset"])
def test_each_rank_goes_on_at_the_place_that_its_own_data_keep(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    results = ranks.run(go_on, kind, str(tmp_path / "a.ckpt"), ranks=2)
    assert results == [[[2, 3, 4, 5]] * 2, [[103, 104]] * 2]


def place_elsewhere(path: str, ranks: int) -> str:
    """Save from one rank or from two, or load into two; what is said."""
    fabric = Fabric(accelerator="cpu", devices=ranks)
    loader = fabric.setup_dataloaders(OwnPlace(fabric.global_rank), use_distributed_sampler=False)
    try:
        if ranks == 1:
            next(iter(loader))
            fabric.save(path, {"loader": loader})
            return str(place_of(loader))
        with pytest.raises(FabricValueError) as error:
            fabric.load(path, {"loader": loader})
        return str(error.value)
    finally:
        fabric.close()


def test_the_place_of_one_ranks_own_data_is_not_that_of_two(ranks: RankPool, tmp_path: Path) -> None:
    path = str(tmp_path / "a.ckpt")
    assert ranks.run(place_elsewhere, path, 1, ranks=1) == ["epoch 0, batch 1; 0 batches repeated, 0 skipped"]
    assert all("the states of 1 ranks; here: 2" in said for said in ranks.run(place_elsewhere, path, 2))


class Breaks(OwnPlace):
    """Cannot tell its place on rank 1."""

    def state_dict(self) -> dict[str, int]:
        if self.items[0] >= 100:
            raise ValueError("no place")
        return super().state_dict()


class BreaksInALoader(Breaks, IterableDataset):
    """The same within a DataLoader."""


def break_on_one_rank(kind: str) -> tuple[str, int]:
    fabric = Fabric(accelerator="cpu", devices=2)
    rank = fabric.global_rank
    mine = Breaks(rank) if kind == "loader" else DataLoader(BreaksInALoader(rank))
    loader = fabric.setup_dataloaders(mine, use_distributed_sampler=kind != "loader")
    iterator = iter(loader)
    next(iterator)
    with pytest.raises((FabricRuntimeError, ValueError)) as error:
        loader.state_dict()
    total = int(fabric.all_reduce(torch.tensor(rank + 1), reduce_op="sum"))
    fabric.close()
    return str(error.value), total


@pytest.mark.parametrize("kind", ["loader", "dataset"])
def test_a_place_that_fails_on_one_rank_fails_on_all_and_collectives_stay_paired(ranks: RankPool, kind: str) -> None:
    (other, total), (own, same) = ranks.run(break_on_one_rank, kind)
    assert (own, total, same) == ("no place", 3, 3)
    assert "failed on rank 1: ValueError: no place" in other


def end_together_checked() -> str:
    fabric = Fabric(accelerator="cpu", devices=2, check_collectives=True)
    loader = fabric.setup_dataloaders([1, 2, 3], use_distributed_sampler=False, uneven="stop")
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(CollectiveError) as error:
        fabric.barrier() if fabric.global_rank else next(iterator)
    fabric.close()
    return str(error.value)


def test_ending_together_is_checked_as_other_collectives_are(ranks: RankPool) -> None:
    first, second = ranks.run(end_together_checked)
    assert first == second
    assert "barrier" in first
    assert "all_reduce min" in first
