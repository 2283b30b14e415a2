"""Who may have started this process: one table, most specific first.

torchelastic (``torchrun``, ``fabric-run``), mpirun inside a Slurm job, a Slurm step, LSF's jsrun, Open MPI, PMI (MPICH
and Intel MPI), else a process alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from fabric_lite.errors import LaunchError
from fabric_lite.topology import engines, mpi, slurm
from fabric_lite.topology.place import ALONE, Topology, check_place
from fabric_lite.topology.variables import number, resolves

__all__ = ["read_topology", "topology_of_group"]

_TORCHELASTIC = "torchelastic (fabric-run or torchrun)"


def read_topology(environ: Mapping[str, str], resolve: Callable[[str], bool] = resolves) -> Topology:
    """Return this process's place as the environment ``environ`` tells it.

    Args:
        environ: The environment.
        resolve: Whether a host of this name is known on this machine.

    Raises:
        LaunchError: A launcher's variables are there but do not fit together, or name a host that nobody knows.
    """
    for applies, read in _LAUNCHERS:
        if applies(environ):
            return _with_known_address(check_place(read(environ)), environ, resolve)
    return ALONE


def topology_of_group(environ: Mapping[str, str], rank: int, world_size: int) -> Topology:
    """Return the place of a process whose process group somebody else made (Ray, a notebook, the user's own).

    The group tells no local rank: without ``LOCAL_RANK`` all ranks are taken to be on one node.

    Raises:
        LaunchError: ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE`` do not fit the group.
    """
    has_local_rank = "LOCAL_RANK" in environ
    local_world_size = number(environ, "LOCAL_WORLD_SIZE", world_size, least=1) if has_local_rank else world_size
    topology = Topology(
        rank=rank,
        world_size=world_size,
        local_rank=number(environ, "LOCAL_RANK", rank),
        local_world_size=local_world_size,
        node_rank=number(environ, "GROUP_RANK", rank // local_world_size),
        num_nodes=-(-world_size // local_world_size),
        source="a process group that exists already",
    )
    return check_place(topology)


def _is_torchelastic(environ: Mapping[str, str]) -> bool:
    return "RANK" in environ and "WORLD_SIZE" in environ


def _torchelastic(environ: Mapping[str, str]) -> Topology:
    _check_no_pod(environ)
    world_size = number(environ, "WORLD_SIZE", least=1)
    local_world_size = number(environ, "LOCAL_WORLD_SIZE", 1, least=1)
    return Topology(
        rank=number(environ, "RANK"),
        world_size=world_size,
        local_rank=number(environ, "LOCAL_RANK", 0),
        local_world_size=local_world_size,
        node_rank=number(environ, "GROUP_RANK", number(environ, "RANK") // local_world_size),
        num_nodes=number(environ, "GROUP_WORLD_SIZE", -(-world_size // local_world_size), least=1),
        main_address=environ.get("MASTER_ADDR", "127.0.0.1"),
        main_port=number(environ, "MASTER_PORT", 29500),
        source=_TORCHELASTIC,
        store_is_hosted=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _check_no_pod(environ: Mapping[str, str]) -> None:
    """Raise where RANK numbers the pods of a Kubeflow job, of which each is to hold several processes."""
    processes = environ.get("PET_NPROC_PER_NODE", "1")
    if "LOCAL_RANK" not in environ and processes not in ("", "1"):
        raise LaunchError(
            "RANK is the number of this pod, not of this process: a pod is to run several processes.",
            given=f"RANK={environ['RANK']}, PET_NPROC_PER_NODE={processes}, no LOCAL_RANK",
            fix="fabric-run script.py in each pod, which reads the PET_ variables, or torchrun script.py",
        )


def _with_known_address(topology: Topology, environ: Mapping[str, str], resolve: Callable[[str], bool]) -> Topology:
    """See that the main address of ranks which nobody serves a store is known here: they would wait for minutes.

    torchelastic's is left alone: where Kubernetes makes the name, it may be known in a moment.
    """
    name = topology.main_address
    if name is None or topology.world_size == 1 or topology.source == _TORCHELASTIC or resolve(name):
        return topology
    address = slurm.address_for_one_host(environ)
    if address is not None:
        return dataclasses.replace(topology, main_address=address)
    raise LaunchError(
        f"The host of rank 0, {name!r}, has no address that is known here.",
        given=f"rank {topology.rank} of {topology.world_size} by {topology.source}, main address {name!r}",
        fix="MASTER_ADDR=<address of that host> in the environment of all ranks, or its name in /etc/hosts",
    )


_Applies = Callable[[Mapping[str, str]], bool]
_Read = Callable[[Mapping[str, str]], Topology]

# jsrun sets Open MPI's variables too.
_LAUNCHERS: tuple[tuple[_Applies, _Read], ...] = (
    (_is_torchelastic, _torchelastic),
    (
        lambda environ: slurm.is_shell_of_several(environ) and not mpi.is_started_by_mpirun(environ),
        slurm.read_lone_shell,
    ),
    (lambda environ: slurm.is_step(environ) and not mpi.is_started_by_mpirun(environ), slurm.read_step),
    (mpi.is_lsf, mpi.read_lsf),
    (mpi.is_open_mpi, mpi.read_open_mpi),
    (mpi.is_pmi, mpi.read_pmi),
    (slurm.is_batch_shell, slurm.read_lone_shell),
    (engines.is_node_of_several, engines.read_node_of_several),
)
