"""What a rank finds around it: torchrun's variables, a thread count, and the store that they name."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from fabric_lite.run_config import RUN_ID_PREFIX

__all__ = [
    "chosen_threads",
    "cores",
    "rank_environment",
    "server_environment",
]


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chosen_threads(environ: Mapping[str, str], local_world_size: int) -> int | None:
    """Return the thread count of each rank: cores / ranks; None for one rank and where the user has set one."""
    if "OMP_NUM_THREADS" in environ or local_world_size == 1:
        return None
    return max(1, cores() // local_world_size)


def server_environment(environ: Mapping[str, str], threads: int | None) -> dict[str, str]:
    """Return the environment in which the server starts: OpenMP and OpenBLAS read their thread count when loaded."""
    return {**environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}


def rank_environment(
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    local_world_size: int,
    node_rank: int,
    num_nodes: int,
    main_address: str,
    main_port: int,
    error_file: str,
    run_id: str | None = None,
    restart_count: int = 0,
    max_restarts: int = 0,
    role_name: str = "default",
    role_rank: int | None = None,
    role_world_size: int | None = None,
) -> dict[str, str]:
    """Return the variables that torchrun sets for a worker; on one node also the one that keeps gloo on loopback.

    The run id, by default this process's id, begins with ``RUN_ID_PREFIX``. A program that a rank starts inherits the
    variables but is no rank: it finds the prefix, and no run config.
    """
    loopback = _loopback_interface() if num_nodes == 1 else None
    return {
        **({} if loopback is None else {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", loopback)}),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "GROUP_RANK": str(node_rank),
        "GROUP_WORLD_SIZE": str(num_nodes),
        "ROLE_NAME": role_name,
        "ROLE_RANK": str(rank if role_rank is None else role_rank),
        "ROLE_WORLD_SIZE": str(world_size if role_world_size is None else role_world_size),
        "MASTER_ADDR": main_address,
        "MASTER_PORT": str(main_port),
        "TORCHELASTIC_RUN_ID": f"{RUN_ID_PREFIX}{run_id or os.getpid()}",
        "TORCHELASTIC_RESTART_COUNT": str(restart_count),
        "TORCHELASTIC_MAX_RESTARTS": str(max_restarts),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_ERROR_FILE": error_file,
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
    }


def _loopback_interface() -> str | None:
    # Gloo left to itself listens on the address of the machine's name, which others may reach.
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
