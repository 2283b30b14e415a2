"""Joining the other processes: the store, the process group and the device mesh."""

from __future__ import annotations

import atexit
import datetime
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]

from fabric_lite.errors import LaunchError
from fabric_lite.topology import Topology

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["build_mesh", "join", "leave"]


def join(topology: Topology, device: torch.device, timeout_seconds: float | None = None) -> bool:
    """Make the default process group of ``topology``'s ranks; every rank calls.

    A group that exists already (Ray, a notebook, the user's own) is adopted; one made here ends with the process.

    Returns:
        Whether the group was made here, and so is to be destroyed here.

    Raises:
        LaunchError: The ranks could not be connected, or an existing group has another size.
    """
    if dist.is_initialized():
        if dist.get_world_size() != topology.world_size and topology.is_managed:
            raise LaunchError(
                "A process group exists already, but not of this job's size.",
                given=f"a group of {dist.get_world_size()} ranks, {topology.world_size} started by {topology.source}",
                fix="leave init_process_group to Fabric, or make the group of all ranks",
            )
        return False
    timeout = None if timeout_seconds is None else datetime.timedelta(seconds=timeout_seconds)
    backend = dist.get_default_backend_for_device(device)
    try:
        if topology.store_is_hosted:
            dist.init_process_group(backend, init_method="env://", timeout=timeout)
        else:
            store = _store(topology, timeout)
            dist.init_process_group(
                backend, store=store, rank=topology.rank, world_size=topology.world_size, timeout=timeout
            )
    except (RuntimeError, OSError, ValueError) as error:
        raise LaunchError(
            "The ranks could not be connected.",
            given=f"rank {topology.rank} of {topology.world_size} by {topology.source}, "
            f"backend {backend}, {topology.main_address}:{topology.main_port}: {error}",
            fix="see that the main address can be reached from every node and its port is free",
        ) from error
    # Left to the interpreter's end, gloo's threads can abort a process that has finished well.
    atexit.register(leave)
    return True


def leave() -> None:
    """Leave the default process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def build_mesh(device: torch.device, axes: Mapping[str, int]) -> DeviceMesh | None:
    """Return the mesh with these axes over all ranks; None for no axes."""
    if not axes:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))


def _store(topology: Topology, timeout: datetime.timedelta | None) -> Store:
    """The store of ranks that a launcher without one (srun, mpirun) started; rank 0 serves it."""
    if topology.main_address is None or topology.main_port is None:
        return HashStore()  # a process alone, in a strategy that wants a group all the same
    listener = None
    if topology.rank == 0:
        # TCPStore by itself listens on every interface; a socket of our own listens only where it is needed.
        listener = socket.create_server((topology.main_address, topology.main_port), backlog=2048)
    return TCPStore(
        topology.main_address,
        topology.main_port,
        topology.world_size,
        is_master=topology.rank == 0,
        timeout=timeout or datetime.timedelta(seconds=300),
        master_listen_fd=None if listener is None else listener.detach(),
    )
