"""Two ranks that save a folder and are killed at any moment leave the old checkpoint or the new one."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_lite.checkpoint import load, save
from fabric_lite.checkpoint.commit import is_temporary
from fabric_lite.errors import CheckpointError
from tests.faults.conftest import Figures
from tests.faults.nursery import Nursery

RANKS = 2


def join_ranks(rank: int, store: Path) -> None:
    import datetime

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    file_store = torch.distributed.FileStore(str(store), RANKS)  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=file_store, rank=rank, world_size=RANKS, timeout=timeout)


def sharded(number: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    local = torch.full((100_000,), float(number))
    return DTensor.from_local(local, init_device_mesh("cpu", (RANKS,)), [Shard(0)], run_check=False)


def save_for_ever(path: Path, first: int, log: Path) -> None:
    for number in itertools.count(first):
        save(path, {"number": number, "weights": [sharded(number) for _ in range(5)]}, state_dict_type="sharded")
        # By whichever rank: a save that has returned on one of them is in place.
        with log.open("a") as file:
            file.write(f"{number}\n")


def started(function: Any, arguments: list[tuple[Any, ...]]) -> list[Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.tensor"])
    processes = [context.Process(target=function, args=each) for each in arguments]
    for process in processes:
        process.start()
    return processes


@pytest.mark.parametrize("kills", [1, pytest.param(100, marks=pytest.mark.full)])
def test_ranks_killed_at_a_random_moment_leave_the_old_or_the_new_folder(
    tmp_path: Path, kills: int, times: int, figures: Figures
) -> None:
    path, moments, number, unfinished = tmp_path / "saves" / "a", random.Random(0), 0, 0
    with Nursery() as nursery:
        for trial in range(kills * times):
            log = tmp_path / f"saved-{trial}"
            kill = (log, moments.uniform(0.0, 0.1))
            ends = nursery.run(save_for_ever, path, number + 1, log, ranks=RANKS, kill=kill)
            assert [end.code for end in ends] == [-signal.SIGKILL] * RANKS, "one ended otherwise, not by the kill"
            reported = max(map(int, log.read_text().split()), default=number)
            content = load(path)  # compares the checksums
            number = content["number"]
            assert number in (reported, reported + 1)
            assert all(weight.eq(number).all() and weight.shape == (RANKS * 100_000,) for weight in content["weights"])
            left = [name for name in path.parent.iterdir() if is_temporary(name.name)]
            assert len(left) <= 1
            unfinished += len(left)
    assert unfinished or kills == 1, "no kill came in the middle of a save: the test shows nothing"
    save(tmp_path / "saves" / "a", {"number": -1}, state_dict_type="sharded")
    assert [name.name for name in (tmp_path / "saves").iterdir()] == ["a"]
    figures("SIGKILL at a random moment: sharded", kills=kills * times, within_a_save=unfinished, lost=0, mixed=0)


class EndsAtOnce:
    """Its rank dies while it is asked for its state."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def state_dict(self) -> dict[str, int]:
        if self.rank == 1:
            os._exit(9)
        return {"value": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise AssertionError(state)


def save_with_a_rank_that_dies(rank: int, store: Path, path: Path, pipe: Any) -> None:
    join_ranks(rank, store)
    try:
        save(path, {"weight": sharded(1), "object": EndsAtOnce(rank)}, state_dict_type="sharded")
    except CheckpointError as error:
        pipe.send(str(error))


def test_a_rank_whose_peer_is_killed_raises_and_the_old_folder_is_intact(tmp_path: Path) -> None:
    save(tmp_path / "saves" / "a", {"number": 1}, state_dict_type="sharded")
    receiver, sender = multiprocessing.Pipe(duplex=False)
    arguments = [(rank, tmp_path / "store", tmp_path / "saves" / "a", sender) for rank in range(RANKS)]
    processes = started(save_with_a_rank_that_dies, arguments)
    sender.close()
    message = receiver.recv()
    for process in processes:
        process.join()
    assert "the ranks lost each other" in message
    assert load(tmp_path / "saves" / "a") == {"number": 1}
    assert [name.name for name in (tmp_path / "saves").iterdir()] == ["a"]
