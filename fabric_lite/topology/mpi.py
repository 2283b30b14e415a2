"""Ranks that an MPI's launcher started; MPI itself is not needed, and not used."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from fabric_lite.errors import LaunchError
from fabric_lite.topology.place import Topology
from fabric_lite.topology.processes import process
from fabric_lite.topology.variables import expand_hosts, number, port_of

__all__ = [
    "check_mpi4py",
    "is_lsf",
    "is_open_mpi",
    "is_pmi",
    "is_started_by_mpirun",
    "read_lsf",
    "read_open_mpi",
    "read_pmi",
]

_OPEN_MPI = "Open MPI (mpirun)"
_PMI = "PMI (mpirun or mpiexec)"


def is_started_by_mpirun(environ: Mapping[str, str]) -> bool:
    """Whether mpirun has started this process, be it through srun.

    In a job of Slurm's, mpirun lets srun start one daemon on each node, whose children the ranks are: they have the
    daemon's SLURM_PROCID and SLURM_STEP_NUM_TASKS, and on a node all the same. ``srun --mpi=pmi2`` sets PMI_RANK too,
    but none of these.
    """
    return "OMPI_COMM_WORLD_RANK" in environ or "MPI_LOCALRANKID" in environ


def is_open_mpi(environ: Mapping[str, str]) -> bool:
    """Whether the ``mpirun`` was Open MPI's."""
    return "OMPI_COMM_WORLD_RANK" in environ


def read_open_mpi(environ: Mapping[str, str]) -> Topology:
    """The place of a rank of Open MPI's mpirun."""
    _check_one_mpi(environ)
    # OMPI_COMM_WORLD_NODE_RANK is the rank within the node, in spite of its name; there is no node index.
    return _place(
        environ,
        rank=number(environ, "OMPI_COMM_WORLD_RANK"),
        world_size=number(environ, "OMPI_COMM_WORLD_SIZE", least=1),
        local_rank=number(environ, "OMPI_COMM_WORLD_LOCAL_RANK", 0),
        local_world_size=number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", 1, least=1),
        job=environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid"),
        source=_OPEN_MPI,
    )


def _check_one_mpi(environ: Mapping[str, str]) -> None:
    """Raise where one MPI's mpirun has started another's: the inner one's ranks would all be one rank of the outer.

    Open MPI sets none of these two itself, and ``srun --mpi=pmi2``, in which mpirun may run, only the first.
    """
    if "PMI_RANK" in environ and "MPI_LOCALRANKID" in environ:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE")
        raise LaunchError(
            "Two MPIs have started this process, one inside the other, and each gives it a rank.",
            given=", ".join(f"{name}={environ.get(name)}" for name in names),
            fix="one mpirun, of either of them: which mpirun",
        )


def check_mpi4py(topology: Topology) -> None:
    """Raise where the script's own mpi4py, if it has imported one, was made for another MPI than the mpirun's.

    mpi4py says so by a warning at most, and takes each of the ranks for rank 0 of 1: MPICH's mpirun with mpi4py on Open
    MPI, say. Nothing is imported for this.
    """
    module = sys.modules.get("mpi4py.MPI")
    if module is None or topology.source not in (_OPEN_MPI, _PMI):
        return
    if not module.Is_initialized() or module.Is_finalized():
        return
    size = module.COMM_WORLD.Get_size()
    if size != topology.world_size:
        library = module.Get_library_version().split(",")[0].splitlines()[0]
        raise LaunchError(
            "The mpirun that has started this script is not of the MPI that its mpi4py uses.",
            given=f"{size} by mpi4py ({library}), and {topology.world_size} started by {topology.source}",
            fix="the mpirun of mpi4py's MPI, or mpi4py on this one's (MPI4PY_MPIABI); fabric_lite needs no mpi4py",
        )


def is_pmi(environ: Mapping[str, str]) -> bool:
    """Whether PMI tells the rank: MPICH's and Intel MPI's mpirun, and others."""
    return "PMI_RANK" in environ and "PMI_SIZE" in environ


def read_pmi(environ: Mapping[str, str]) -> Topology:
    """The place of a rank of MPICH's, Intel MPI's or HPE Cray's mpirun."""
    world_size = number(environ, "PMI_SIZE", least=1)
    # The second of each is of HPE Cray's mpiexec (PALS).
    local_world_size = number(environ, "MPI_LOCALNRANKS", number(environ, "PMI_LOCAL_SIZE", 1, least=1), least=1)
    is_one_node = local_world_size == world_size
    # MPICH gives a job no name of its own.
    job = environ.get("PMI_JOBID") or environ.get("PMI_PORT") or (_proxy() if is_one_node else _job(environ))
    return _place(
        environ,
        rank=number(environ, "PMI_RANK"),
        world_size=world_size,
        local_rank=number(environ, "MPI_LOCALRANKID", number(environ, "PMI_LOCAL_RANK", 0)),
        local_world_size=local_world_size,
        job=job,
        source=_PMI,
    )


def _job(environ: Mapping[str, str]) -> str | None:
    return environ.get("SLURM_JOB_ID") or environ.get("LSB_JOBID")


def _proxy() -> str | None:
    """The process that started all ranks of this node, by its number."""
    number = os.getppid()
    while number > 1 and (found := process(number)) is not None:
        if found.name.startswith("hydra_"):
            return str(number)
        number = found.parent
    return None


def is_lsf(environ: Mapping[str, str]) -> bool:
    """Whether LSF's jsrun has started this process."""
    return "JSM_NAMESPACE_RANK" in environ


def read_lsf(environ: Mapping[str, str]) -> Topology:
    """The place of a task of jsrun."""
    return _place(
        environ,
        rank=number(environ, "JSM_NAMESPACE_RANK"),
        world_size=number(environ, "JSM_NAMESPACE_SIZE", least=1),
        local_rank=number(environ, "JSM_NAMESPACE_LOCAL_RANK"),
        local_world_size=number(environ, "JSM_NAMESPACE_LOCAL_SIZE", 1, least=1),
        job=environ.get("LSB_JOBID"),
        source="LSF (jsrun)",
    )


def _place(
    environ: Mapping[str, str],
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    local_world_size: int,
    job: str | None,
    source: str,
) -> Topology:
    _check_blocks(rank, world_size, local_rank, local_world_size, source)
    address = environ.get("MASTER_ADDR")
    if address is None and local_world_size < world_size:
        address = _first_of_allocation(environ)
        if address is None:
            raise LaunchError(
                f"{source} started processes on several nodes but tells no rank where rank 0 is.",
                given=f"{world_size} processes, {local_world_size} on this node, no MASTER_ADDR",
                fix="mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=29500 (MPICH: -genv MASTER_ADDR <host>)",
            )
    return Topology(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        node_rank=rank // local_world_size,
        num_nodes=-(-world_size // local_world_size),
        main_address=address or "127.0.0.1",
        main_port=number(environ, "MASTER_PORT", port_of(job)),
        source=source,
    )


def _check_blocks(rank: int, world_size: int, local_rank: int, local_world_size: int, source: str) -> None:
    """Raise where the ranks of a node do not follow each other, or another node has more or fewer.

    No variable tells the number of the node: it is the block of as many ranks as are here. On some ranks of another
    layout nothing can be seen of it; these wait for those on which it is an error.
    """
    in_blocks = world_size % local_world_size == 0 and local_rank == rank % local_world_size
    if in_blocks or local_world_size >= world_size:  # more is for check_place()
        return
    raise LaunchError(
        "The ranks are not in blocks of one size on the nodes, so that the number of this node is not known.",
        given=f"rank {rank} of {world_size} by {source} is number {local_rank} of {local_world_size} on this node",
        fix="mpirun --map-by ppr:N:node (MPICH: -ppn N), with as many ranks on each node",
    )


def _first_of_allocation(environ: Mapping[str, str]) -> str | None:
    """The first host that the job system has given to the job, on which mpirun and jsrun start rank 0."""
    nodes = expand_hosts(environ.get("SLURM_JOB_NODELIST", ""))
    if nodes:
        return nodes[0]
    slots = _lsf_slots(environ)
    # Where jsrun is, the first host is the one of the batch script, with one slot, and computes nothing.
    if is_lsf(environ) and len(slots) > 1 and slots[0][1] == 1 and max(count for _, count in slots) > 1:
        del slots[0]
    return slots[0][0] if slots else None


def _lsf_slots(environ: Mapping[str, str]) -> list[tuple[str, int]]:
    """Each host of an LSF job and its number of slots: ``LSB_MCPU_HOSTS="a 4 b 4"``, or a file with a line for each."""
    words = environ.get("LSB_MCPU_HOSTS", "").split()
    if words:
        hosts, counts = words[::2], words[1::2]
        if len(hosts) != len(counts) or not all(count.isdecimal() for count in counts):
            raise LaunchError(
                "LSF's list of hosts and their slots could not be read.",
                given=f"LSB_MCPU_HOSTS={environ['LSB_MCPU_HOSTS']!r}",
                fix="a number after each host, as LSF writes it: 'a 4 b 4'",
            )
        return list(zip(hosts, map(int, counts), strict=True))
    path = environ.get("LSB_DJOB_RANKFILE")
    if path is None:
        return []
    try:
        lines = Path(path).read_text().split()
    except OSError as error:
        raise LaunchError(
            "LSF's list of hosts could not be read.", given=f"LSB_DJOB_RANKFILE={path}: {error}"
        ) from None
    return [(host, lines.count(host)) for host in dict.fromkeys(lines)]
