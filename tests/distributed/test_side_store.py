"""A thread beside the loop reaches the other ranks, and ends with the process."""

from __future__ import annotations

import contextlib
import io
import itertools
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fabric_lite import Fabric
from fabric_lite.errors import CollectiveError
from fabric_lite.side_store import SideThread
from fabric_lite.testing import RankPool
from tests.distributed.launching import fabric_run, write

numbers = itertools.count()


def meet_in_the_store() -> tuple[list[int], int]:
    found: list[int] = []
    met = threading.Event()

    def work(thread: SideThread, store: Any) -> None:
        store.set(f"rank {dist.get_rank()}", str(dist.get_rank() * 10))
        keys = [f"rank {number}" for number in range(dist.get_world_size())]
        while not store.check(keys):
            if not thread.wait(0.01):
                return
        found.extend(int(value) for value in store.multi_get(keys))
        met.set()
        while thread.wait(600.0):
            continue

    thread = SideThread(f"test {next(numbers)}", work)
    assert met.wait(30.0)
    thread.close()
    thread.close()
    thread.wake()
    return found, sum(thread.name.startswith("fabric_lite test") for thread in threading.enumerate())


def test_threads_of_all_ranks_meet_and_end_when_they_are_closed(ranks: RankPool) -> None:
    assert ranks.run(meet_in_the_store, ranks=3) == [([0, 10, 20], 0)] * 3


def test_a_process_ends_well_with_a_thread_that_nobody_closes(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        from fabric_lite import Fabric
        from fabric_lite.side_store import SideThread

        def look(thread, store):
            while thread.wait(0.0):
                store.check(["never"])

        fabric = Fabric(devices=2)
        fabric.launch()
        thread = SideThread("test", look)
        fabric.barrier()
        print("done")
        """,
    )
    finished = fabric_run("--devices", "2", script)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.count("done") == 2


def train_without_a_store() -> tuple[list[bool], list[str], bool, str]:
    """In a group as MPI makes it: what should_stop was, what was said, whether SIGTERM is taken, the check's error."""
    group = dist.group.WORLD
    groups = dist.distributed_c10d._world.pg_map
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setitem(groups, group, (groups[group][0], None))
        fabric = Fabric(accelerator="cpu", devices=2)
        model = nn.Linear(2, 1)
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        found = []
        for _ in range(2):
            fabric.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()
            found.append(fabric.should_stop)
        is_taken = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        fabric.close()
        with pytest.raises(CollectiveError) as raised:
            Fabric(accelerator="cpu", devices=2, check_collectives=True).barrier()
    return found, [line for line in said.getvalue().splitlines() if "should_stop" in line], is_taken, str(raised.value)


def test_in_a_group_without_a_store_the_run_goes_on_and_can_not_be_asked_to_stop(ranks: RankPool) -> None:
    line = "fabric_lite: should_stop stays False, since the ranks can't agree on a step. The process group has no store"
    for rank, (found, said, is_taken, error) in enumerate(ranks.run(train_without_a_store)):
        assert (found, is_taken) == ([False, False], False)
        assert [one.startswith(line) for one in said] == [True] * (rank == 0)
        assert error.startswith("The process group has no store that the ranks could talk through.\n  Given: ")
