"""Who am I among the processes, under each launcher: read from variables as the launchers set them."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from fabric_lite import topology as topologies
from fabric_lite.errors import LaunchError
from fabric_lite.topology import ALONE, Topology, check_mpi4py
from fabric_lite.topology.variables import expand_hosts, port_of, resolves

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
# jsrun sets Open MPI's variables as well. The first host is where the batch script runs.
JSRUN = {
    "JSM_NAMESPACE_RANK": "5",
    "JSM_NAMESPACE_SIZE": "8",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "LSB_JOBID": "4711",
    "LSB_MCPU_HOSTS": "batch3 1 c1 42 c2 42",
}
# As seen in a rank that `mpirun -n 4 --map-by ppr:2:node` has started in a job of two nodes: its daemon's SLURM_*.
DAEMON = {
    "SLURM_JOB_ID": "5",
    "SLURM_JOB_NAME": "run.sh",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}
MPIRUN_IN_SLURM = {
    **DAEMON,
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
PALS = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4", "MASTER_ADDR": "x3001"}
HYDRA_IN_SLURM = {**DAEMON, "PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def read_topology(environ: dict[str, str]) -> Topology:
    """On a machine that knows all hosts but one."""
    return topologies.read_topology(environ, lambda host: host != "nobody")


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
        (JSRUN, (5, 8, 1, 4, 1, 2), "c1", "LSF"),
        (MPIRUN_IN_SLURM, (3, 4, 1, 2, 1, 2), "n1", "Open MPI"),
        (PALS, (5, 8, 1, 4, 1, 2), "x3001", "PMI"),
        (HYDRA_IN_SLURM, (3, 4, 1, 2, 1, 2), "n1", "PMI"),
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


def test_neighboring_jobs_and_steps_have_ports_of_their_own() -> None:
    """Of 400, some are alike by chance: 8 of 10000 ports."""
    ports = [port_of(str(job), str(step)) for job in range(1, 21) for step in range(20)]
    assert port_of("12", "3") != port_of("1", "23")
    assert port_of("prterun-host-4711@1") != port_of("prterun-other-4711@1")
    assert len(set(ports)) > 380
    assert all(20000 <= port < 30000 for port in ports)


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


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_JOB_NAME": "bash"},
        {"SLURM_JOB_NAME": "interactive"},
        {"SLURM_PTY_PORT": "42201"},
        {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "2"},
    ],
    ids=["srun --pty bash", "in salloc", "srun --pty zsh", "salloc with a shell on a node"],
)
def test_a_persons_shell_is_a_process_alone(changes: dict[str, str]) -> None:
    environ = {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", **changes}
    del environ["PMI_RANK"]
    assert read_topology(environ) == ALONE


@pytest.mark.parametrize("name", ["bash", "interactive"], ids=["srun bash run.sh", "srun in salloc"])
def test_a_step_of_several_tasks_is_one_whatever_the_jobs_name(name: str) -> None:
    assert place(read_topology({**SRUN, "SLURM_JOB_NAME": name})) == (3, 5, 0, 2, 1, 2)


def test_salloc_on_the_login_node_is_a_process_alone() -> None:
    assert read_topology({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}) == ALONE


BATCH_SHELL = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    "counts",
    [{"SLURM_NTASKS": "4", "SLURM_NNODES": "1"}, {"SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "1(x2)"}],
    ids=["sbatch -n4", "sbatch -N2"],
)
def test_batch_scripts_own_shell_is_told_to_use_srun(counts: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match=r"SLURM_(NTASKS=4|NNODES=2).*\n.*srun python script\.py"):
        read_topology({**BATCH_SHELL, **counts})


def test_the_shell_of_a_batch_script_of_one_task_is_a_process_alone() -> None:
    assert read_topology({**BATCH_SHELL, "SLURM_NNODES": "1", "SLURM_TASKS_PER_NODE": "1"}) == ALONE


def test_mpi_over_several_nodes_needs_the_main_address() -> None:
    environ = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    with pytest.raises(LaunchError, match="MASTER_ADDR"):
        read_topology(environ)
    assert place(read_topology({**environ, "MASTER_ADDR": "h"})) == (1, 2, 0, 1, 1, 2)


def by_open_mpi(rank: int, world_size: int, local_rank: int, local_world_size: int) -> Topology:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    numbers = (rank, world_size, local_rank, local_world_size)
    environ = {f"OMPI_COMM_WORLD_{name}": str(number) for name, number in zip(names, numbers, strict=True)}
    return read_topology({**environ, "MASTER_ADDR": "h"})


@pytest.mark.parametrize(
    ("rank", "world_size", "local_rank", "local_world_size"),
    [(1, 4, 0, 2), (2, 4, 1, 2), (0, 3, 0, 2), (1, 3, 1, 2)],  # --map-by node; two ranks on a node and one on another
)
def test_ranks_that_are_not_in_blocks_of_one_size_are_an_error(
    rank: int, world_size: int, local_rank: int, local_world_size: int
) -> None:
    place = (
        rf"rank {rank} of {world_size} by Open MPI \(mpirun\) is number {local_rank} of {local_world_size} on this node"
    )
    with pytest.raises(LaunchError, match=place):
        by_open_mpi(rank, world_size, local_rank, local_world_size)


def test_ranks_in_blocks_of_one_size_find_their_nodes() -> None:
    places = [by_open_mpi(rank, 6, rank % 3, 3) for rank in range(6)]
    assert [(each.node_rank, each.num_nodes) for each in places] == [(0, 2)] * 3 + [(1, 2)] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "8"}, "do not fit together"),
        ({"LOCAL_RANK": "4"}, "do not fit together"),
        ({"RANK": "x"}, "not a number"),
        ({"WORLD_SIZE": ""}, "is missing"),
        ({"WORLD_SIZE": "0"}, r"WORLD_SIZE must be at least 1.*\n.*WORLD_SIZE='0'"),
        ({"LOCAL_WORLD_SIZE": "0"}, r"LOCAL_WORLD_SIZE must be at least 1.*\n.*LOCAL_WORLD_SIZE='0'"),
        ({"GROUP_WORLD_SIZE": "-1"}, r"GROUP_WORLD_SIZE must be at least 1.*\n.*GROUP_WORLD_SIZE='-1'"),
    ],
)
def test_variables_that_do_not_fit_are_an_error(changes: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        read_topology({**TORCHRUN, **changes})


def test_the_number_of_tasks_per_node_need_not_be_given() -> None:
    assert "SLURM_NTASKS_PER_NODE" not in SRUN
    assert read_topology({**SRUN, "SLURM_NTASKS_PER_NODE": "9"}) == read_topology(SRUN)


@pytest.mark.parametrize(
    ("environ", "changes"),
    [
        (SRUN, {"SLURM_STEP_NODELIST": "nobody,n2"}),
        (MPIRUN_IN_SLURM, {"SLURM_JOB_NODELIST": "nobody,n2"}),
        (JSRUN, {"LSB_MCPU_HOSTS": "b 1 nobody 4"}),
    ],
    ids=["srun", "mpirun", "jsrun"],
)
def test_a_name_that_nobody_knows_is_told_at_once(environ: dict[str, str], changes: dict[str, str]) -> None:
    unknown = {**environ, **changes}
    with pytest.raises(LaunchError, match="The host of rank 0, 'nobody', has no address") as raised:
        read_topology(unknown)
    assert "MASTER_ADDR=" in str(raised.value)
    assert read_topology({**unknown, "MASTER_ADDR": "known"}).main_address == "known"
    with pytest.raises(LaunchError, match="'nobody'"):
        read_topology({**environ, "MASTER_ADDR": "nobody"})


def test_nodes_that_are_one_machine_need_no_names() -> None:
    environ = {**SRUN, "SLURM_STEP_NODELIST": "nobody,n2", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    assert read_topology(environ).main_address == "127.0.0.1"
    with pytest.raises(LaunchError, match="'nobody'"):  # srun runs on some node, rank 0 perhaps on another
        read_topology({**environ, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"})


def test_this_machine_knows_itself_and_no_host_of_an_invalid_name() -> None:
    assert resolves("localhost")
    assert not resolves("nobody.invalid")
    assert not resolves("")


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n[1-2,5]", ["n1", "n2", "n5"]),
        ("n[01-03]-ib,login", ["n01-ib", "n02-ib", "n03-ib", "login"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("a[1-2]b[3,5],c", ["a1b3", "a1b5", "a2b3", "a2b5", "c"]),
        ("gpu-a.site.edu", ["gpu-a.site.edu"]),
        ("", []),
    ],
)
def test_lists_of_nodes_are_expanded(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["n[a-b]", "n[1-2", "n1-2]", "n[1,[2]]", "n1,", ",n1", "n[\u00b2]"])
def test_a_list_of_nodes_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(LaunchError, match=rf"list of nodes could not be read.*\n.*{re.escape(repr(text))}"):
        expand_hosts(text)


def test_an_empty_list_of_nodes_is_as_none_at_all() -> None:
    with pytest.raises(LaunchError, match="tells no rank where rank 0 is"):
        read_topology({**MPIRUN_IN_SLURM, "SLURM_JOB_NODELIST": ""})


@pytest.mark.parametrize("text", ["c1 4 c2", "c1 many", "c1 4 c2 -1"])
def test_a_list_of_lsf_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(LaunchError, match=rf"could not be read.*\n.*LSB_MCPU_HOSTS='{text}'"):
        read_topology({**JSRUN, "LSB_MCPU_HOSTS": text})


def test_no_ranks_on_a_node_is_an_error_that_names_the_variable() -> None:
    with pytest.raises(LaunchError, match=r"LOCAL_WORLD_SIZE must be at least 1"):
        topologies.topology_of_group({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "0"}, 0, 2)
    with pytest.raises(LaunchError, match=r"OMPI_COMM_WORLD_LOCAL_SIZE must be at least 1"):
        read_topology({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "0"})


def test_lsf_without_a_host_for_the_batch_script_and_with_a_file(tmp_path: Path) -> None:
    assert read_topology({**JSRUN, "LSB_MCPU_HOSTS": "c1 4 c2 4"}).main_address == "c1"
    ranks = tmp_path / "ranks"
    ranks.write_text("batch3\nc7\nc7\nc8\nc8\n")
    environ = {**JSRUN, "LSB_DJOB_RANKFILE": str(ranks)}
    del environ["LSB_MCPU_HOSTS"]
    assert read_topology(environ).main_address == "c7"
    with pytest.raises(LaunchError, match=r"could not be read.*\n.*nowhere"):
        read_topology({**environ, "LSB_DJOB_RANKFILE": str(tmp_path / "nowhere")})


def test_mpirun_of_lsf_starts_on_its_first_host() -> None:
    environ = {name: text for name, text in JSRUN.items() if not name.startswith("JSM")}
    environ |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "LSB_MCPU_HOSTS": "c1 4 c2 4"}
    assert read_topology(environ).main_address == "c1"


@pytest.mark.parametrize(("outer", "inner"), [("1", "2"), ("2", "2")])
def test_one_mpi_inside_another_is_an_error_that_shows_both_ranks(outer: str, inner: str) -> None:
    environ = {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": outer, **MPICH, "PMI_SIZE": inner}
    ranks = f"OMPI_COMM_WORLD_RANK=0, OMPI_COMM_WORLD_SIZE={outer}, PMI_RANK=1, PMI_SIZE={inner}"
    with pytest.raises(LaunchError, match=ranks):
        read_topology(environ)


@pytest.mark.parametrize("environ", [OPEN_MPI, MPICH], ids=["Open MPI", "MPICH"])
def test_an_mpi4py_that_does_not_see_the_other_ranks_is_an_error_that_shows_both_sizes(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for mpi4py, which few have; the real one, under each mpirun, is in ``tests/clusters/test_mpi.py``."""

    def imported(size: int, *, is_initialized: bool = True, is_finalized: bool = False) -> None:
        module = types.SimpleNamespace(
            Is_initialized=lambda: is_initialized,
            Is_finalized=lambda: is_finalized,
            Get_library_version=lambda: "Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4",
            COMM_WORLD=types.SimpleNamespace(Get_size=lambda: size),
        )
        monkeypatch.setitem(sys.modules, "mpi4py.MPI", module)

    topology = read_topology(environ)
    check_mpi4py(topology)  # none is imported
    imported(1)
    with pytest.raises(LaunchError, match=r"1 by mpi4py \(Open MPI v4.1.4\), and 2 started by"):
        check_mpi4py(topology)
    # Only mpirun is to have told mpi4py; srun does so with --mpi=pmix alone.
    check_mpi4py(read_topology(SRUN))
    imported(2)
    check_mpi4py(topology)
    imported(1, is_initialized=False)
    check_mpi4py(topology)
    imported(1, is_finalized=True)
    check_mpi4py(topology)


@pytest.mark.parametrize("processes", ["2", "auto", "gpu"])
def test_the_rank_of_a_kubeflow_pod_is_not_taken_for_that_of_a_process(processes: str) -> None:
    pod = {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "master-0",
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": processes,
    }
    with pytest.raises(LaunchError, match=r"RANK is the number of this pod.*\n.*RANK=1.*\n.*fabric-run"):
        read_topology(pod)
    assert place(read_topology({**pod, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"})) == (1, 4, 0, 2, 0, 2)
    assert place(read_topology({**pod, "PET_NPROC_PER_NODE": "1", "WORLD_SIZE": "2"})) == (1, 2, 0, 1, 1, 2)


@pytest.mark.parametrize(
    ("environ", "given"),
    [
        ({"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "0"}, "SKYPILOT_NUM_NODES=2"),
        ({"DSTACK_NODES_NUM": "2", "DSTACK_NODE_RANK": "1"}, "DSTACK_NODES_NUM=2"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": "8"}, "PET_NNODES=2"),
        ({"PET_NNODES": "1:4", "PET_RDZV_ENDPOINT": "job-0:29400"}, "PET_NNODES=1:4"),
    ],
)
def test_a_script_that_an_engine_starts_on_each_node_is_told_to_use_fabric_run(
    environ: dict[str, str], given: str
) -> None:
    with pytest.raises(LaunchError, match=rf"each node would train by itself.*\n.*{given}.*\n.*fabric-run script\.py"):
        read_topology(environ)
    assert place(read_topology({**environ, **TORCHRUN})) == (5, 8, 1, 4, 1, 2)
    assert place(read_topology({**environ, **SRUN})) == (3, 5, 0, 2, 1, 2)


@pytest.mark.parametrize(
    "environ",
    [
        {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"},
        {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "8"},
        {"PET_NNODES": "1:1"},
        {"JOB_COMPLETION_INDEX": "1"},  # of any kind of work
    ],
)
def test_a_script_on_the_one_node_of_an_engine_is_a_process_alone(environ: dict[str, str]) -> None:
    assert read_topology(environ) == ALONE
