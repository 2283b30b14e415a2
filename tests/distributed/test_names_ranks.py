"""Groups of a program's own, and whether a folder is shared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fabric_lite import Fabric
from fabric_lite.plugins.collectives import TorchCollective
from fabric_lite.testing import RankPool
from fabric_lite.utilities import is_shared_filesystem
from fabric_lite.utilities.distributed import ReduceOp


def talk() -> dict[str, Any]:
    """Ranks 1 and 2 among themselves, and all together."""
    fabric = Fabric(accelerator="cpu")
    rank = fabric.global_rank
    everybody, pair = TorchCollective().setup(), TorchCollective()
    pair.create_group(ranks=[1, 2])
    found: dict[str, Any] = {"ranks": (everybody.rank, everybody.world_size, pair.rank, pair.world_size)}
    found["sum"] = everybody.all_reduce(torch.tensor([float(rank)])).item()
    found["objects"] = everybody.broadcast_object_list([rank, "a"], src=2)
    found["scattered"] = everybody.scatter_object_list([None], [10, 11, 12] if rank == 0 else None)[0]
    found["gathered"] = everybody.gather_object(rank, [None] * 3 if rank == 0 else None)
    if rank > 0:
        found["largest"] = pair.all_reduce(torch.tensor([float(rank)]), ReduceOp.MAX).item()
        found["first"] = pair.broadcast(torch.tensor([rank]), src=1).item()
        found["both"] = [
            one.item() for one in pair.all_gather([torch.zeros(1) for _ in range(2)], torch.ones(1) * rank)
        ]
        found["names"] = pair.all_gather_object([None, None], f"rank {rank}")
        if rank == 1:
            pair.send(torch.tensor([7.0]), dst=2)
        else:
            found["received"] = pair.recv(torch.zeros(1), src=1).item()
        pair.barrier()
    pair.teardown()
    everybody.teardown()
    found["still connected"] = torch.distributed.is_initialized()
    fabric.close()
    return found


def test_groups_of_a_program_are_torchs(ranks: RankPool) -> None:
    found = ranks.run(talk, ranks=3)
    assert [one["ranks"] for one in found] == [(0, 3, -1, -1), (1, 3, 0, 2), (2, 3, 1, 2)]
    assert [one["sum"] for one in found] == [3.0] * 3
    assert [one["objects"] for one in found] == [[2, "a"]] * 3
    assert [one["scattered"] for one in found] == [10, 11, 12]
    assert [one["gathered"] for one in found] == [[0, 1, 2], None, None]
    assert [(one["largest"], one["first"], one["both"]) for one in found[1:]] == [(2.0, 1, [1.0, 2.0])] * 2
    assert [one["names"] for one in found[1:]] == [["rank 1", "rank 2"]] * 2
    assert found[2]["received"] == 7.0
    assert all(one["still connected"] for one in found)


def shares(folder: Path) -> tuple[bool, bool, bool]:
    fabric = Fabric(accelerator="cpu")
    own = folder / str(fabric.global_rank)
    own.mkdir()
    result = (
        is_shared_filesystem(fabric.strategy, folder),
        is_shared_filesystem(path=own),
        is_shared_filesystem(path="s3://bucket/a"),
    )
    fabric.close()
    return result


def test_a_folder_that_all_ranks_see_is_shared(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(shares, tmp_path) == [(True, False, True)] * 2
    assert sorted(os.listdir(tmp_path)) == ["0", "1"]
    assert os.listdir(tmp_path / "0") == []
