"""What starts one program on each of several machines, and tells it which one it is: ``fabric-run``'s defaults.

Kubeflow's Trainer, SkyPilot, dstack and Kubernetes' Indexed Jobs know nodes, not processes; one table has them all.
A step of Slurm's with one task on each node is such a node too, and so is what ``mpirun`` starts once on each.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from fabric_lite.errors import LaunchError
from fabric_lite.topology import Topology, is_lone_shell, read_topology
from fabric_lite.topology.engines import engine_of
from fabric_lite.topology.variables import number

__all__ = ["is_engines_node", "with_defaults"]

# Where several nodes meet: of no use on one.
_MEETING = ("node_rank", "main_address", "main_port", "rdzv_backend", "rdzv_endpoint", "rdzv_id")


def with_defaults(options: argparse.Namespace, environ: Mapping[str, str]) -> tuple[argparse.Namespace, str | None]:
    """Return the options with what the engine says in place of those not given, and one line about it.

    Raises:
        LaunchError: A variable of the engine's is no number; or srun or mpirun has started several on this node.
    """
    engine, told = _told(environ, options.accelerator)
    given = vars(options)
    taken = {option: value for option, value in told.items() if given[option] is None}
    is_one_node = (given["num_nodes"] or taken.get("num_nodes", "1")).rpartition(":")[2] == "1"
    if is_one_node:
        taken = {option: value for option, value in taken.items() if option == "devices"}
    elif given["rdzv_endpoint"] is not None:
        # The nodes are numbered by those who meet there.
        taken = {option: value for option, value in taken.items() if option not in _MEETING}
    if not taken:
        return options, None
    words = " ".join(f"--{option.replace('_', '-')} {value}" for option, value in taken.items())
    return argparse.Namespace(**{**given, **taken}), f"fabric-run: from {engine}: {words}"


def is_engines_node(environ: Mapping[str, str]) -> bool:
    """Whether an engine has started this process as a node, and no launcher as one of the ranks on it.

    RANK alone may number the pods of Kubeflow's older PyTorchJob.
    """
    engine = engine_of(environ)
    return engine is not None and bool(engine.num_nodes) and "LOCAL_RANK" not in environ


def _told(environ: Mapping[str, str], accelerator: str | None) -> tuple[str, dict[str, Any]]:
    """Who tells, and what, by the names of ``fabric-run``'s options."""
    engine = engine_of(environ)
    if engine is None:
        topology = _tasks(environ)
        return ("", {}) if topology is None else (topology.source, _of_tasks(topology))
    told: dict[str, Any] = {}
    for option in ("num_nodes", "main_address", "rdzv_backend", "rdzv_endpoint", "rdzv_id"):
        # Of a list of addresses, one a line, the first is that of node 0.
        words = environ.get(getattr(engine, option), "").split()
        if words:
            told[option] = words[0]
    for option in ("node_rank", "main_port"):
        name = getattr(engine, option)
        if environ.get(name):
            told[option] = number(environ, name)
    processes = environ.get(engine.processes_per_node, "")
    gpus = "" if accelerator == "cpu" else environ.get(engine.gpus_per_node, "")
    # Torchrun's "auto" and "gpu" are fabric-run's own default.
    devices = next((text for text in (processes, gpus) if text.isdigit() and text != "0"), None)
    if devices is not None:
        told["devices"] = devices
    return engine.name, told


def _tasks(environ: Mapping[str, str]) -> Topology | None:
    """The place of this ``fabric-run`` among those that srun or mpirun has started, if there are several."""
    # A batch script, or a person in a shell, may well run it by itself, on its own node.
    if is_lone_shell(environ) or "RANK" in environ:
        return None
    topology = read_topology(environ)
    if topology.local_world_size > 1:
        raise LaunchError(
            f"{topology.source} has started fabric-run {topology.local_world_size} times on this node.",
            given=f"{topology.world_size} times on {topology.num_nodes} nodes, and each would start ranks of its own",
            fix=f"{_once_on_each_node(topology).split()[0]} python script.py; or fabric-run once on each node: "
            f"{_once_on_each_node(topology)} fabric-run script.py",
        )
    return topology if topology.num_nodes > 1 else None


def _once_on_each_node(topology: Topology) -> str:
    commands = {"Open MPI": "mpirun --map-by ppr:1:node", "PMI": "mpirun -ppn 1", "LSF": "jsrun --rs_per_host 1"}
    return next(
        (command for name, command in commands.items() if topology.source.startswith(name)), "srun --ntasks-per-node=1"
    )


def _of_tasks(topology: Topology) -> dict[str, Any]:
    return {
        "num_nodes": str(topology.num_nodes),
        "node_rank": topology.node_rank,
        "main_address": topology.main_address,
        "main_port": topology.main_port,
    }
