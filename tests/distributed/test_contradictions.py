"""Whatever contradicts itself before a run is an error with both numbers, at once: no rank waits for what cannot come.

The variables are those that launchers set, as seen in their jobs; ``tests/clusters`` starts the launchers themselves.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import run, write

LIMIT_SECONDS = 5.0

# One interpreter imports torch, and each case is a fork of it, which ends as a script does, by its exception. The time
# is from before the Fabric; one that waits for others is ended by the alarm, with another exit code.
PROGRAM = """
import gc, json, os, signal, sys, time
from pathlib import Path
from fabric_lite import Fabric

cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
gc.freeze()  # each fork would look through all of torch once more, at its end
for name, (variables, arguments) in cases.items():
    child = os.fork()
    if child:
        (out / f"{name}.exit").write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
        continue
    os.dup2(os.open(out / f"{name}.stderr", os.O_CREAT | os.O_WRONLY), 2)
    os.environ.update(variables)
    signal.alarm(15)
    start = time.monotonic()
    try:
        Fabric(accelerator="cpu", **arguments).launch()
    finally:
        (out / f"{name}.seconds").write_text(str(time.monotonic() - start))
    break
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """Variables of a launcher, arguments of ``Fabric``, and what the error must say."""

    variables: Mapping[str, str]
    arguments: Mapping[str, Any]
    says: tuple[str, ...]


def torchrun(rank: int = 0, world_size: int = 2, local: int = 2) -> dict[str, str]:
    numbers = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
    numbers |= {"GROUP_RANK": rank // local, "GROUP_WORLD_SIZE": world_size // local}
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", **{name: str(n) for name, n in numbers.items()}}


def srun(rank: int = 0, tasks: str = "1(x2)", counts: tuple[int, ...] = (1, 1), **more: str) -> dict[str, str]:
    """A task of a step; without SLURM_NTASKS_PER_NODE, as with ``srun -n``, and in a job of 16 tasks on 4 nodes."""
    node = next(node for node in range(len(counts)) if rank < sum(counts[: node + 1]))
    return {
        "SLURM_JOB_ID": "1234567",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "16",
        "SLURM_NNODES": "4",
        "SLURM_JOB_NODELIST": "localhost,n[2-4]",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank - sum(counts[:node])),
        "SLURM_NODEID": str(node),
        "SLURM_STEP_NUM_TASKS": str(sum(counts)),
        "SLURM_STEP_NUM_NODES": str(len(counts)),
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_STEP_NODELIST": "localhost,n2",
        **more,
    }


def open_mpi(rank: int = 0, world_size: int = 2, local: int = 2, **more: str) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(world_size),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank % local),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local),
        "OMPI_COMM_WORLD_NODE_RANK": str(rank % local),
        "PMIX_NAMESPACE": "prterun-host-4711@1",
        **more,
    }


def mpich(rank: int = 0, world_size: int = 2, local: int = 2, **more: str) -> dict[str, str]:
    numbers = {"PMI_RANK": rank, "PMI_SIZE": world_size, "MPI_LOCALRANKID": rank % local, "MPI_LOCALNRANKS": local}
    return {**{name: str(number) for name, number in numbers.items()}, **more}


def jsrun(rank: int = 0, world_size: int = 2, local: int = 1, **more: str) -> dict[str, str]:
    numbers = {"RANK": rank, "SIZE": world_size, "LOCAL_RANK": rank % local, "LOCAL_SIZE": local}
    variables = {f"JSM_NAMESPACE_{name}": str(number) for name, number in numbers.items()}
    variables |= {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(world_size)}
    return {**variables, "LSB_JOBID": "4711", "LSB_MCPU_HOSTS": "batch3 1 localhost 42 c2 42", **more}


BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
POD = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "2"}

CASES = {
    # Tasks of Slurm against devices and num_nodes, in each direction.
    "srun, more devices than tasks": Case(
        srun(), {"devices": 4, "num_nodes": 2}, ("so 8 processes, and 2 started by Slurm", "--ntasks-per-node=4")
    ),
    "srun, more devices than tasks, on the other node": Case(
        srun(1), {"devices": 4, "num_nodes": 2}, ("so 8 processes, and 2 started by Slurm",)
    ),
    "srun, fewer devices than tasks": Case(
        srun(3, "2(x2)", (2, 2)), {"devices": 1}, ("so 2 processes, and 4 started by Slurm", "2 of them here")
    ),
    "srun, one task and several devices": Case(
        srun(0, "1", (1,)), {"devices": 2}, ("so 2 processes, and 1 started by Slurm",)
    ),
    "srun, more nodes than there are": Case(srun(), {"num_nodes": 3}, ("num_nodes=3 and 2 by Slurm",)),
    "srun, fewer nodes than there are": Case(
        srun(2, "1(x3)", (1, 1, 1)), {"num_nodes": 2}, ("num_nodes=2 and 3 by Slurm",)
    ),
    "srun, the job's tasks are asked for and not the step's": Case(
        srun(), {"devices": 4, "num_nodes": 4}, ("so 16 processes, and 2 started by Slurm", "on 2 nodes")
    ),
    "srun, nodes of unequal tasks, on the full one": Case(
        srun(0, "2,1", (2, 1)), {"devices": 2}, ("so 4 processes, and 3 started by Slurm", "2 of them here")
    ),
    "srun, nodes of unequal tasks, on the other one": Case(
        srun(2, "2,1", (2, 1)), {"devices": 2}, ("so 4 processes, and 3 started by Slurm", "1 of them here")
    ),
    "srun, a task beyond the last": Case(srun(SLURM_PROCID="2"), {}, ("rank 2 of 2",)),
    "srun, a task beyond the last of its node": Case(srun(SLURM_LOCALID="1"), {}, ("local rank 1 of 1",)),
    "a batch script's own shell": Case(BATCH, {}, ("batch script's own shell", "SLURM_NTASKS=4", "srun python")),
    "a batch script's own shell, with what was asked for": Case(
        BATCH, {"devices": 2, "num_nodes": 2}, ("batch script's own shell", "SLURM_NTASKS=4")
    ),
    # The first node of a list.
    "srun, an unknown node": Case(
        srun(SLURM_STEP_NODELIST="nobody.invalid,n2"), {}, ("'nobody.invalid', has no address", "MASTER_ADDR=")
    ),
    "srun, an unknown node, in range form": Case(
        srun(1, SLURM_STEP_NODELIST="nobody[07-08,11].invalid"), {}, ("'nobody07.invalid', has no address",)
    ),
    "srun, a list of nodes that is none": Case(srun(SLURM_STEP_NODELIST="n[a-b]"), {}, (r"n\[a-b\]",)),
    "mpirun in a job of Slurm's, an unknown node": Case(
        open_mpi(2, 4, 2, SLURM_JOB_NODELIST="nobody[1-2].invalid"), {}, ("'nobody1.invalid', has no address",)
    ),
    "jsrun, an unknown node": Case(
        jsrun(LSB_MCPU_HOSTS="batch3 1 nobody.invalid 42 c2 42"), {}, ("'nobody.invalid', has no address",)
    ),
    # Open MPI. Its node rank is the local rank.
    "Open MPI, more devices than ranks": Case(
        open_mpi(1), {"devices": 4}, ("so 4 processes, and 2 started by Open MPI", "on 1 node,", "mpirun -n 4")
    ),
    "Open MPI, fewer devices than ranks": Case(
        open_mpi(1), {"devices": 1}, ("so 1 process, and 2 started by Open MPI",)
    ),
    "Open MPI, more nodes than there are": Case(open_mpi(1), {"num_nodes": 2}, ("num_nodes=2 and 1 by Open MPI",)),
    "Open MPI, nodes of unequal ranks, on the full one": Case(
        open_mpi(0, 3, 2, MASTER_ADDR="127.0.0.1"), {"devices": 2}, ("rank 0 of 3 by Open MPI", "number 0 of 2")
    ),
    "Open MPI, nodes of unequal ranks, on the other one": Case(
        open_mpi(2, 3, 1, MASTER_ADDR="127.0.0.1"), {"devices": 2}, ("and 3 started by Open MPI", "1 of them here")
    ),
    "Open MPI, several nodes and no address": Case(
        open_mpi(0, 4, 2), {}, ("4 processes, 2 on this node", "-x MASTER_ADDR")
    ),
    "Open MPI, more ranks on a node than in all": Case(open_mpi(0, 2, 4), {}, ("rank 0 of 2, local rank 0 of 4",)),
    "one MPI's mpirun inside another's": Case(
        {**open_mpi(0, 1, 1), **mpich(1)}, {}, ("OMPI_COMM_WORLD_SIZE=1, PMI_RANK=1, PMI_SIZE=2",)
    ),
    # PMI: MPICH and Intel MPI.
    "PMI, more devices than ranks": Case(
        mpich(1), {"devices": 4}, ("so 4 processes, and 2 started by PMI", "mpirun -n 4")
    ),
    "PMI, fewer devices than ranks": Case(mpich(), {"devices": 1}, ("so 1 process, and 2 started by PMI",)),
    "PMI, more nodes than there are": Case(mpich(), {"num_nodes": 2}, ("num_nodes=2 and 1 by PMI",)),
    "PMI, several nodes and no address": Case(mpich(0, 4, 2), {}, ("4 processes, 2 on this node", "-genv MASTER_ADDR")),
    "PMI, a rank beyond the last": Case(mpich(PMI_RANK="2"), {}, ("rank 2 of 2",)),
    # LSF.
    "jsrun, more devices than tasks": Case(
        jsrun(1), {"devices": 4}, ("so 8 processes, and 2 started by LSF", "jsrun --nrs 8 --rs_per_host 4")
    ),
    "jsrun, fewer devices than tasks": Case(jsrun(0, 4, 2), {"devices": 1}, ("so 2 processes, and 4 started by LSF",)),
    "jsrun, more nodes than there are": Case(jsrun(), {"num_nodes": 3}, ("num_nodes=3 and 2 by LSF",)),
    # torchrun and fabric-run.
    "torchrun, more devices than ranks": Case(
        torchrun(1), {"devices": 4}, ("so 4 processes, and 2 started by torchelastic", "fabric-run --devices 4")
    ),
    "torchrun, fewer devices than ranks": Case(
        torchrun(), {"devices": 1}, ("so 1 process, and 2 started by torchelastic",)
    ),
    "torchrun, more nodes than there are": Case(torchrun(), {"num_nodes": 2}, ("num_nodes=2 and 1 by torchelastic",)),
    "torchrun, fewer nodes than there are": Case(
        torchrun(0, 6, 2), {"num_nodes": 2}, ("num_nodes=2 and 3 by torchelastic",)
    ),
    "a rank beyond the last": Case({**torchrun(), "RANK": "2"}, {}, ("rank 2 of 2",)),
    "a rank beyond the last of its node": Case({**torchrun(), "LOCAL_RANK": "2"}, {}, ("local rank 2 of 2",)),
    "more ranks on a node than in all": Case({**torchrun(), "LOCAL_WORLD_SIZE": "4"}, {}, ("of 2, local rank 0 of 4",)),
    "no ranks on a node": Case({**torchrun(), "LOCAL_WORLD_SIZE": "0"}, {}, ("LOCAL_WORLD_SIZE='0'",)),
    "a pod of several processes": Case(POD, {}, ("RANK=1, PET_NPROC_PER_NODE=2",)),
    # No launcher at all.
    "several nodes from one script": Case({}, {"devices": 2, "num_nodes": 2}, ("num_nodes=2 and 1 process",)),
}
CONSISTENT = "a process alone"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what came of each case, all of them one after the other."""
    folder = tmp_path_factory.mktemp("contradictions")
    cases = folder / "cases.json"
    table = {name: (dict(case.variables), dict(case.arguments)) for name, case in CASES.items()}
    cases.write_text(json.dumps({**table, CONSISTENT: ({}, {"devices": 1})}))
    run([sys.executable, write(folder, PROGRAM), cases, folder], cwd=folder, limit_seconds=240).check_returncode()
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_contradiction_is_an_error_with_both_numbers_in_time(name: str, ended: Path) -> None:
    said = (ended / f"{name}.stderr").read_text()
    assert (ended / f"{name}.exit").read_text() == "1", said
    message = said.partition("LaunchError: ")[2]
    for words in CASES[name].says:
        assert re.search(words, message), said
    assert float((ended / f"{name}.seconds").read_text()) < LIMIT_SECONDS


def test_where_nothing_contradicts_itself_there_is_no_error(ended: Path) -> None:
    assert (ended / f"{CONSISTENT}.exit").read_text() == "0"
    assert (ended / f"{CONSISTENT}.stderr").read_text() == ""
