"""A thread beside the loop reaches the other ranks, and ends with the process."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist

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
