"""A task of a Slurm step, and what looks like one."""

from __future__ import annotations

import os
from collections.abc import Mapping

from fabric_lite.errors import LaunchError
from fabric_lite.topology.place import Topology
from fabric_lite.topology.processes import process
from fabric_lite.topology.variables import expand_counts, expand_hosts, is_loopback, number, port_of

__all__ = [
    "address_for_one_host",
    "is_batch_shell",
    "is_lone_shell",
    "is_shell_of_several",
    "is_step",
    "read_lone_shell",
    "read_step",
]

# A shell that salloc starts on a node (use_interactive_step) is a step with this number.
_INTERACTIVE_STEP = "4294967290"
# What is more than 1 in a job of several tasks.
_COUNTS = ("SLURM_NTASKS", "SLURM_NNODES")


def is_step(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process, and no shell for a person stands between."""
    return "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ and not _is_interactive(environ)


def _is_interactive(environ: Mapping[str, str]) -> bool:
    # The job's name alone says nothing: `srun bash run.sh` is called bash, and every step of salloc's "interactive".
    is_one = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")) == "1"
    is_shell = "SLURM_PTY_PORT" in environ or environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return environ.get("SLURM_STEP_ID") == _INTERACTIVE_STEP or (is_one and is_shell)


def is_shell_of_several(environ: Mapping[str, str]) -> bool:
    """Whether this was typed into a shell that is the first task of several: ``srun -n2 --pty bash``.

    The variables are those of rank 0, and of a step that is started in that shell: it inherits SLURM_PTY_PORT. But the
    task of such a step has no terminal, and a shell in which somebody types gives each command a process group.
    """
    if "SLURM_PTY_PORT" not in environ or _is_interactive(environ):
        return False
    task = process(number(environ, "SLURM_TASK_PID", 0))
    return task is not None and task.has_terminal and os.getpgrp() != task.group


def read_step(environ: Mapping[str, str]) -> Topology:
    """The place of a task of a step; ``STEP_*`` and not ``JOB_*``, because a step may be smaller than its job."""
    world_size = number(environ, "SLURM_STEP_NUM_TASKS", number(environ, "SLURM_NTASKS", 1))
    node_rank = number(environ, "SLURM_NODEID", 0)
    # SLURM_NTASKS_PER_NODE is only there where the user has given it, and the same for all nodes.
    tasks_per_node = expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)))
    return Topology(
        rank=number(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=number(environ, "SLURM_LOCALID", 0),
        local_world_size=tasks_per_node[node_rank] if node_rank < len(tasks_per_node) else 1,
        node_rank=node_rank,
        num_nodes=number(environ, "SLURM_STEP_NUM_NODES", 1),
        main_address=environ.get("MASTER_ADDR") or _main_address(environ),
        main_port=number(environ, "MASTER_PORT", port_of(environ.get("SLURM_JOB_ID"), environ.get("SLURM_STEP_ID"))),
        source="Slurm (srun)",
    )


def _main_address(environ: Mapping[str, str]) -> str:
    if environ.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    nodes = expand_hosts(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "")
    return nodes[0] if nodes else environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")


def address_for_one_host(environ: Mapping[str, str]) -> str | None:
    """The address for all nodes where they are one machine: that of srun, if all of them reach it by loopback."""
    address = environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    return address if is_loopback(address) and "MASTER_ADDR" not in environ else None


def is_batch_shell(environ: Mapping[str, str]) -> bool:
    """Whether this is the shell that runs a batch script of several tasks: it has the variables of a rank 0.

    Of ``sbatch -N2`` alone, or with ``--gpus-per-node``, Slurm tells the number of nodes and none of tasks.
    """
    several = any(environ.get(name, "1") not in ("", "1") for name in _COUNTS)
    return several and "SLURM_PROCID" in environ and "SLURM_STEP_ID" not in environ


def is_lone_shell(environ: Mapping[str, str]) -> bool:
    """Whether this process has the variables of a rank 0, and no other ranks beside it."""
    return is_batch_shell(environ) or is_shell_of_several(environ)


def read_lone_shell(environ: Mapping[str, str]) -> Topology:
    """Raise.

    Raises:
        LaunchError: A rank 0 to which no others will come would wait for ever.
    """
    if "SLURM_STEP_ID" in environ:
        raise LaunchError(
            "This process is of a terminal's shell, which looks like rank 0 but has no other ranks beside it.",
            given=f"SLURM_STEP_NUM_TASKS={environ.get('SLURM_STEP_NUM_TASKS')} and a terminal (srun --pty)",
            fix="start the script with srun: srun --overlap python script.py; for one process: srun -n1 --pty bash",
        )
    raise LaunchError(
        "This process is the batch script's own shell, which looks like rank 0 but has no other ranks beside it.",
        given=", ".join(f"{name}={environ[name]}" for name in _COUNTS if environ.get(name)) + ", no SLURM_STEP_ID",
        fix="start the script with srun: srun python script.py; one process alone: srun -N1 -n1 python script.py",
    )
