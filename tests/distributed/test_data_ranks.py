"""Loaders set up by Fabric on real ranks."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

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
