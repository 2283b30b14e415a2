"""Whose the process group is: made by somebody else, or shared by several Fabrics of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fabric_lite import Fabric
from fabric_lite.run import Arguments, resolve
from fabric_lite.testing import RankPool
from tests.models import make_net

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")


def run_two(code: str, tmp_path: Path, environ: list[dict[str, str]]) -> list[list[str]]:
    """Run ``code`` in two processes, ``sys.argv`` their rank and a file to meet at; return what each prints."""
    base = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "store")],
            env={**base, "OMP_NUM_THREADS": "1", **environ[rank]},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    return [output.splitlines() for output, _ in outputs]


ADOPTS = """
import sys, torch, torch.distributed as dist
from fabric_lite import Fabric
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
fabric = Fabric(accelerator="cpu")
print(fabric.world_size, fabric.global_rank, fabric.local_rank, fabric.node_rank, fabric.is_global_zero)
print(type(fabric.strategy).__name__, fabric.all_reduce(fabric.global_rank, reduce_op="sum").item())
model = fabric.setup(torch.nn.Linear(1, 1, bias=False))
torch.nn.init.ones_(model.weight)
model(torch.tensor([[float(fabric.global_rank)]])).sum().backward()
print(model.weight.grad.item())
fabric.close()
print(dist.is_initialized())
dist.destroy_process_group()
"""


# A worker of Ray's inherits the variables of the Slurm task, or of the batch script, that runs Ray's daemon.
DAEMON = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4"}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    "told",
    [[{}, {}], [{"LOCAL_RANK": "0"}, {"LOCAL_RANK": "1"}], [DAEMON, DAEMON], [BATCH, BATCH]],
    ids=["nothing", "LOCAL_RANK", "a daemon's step", "a batch script"],
)
def test_a_group_of_the_users_own_is_adopted_whole_and_never_destroyed(tmp_path: Path, told: Any) -> None:
    for rank, lines in enumerate(run_two(ADOPTS, tmp_path, told)):
        assert lines == [f"2 {rank} {rank} 0 {rank == 0}", "DDPStrategy 1", "0.5", "True"]


def place_without_a_launcher() -> tuple[int, int, bool, str]:
    run = resolve(Arguments(accelerator="cpu", devices=2), None, None, {})
    return run.topology.rank, run.topology.world_size, run.needs_launch, run.topology.source


def test_without_a_launcher_the_place_is_that_in_the_group(ranks: RankPool) -> None:
    source = "a process group that exists already"
    assert ranks.run(place_without_a_launcher) == [(0, 2, False, source), (1, 2, False, source)]


OF_ONE = """
import sys, torch, torch.distributed as dist
from fabric_lite import Fabric
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
fabric = Fabric(accelerator="cpu")
print(fabric.world_size, fabric.global_rank, fabric.all_reduce(3, reduce_op="sum").item())
fabric.close()
print(dist.is_initialized())
dist.destroy_process_group()
"""


@pytest.mark.parametrize("told", [{}, DAEMON, BATCH], ids=["nothing", "a daemon's step", "a batch script"])
def test_a_group_of_one_of_the_users_own_counts_too(tmp_path: Path, told: dict[str, str]) -> None:
    assert run_two(OF_ONE, tmp_path, [told, told]) == [["1 0 3", "True"]] * 2


SHARES = """
import sys, torch.distributed as dist
from fabric_lite import Fabric
first = Fabric(accelerator="cpu")
second = Fabric(accelerator="cpu")
first.close()
first.close()
print(second.all_reduce(1, reduce_op="sum").item())
second.close()
print(dist.is_initialized())
third = Fabric(accelerator="cpu")
print(third.all_reduce(1, reduce_op="sum").item())
# Not closed: the end of the process leaves the group.
"""


def test_closing_one_fabric_leaves_the_group_to_the_others(tmp_path: Path) -> None:
    port = str(20000 + os.getpid() % 10000)
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    told = [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    assert run_two(SHARES, tmp_path, told) == [["2", "False", "2"]] * 2


def closes_in_a_group_of_the_pools() -> bool:
    with_group = Fabric(accelerator="cpu", devices=2)
    with_group.close()
    return dist.is_initialized()


def test_closing_leaves_a_group_that_was_there_before(ranks: RankPool) -> None:
    assert ranks.run(closes_in_a_group_of_the_pools) == [True, True]


def threads_of_many_fabrics() -> list[int]:
    counts = []
    for _ in range(3):
        fabric = Fabric(accelerator="cpu", devices=4, strategy="hsdp")
        fabric.setup(make_net())
        counts.append(len(os.listdir("/proc/self/task")))
        fabric.close()
    return counts


def test_fabrics_with_the_same_axes_share_their_groups_and_threads(ranks: RankPool) -> None:
    for first, *others in ranks.run(threads_of_many_fabrics, ranks=4):
        assert others == [first, first]
