"""Who am I among the processes, under each launcher: read from variables as the launchers set them."""

from __future__ import annotations

import pytest

from fabric_lite.errors import LaunchError
from fabric_lite.topology import ALONE, Topology, read_topology

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NAME": "train",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "9",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "PMI_RANK": "3",
    "PMI_SIZE": "5",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "PMIX_NAMESPACE": "prterun-host-4711@1",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "HYDI_CONTROL_FD": "5"}


def place(topology: Topology) -> tuple[int, ...]:
    return (
        topology.rank,
        topology.world_size,
        topology.local_rank,
        topology.local_world_size,
        topology.node_rank,
        topology.num_nodes,
    )


@pytest.mark.parametrize("environ", [{}, {"MASTER_ADDR": "x", "MASTER_PORT": "1"}, {"LOCAL_RANK": "0"}, {"RANK": "0"}])
def test_process_alone(environ: dict[str, str]) -> None:
    assert read_topology(environ) == ALONE
    assert not ALONE.is_managed


@pytest.mark.parametrize(
    ("environ", "expected", "address", "source"),
    [
        (TORCHRUN, (5, 8, 1, 4, 1, 2), "node0", "torchelastic"),
        (SRUN, (3, 5, 0, 2, 1, 2), "gpu07", "Slurm"),
        (OPEN_MPI, (1, 2, 1, 2, 0, 1), "127.0.0.1", "Open MPI"),
        (MPICH, (1, 2, 1, 2, 0, 1), "127.0.0.1", "PMI"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 0, 1, 1, 2), "127.0.0.1", "torchelastic"),
        ({**SRUN, **TORCHRUN}, (5, 8, 1, 4, 1, 2), "node0", "torchelastic"),
    ],
)
def test_launchers_are_read(environ: dict[str, str], expected: tuple[int, ...], address: str, source: str) -> None:
    topology = read_topology(environ)
    assert place(topology) == expected
    assert topology.main_address == address
    assert source in topology.source
    assert topology.is_managed


def test_hosted_store_is_noticed() -> None:
    assert read_topology(TORCHRUN).store_is_hosted
    assert not read_topology({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "False"}).store_is_hosted
    assert not read_topology(SRUN).store_is_hosted


@pytest.mark.parametrize("environ", [SRUN, OPEN_MPI, MPICH])
def test_ranks_of_one_job_compute_one_port(environ: dict[str, str]) -> None:
    rank_variable = next(name for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK") if name in environ)
    ports = {read_topology({**environ, rank_variable: rank}).main_port for rank in "01"}
    assert len(ports) == 1
    assert 20000 <= (ports.pop() or 0) < 30000
    assert read_topology({**environ, "MASTER_PORT": "4242"}).main_port == 4242


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[01-03,7],login", "n01"), ("a,b", "a"), ("rack[2]-n", "rack2-n"), ("n[9-11]", "n9")],
)
def test_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert read_topology({**SRUN, "SLURM_STEP_NODELIST": nodes}).main_address == first


def test_slurms_short_form_of_task_counts() -> None:
    environ = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "2", "SLURM_STEP_NUM_NODES": "3"}
    assert read_topology(environ).local_world_size == 1
    with pytest.raises(LaunchError, match="tasks per node"):
        read_topology({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "many"})


def test_interactive_slurm_shell_is_a_process_alone() -> None:
    environ = {**SRUN, "SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "1"}
    del environ["PMI_RANK"]
    assert read_topology(environ) == ALONE


def test_batch_scripts_own_shell_is_told_to_use_srun() -> None:
    environ = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    with pytest.raises(LaunchError, match=r"srun python script\.py"):
        read_topology(environ)


def test_mpi_over_several_nodes_needs_the_main_address() -> None:
    environ = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    with pytest.raises(LaunchError, match="MASTER_ADDR"):
        read_topology(environ)
    assert place(read_topology({**environ, "MASTER_ADDR": "h"})) == (1, 2, 0, 1, 1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "8"}, "do not fit together"),
        ({"LOCAL_RANK": "4"}, "do not fit together"),
        ({"RANK": "x"}, "not a number"),
        ({"WORLD_SIZE": ""}, "is missing"),
    ],
)
def test_variables_that_do_not_fit_are_an_error(changes: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        read_topology({**TORCHRUN, **changes})
