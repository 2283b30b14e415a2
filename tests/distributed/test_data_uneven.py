"""Ranks whose data differs in length end together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from fabric_lite import Fabric
from fabric_lite.data import extend_loader
from fabric_lite.testing import RankPool


class Stream(IterableDataset):
    def __init__(self, length: int, fails_at: int | None = None) -> None:
        self.length = length
        self.fails_at = fails_at

    def __iter__(self) -> Iterator[int]:
        for number in range(self.length):
            if number == self.fails_at:
                raise OSError("the disk is gone")
            yield number


def read(lengths: list[int], num_workers: int, kind: str) -> list[list[Any]]:
    fabric = Fabric(accelerator="cpu", devices=len(lengths))
    length = lengths[fabric.global_rank]
    batches = [torch.arange(start, min(start + 2, length)) for start in range(0, length, 2)]
    data = batches if kind == "list" else DataLoader(Stream(length), batch_size=2, num_workers=num_workers)
    place = {"rank": fabric.global_rank, "world_size": fabric.world_size, "device": torch.device("cpu")}
    loader = extend_loader(data, **place, shard=False, uneven="stop")
    epochs = []
    for _ in range(2):
        seen = []
        for batch in loader:
            dist.all_reduce(torch.ones(1))  # a step that waits for all ranks
            seen.append(batch.tolist())
        epochs.append(seen)
    fabric.close()
    return epochs


def read_until_it_fails() -> str:
    fabric = Fabric(accelerator="cpu", devices=2)
    data = DataLoader(Stream(10, fails_at=4 if fabric.global_rank == 1 else None), batch_size=2)
    loader = extend_loader(
        data, rank=fabric.global_rank, world_size=2, device=torch.device("cpu"), shard=False, uneven="stop"
    )
    seen = 0
    try:
        for _ in loader:
            seen += 1
    except OSError as error:
        return f"{error} after {seen}"
    finally:
        fabric.close()
    return f"ended after {seen}"


@pytest.mark.parametrize("kind", ["loader", "list"])
@pytest.mark.parametrize(("lengths", "batches"), [([9, 4], 2), ([4, 4], 2), ([0, 5], 0)])
def test_all_ranks_end_with_the_first_and_lose_nothing_they_were_given(
    ranks: RankPool, lengths: list[int], batches: int, kind: str
) -> None:
    for epochs in ranks.run(read, lengths, 0, kind, ranks=2):
        assert epochs == [[[2 * number, 2 * number + 1] for number in range(batches)]] * 2


def test_workers_that_have_fetched_ahead_do_not_matter(ranks: RankPool) -> None:
    for epochs in ranks.run(read, [9, 4], 1, "loader", ranks=2):
        assert epochs == [[[0, 1], [2, 3]]] * 2


def test_an_exception_on_one_rank_ends_the_others(ranks: RankPool) -> None:
    assert ranks.run(read_until_it_fails, ranks=2) == ["ended after 2", "the disk is gone after 2"]
