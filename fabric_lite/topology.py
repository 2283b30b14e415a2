"""Who am I among the processes? Read once from the environment, then plain data.

One table, most specific first: torchelastic (``torchrun``, ``fabric-run``), a Slurm step, Open MPI, PMI (MPICH
and Intel MPI), else a process alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from fabric_lite.errors import LaunchError

__all__ = ["ALONE", "Topology", "read_topology", "topology_of_group"]


@dataclasses.dataclass(frozen=True)
class Topology:
    """The place of this process among all processes of the job.

    Args:
        rank: 0 to world_size - 1, over all nodes.
        world_size: The number of processes over all nodes.
        local_rank: 0 to local_world_size - 1, on this node.
        local_world_size: The number of processes on this node.
        node_rank: 0 to num_nodes - 1.
        num_nodes: The number of nodes.
        main_address: Host where rank 0's store listens; None for a process alone.
        main_port: Its port.
        source: Who started the processes, in words for messages.
        store_is_hosted: Whether a launcher already serves the store, so that rank 0 only connects to it.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1
    main_address: str | None = None
    main_port: int | None = None
    source: str = "one process"
    store_is_hosted: bool = False

    @property
    def is_managed(self) -> bool:
        """Whether a launcher started this process and decided how many there are."""
        return self.source != ALONE.source


ALONE = Topology()


def read_topology(environ: Mapping[str, str]) -> Topology:
    """Return this process's place as the environment ``environ`` tells it.

    Raises:
        LaunchError: A launcher's variables are there but do not fit together.
    """
    for applies, read in _LAUNCHERS:
        if applies(environ):
            topology = read(environ)
            _check(topology)
            return topology
    return ALONE


def topology_of_group(environ: Mapping[str, str], rank: int, world_size: int) -> Topology:
    """Return the place of a process whose process group somebody else made (Ray, a notebook, the user's own).

    The group tells no local rank: without ``LOCAL_RANK`` all ranks are taken to be on one node.

    Raises:
        LaunchError: ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE`` do not fit the group.
    """
    has_local_rank = "LOCAL_RANK" in environ
    local_world_size = _number(environ, "LOCAL_WORLD_SIZE", world_size) if has_local_rank else world_size
    topology = Topology(
        rank=rank,
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK", rank),
        local_world_size=local_world_size,
        node_rank=_number(environ, "GROUP_RANK", rank // max(1, local_world_size)),
        num_nodes=-(-world_size // max(1, local_world_size)),
        source="a process group that exists already",
    )
    _check(topology)
    return topology


def _torchelastic(environ: Mapping[str, str]) -> Topology:
    world_size, local_world_size = _number(environ, "WORLD_SIZE"), _number(environ, "LOCAL_WORLD_SIZE", 1)
    return Topology(
        rank=_number(environ, "RANK"),
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK", 0),
        local_world_size=local_world_size,
        node_rank=_number(environ, "GROUP_RANK", _number(environ, "RANK") // local_world_size),
        num_nodes=_number(environ, "GROUP_WORLD_SIZE", -(-world_size // local_world_size)),
        main_address=environ.get("MASTER_ADDR", "127.0.0.1"),
        main_port=_number(environ, "MASTER_PORT", 29500),
        source="torchelastic (fabric-run or torchrun)",
        store_is_hosted=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _slurm_step(environ: Mapping[str, str]) -> Topology:
    # STEP_* and not JOB_*: a step may be smaller than its job.
    world_size = _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))
    node_rank = _number(environ, "SLURM_NODEID", 0)
    tasks_per_node = _expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)))
    return Topology(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(environ, "SLURM_LOCALID", 0),
        local_world_size=tasks_per_node[node_rank] if node_rank < len(tasks_per_node) else 1,
        node_rank=node_rank,
        num_nodes=_number(environ, "SLURM_STEP_NUM_NODES", 1),
        main_address=environ.get("MASTER_ADDR") or _slurm_main_address(environ),
        main_port=_number(environ, "MASTER_PORT", _port_of(environ.get("SLURM_JOB_ID"), environ.get("SLURM_STEP_ID"))),
        source="Slurm (srun)",
    )


def _open_mpi(environ: Mapping[str, str]) -> Topology:
    rank, local_world_size = _number(environ, "OMPI_COMM_WORLD_RANK"), _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", 1)
    # OMPI_COMM_WORLD_NODE_RANK is the rank within the node, in spite of its name; there is no node index.
    return _mpi(
        environ,
        rank,
        world_size=_number(environ, "OMPI_COMM_WORLD_SIZE"),
        local_rank=_number(environ, "OMPI_COMM_WORLD_LOCAL_RANK", 0),
        local_world_size=local_world_size,
        job=environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid"),
        source="Open MPI (mpirun)",
    )


def _pmi(environ: Mapping[str, str]) -> Topology:
    rank = _number(environ, "PMI_RANK")
    return _mpi(
        environ,
        rank,
        world_size=_number(environ, "PMI_SIZE"),
        local_rank=_number(environ, "MPI_LOCALRANKID", 0),
        local_world_size=_number(environ, "MPI_LOCALNRANKS", 1),
        job=environ.get("PMI_JOBID") or environ.get("PMI_PORT") or environ.get("HYDI_CONTROL_FD"),
        source="PMI (mpirun or mpiexec)",
    )


def _mpi(
    environ: Mapping[str, str],
    rank: int,
    *,
    world_size: int,
    local_rank: int,
    local_world_size: int,
    job: str | None,
    source: str,
) -> Topology:
    address = environ.get("MASTER_ADDR")
    if address is None and local_world_size < world_size:
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
        main_port=_number(environ, "MASTER_PORT", _port_of(job)),
        source=source,
    )


def _slurm_batch_shell(environ: Mapping[str, str]) -> Topology:
    raise LaunchError(
        "This process is the batch script's own shell, which looks like rank 0 but has no other ranks beside it.",
        given=f"SLURM_NTASKS={environ.get('SLURM_NTASKS')} and no SLURM_STEP_ID",
        fix="start the script with srun: srun python script.py",
    )


def _is_slurm_step(environ: Mapping[str, str]) -> bool:
    interactive = environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ and not interactive


def _is_slurm_batch_shell(environ: Mapping[str, str]) -> bool:
    several = environ.get("SLURM_NTASKS", "1") not in ("", "1")
    return several and "SLURM_PROCID" in environ and "SLURM_STEP_ID" not in environ


# A step of Slurm may set PMI_* too (srun --mpi=pmi2), so Slurm comes before PMI.
_LAUNCHERS: tuple[tuple[Callable[[Mapping[str, str]], bool], Callable[[Mapping[str, str]], Topology]], ...] = (
    (lambda environ: "RANK" in environ and "WORLD_SIZE" in environ, _torchelastic),
    (_is_slurm_step, _slurm_step),
    (lambda environ: "OMPI_COMM_WORLD_RANK" in environ, _open_mpi),
    (lambda environ: "PMI_RANK" in environ and "PMI_SIZE" in environ, _pmi),
    (_is_slurm_batch_shell, _slurm_batch_shell),
)


def _check(topology: Topology) -> None:
    fits = 0 <= topology.rank < topology.world_size and 0 <= topology.local_rank < topology.local_world_size
    if not fits:
        raise LaunchError(
            f"The variables of {topology.source} do not fit together.",
            given=f"rank {topology.rank} of {topology.world_size}, "
            f"local rank {topology.local_rank} of {topology.local_world_size}",
            fix="unset the stray variables (RANK, WORLD_SIZE, LOCAL_RANK) or start the script with fabric-run",
        )


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None or text == "":
        if default is None:
            raise LaunchError(f"The environment variable {name} is missing.", fix="start the script with fabric-run")
        return default
    try:
        return int(text)
    except ValueError:
        raise LaunchError(
            f"The environment variable {name} is not a number.",
            given=f"{name}={text!r}",
            fix="unset it, or start the script with fabric-run",
        ) from None


def _port_of(*parts: str | None) -> int:
    """A port that all ranks of one job compute alike and two jobs on one host rarely share: 20000 to 29999."""
    digits = "".join(character for part in parts for character in (part or "") if character.isdigit())
    return 20000 + int(digits or 0) % 10000


def _expand_counts(text: str) -> list[int]:
    """``"2(x2),1"`` is 2, 2, 1: Slurm's short form of the tasks on each node."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise LaunchError("Slurm's list of tasks per node could not be read.", given=text)
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _slurm_main_address(environ: Mapping[str, str]) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    if environ.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    return _first_host(nodes) or environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")


def _first_host(nodes: str) -> str:
    """The first name of a list such as ``"n[01-03,7],login"``: ``"n01"``."""
    match = re.match(r"([^,\[]*)(?:\[(\d+))?([^,]*)", nodes)
    if match is None:
        return ""
    name, first, rest = match[1], match[2], match[3]
    if first is None:
        return name
    suffix = rest.rsplit("]", 1)[-1] if "]" in rest else ""
    return f"{name}{first}{suffix}"
