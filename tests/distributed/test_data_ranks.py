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

from fabric_lite import Fabric
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
