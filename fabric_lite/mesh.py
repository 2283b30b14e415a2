"""Joining the other processes: the store, the process group and the device mesh."""

from __future__ import annotations

import atexit
import dataclasses
import datetime
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from fabric_lite.errors import LaunchError
from fabric_lite.listening import listen_for_nodes, listen_on, serve_store
from fabric_lite.meeting import meet
from fabric_lite.topology import Topology

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "backend_for",
    "build_mesh",
    "connect",
    "data_share",
    "existing_group",
    "join",
    "leave",
    "sequence_numbers",
]


def join(topology: Topology, device: torch.device, timeout_seconds: float | None = None) -> bool:
    """Make the default process group of ``topology``'s ranks; every rank calls.

    A group that exists already (Ray, a notebook, the user's own) is adopted and never destroyed. One made here ends
    with the last of its users, or with the process.

    Args:
        topology: This process's place.
        device: Its device, which decides the backend.
        timeout_seconds: After so long a collective fails; None is torch's default.

    Returns:
        Whether the caller is a user of a group made here, and so must call :func:`leave`.

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
        return _own.add_user()
    timeout = None if timeout_seconds is None else datetime.timedelta(seconds=timeout_seconds)
    backend = backend_for(device)
    try:
        if topology.store_is_hosted:
            dist.init_process_group(backend, init_method="env://", timeout=timeout)
        else:
            store = _store(topology)
            dist.init_process_group(
                backend, store=store, rank=topology.rank, world_size=topology.world_size, timeout=timeout
            )
    except LaunchError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        raise LaunchError(
            "The ranks could not be connected.",
            given=f"rank {topology.rank} of {topology.world_size} by {topology.source}, "
            f"backend {backend}, {topology.main_address}:{topology.main_port}: {error}",
            fix="see that the main address can be reached from every node and its port is free",
        ) from error
    # Left to the interpreter's end, gloo's threads can abort a process that has finished well.
    atexit.register(_own.end)
    _own.group = dist.group.WORLD
    return _own.add_user()


def backend_for(device: torch.device) -> str:
    """Return the backend of the default process group: gloo as well as the device's own, where that is another.

    Parameters that are offloaded to the host's memory, and objects, travel by gloo.
    """
    own = dist.get_default_backend_for_device(device)
    return own if device.type == "cpu" else f"cpu:gloo,{device.type}:{own}"


def leave() -> None:
    """Be a user of the group made by :func:`join` no longer; the last one destroys it."""
    _own.remove_user()


def existing_group() -> tuple[int, int] | None:
    """Rank and world size in the default process group; None without one."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    return dist.get_rank(), dist.get_world_size()


def sequence_numbers() -> dict[str, int]:
    """How many collectives this process has entered, by the name of the process group.

    Torch counts them anyhow, gloo and NCCL alike: those of DDP, FSDP and of the user's own calls too. Any thread may
    ask, at 0.2 us a group.
    """
    # The only way to all groups of a process, and to their counts, is private.
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return {
        # One backend may serve several kinds of device.
        group.group_name: sum(map(_entered, {group._get_backend(device) for device in group._device_types}))
        for group in groups
    }


def _entered(backend: Any) -> int:
    try:
        return int(backend._get_sequence_number_for_group())
    except RuntimeError:
        return 0  # MPI and others do not count


def build_mesh(device: torch.device, axes: Mapping[str, int]) -> DeviceMesh | None:
    """Return the mesh with these axes over all ranks; None for no axes.

    One for all Fabrics of a process that ask for the same axes: a mesh makes process groups, whose connections and
    threads stay until the default group ends.
    """
    if not axes:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    key = (device.type, *axes.items())
    group, mesh = _meshes.get(key, (None, None))
    if mesh is None or group is not dist.group.WORLD:
        mesh = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
        _meshes[key] = (dist.group.WORLD, mesh)
    return mesh


def data_share(mesh: DeviceMesh | None, axes: tuple[str, ...] | None, ranks: tuple[int, int]) -> tuple[int, int]:
    """Return which share of the data this rank gets, and of how many.

    Args:
        mesh: The mesh of all ranks.
        axes: Those along which ranks get different data, the slowest first; None is all.
        ranks: This rank and the number of ranks: the answer where all get different data.
    """
    if mesh is None or axes is None:
        return ranks
    share, shares = 0, 1
    for axis in axes:
        size = mesh[axis].size()
        share, shares = share * size + mesh.get_local_rank(axis), shares * size
    return share, shares


@dataclasses.dataclass
class _OwnGroup:
    """The default process group that was made here, if any, and how many Fabrics of this process use it."""

    group: Any = None
    users: int = 0

    def add_user(self) -> bool:
        # The user may have destroyed ours, and even made another since.
        if self.group is None or self.group is not dist.group.WORLD:
            self.group, self.users = None, 0
            return False
        self.users += 1
        return True

    def remove_user(self) -> None:
        self.users -= 1
        if self.users <= 0:
            self.end()

    def end(self) -> None:
        if self.group is not None and dist.is_initialized() and self.group is dist.group.WORLD:
            _meshes.clear()
            dist.destroy_process_group()
        self.group, self.users = None, 0


_own = _OwnGroup()
# How long a rank waits for those that have not started; once they have met, the group's own timeout holds.
_MEETING_TIMEOUT_SECONDS = 300.0
# By device type and axes: the default group that it was made over, and the mesh.
_meshes: dict[tuple[Any, ...], tuple[Any, DeviceMesh]] = {}
_stores: dict[tuple[str, int], Store] = {}
_group_numbers = itertools.count()  # every rank joins the same groups in the same order


def _store(topology: Topology) -> Store:
    """The store of ranks that a launcher without one (srun, mpirun) started; rank 0 serves it."""
    if topology.main_address is None or topology.main_port is None:
        return HashStore()  # a process alone, in a strategy that wants a group all the same
    return PrefixStore(f"group {next(_group_numbers)}", connect(topology))


def connect(topology: Topology, timeout_seconds: float = _MEETING_TIMEOUT_SECONDS) -> Store:
    """Return the store in which the ranks meet, once all of them have come to it; every rank calls.

    Kept for the next call: a rank that joined again at once would else reach the store that rank 0 is closing.

    Args:
        topology: This process's place.
        timeout_seconds: How long to wait for those that have not come.

    Raises:
        LaunchError: Some have not come, which it names; rank 0 cannot listen, or is not reached.
    """
    assert topology.main_address is not None
    assert topology.main_port is not None
    key = (topology.main_address, topology.main_port)
    if key in _stores:
        return _stores[key]
    if topology.rank == 0 and not topology.store_is_hosted:
        store: Store = _serve(topology, *key, timeout_seconds)
    else:
        store = _reach(topology, *key, timeout_seconds)
    meet(PrefixStore("meeting", store), "rank", topology.rank, topology.world_size, timeout_seconds)
    _stores[key] = store
    return store


def _serve(topology: Topology, address: str, port: int, timeout_seconds: float) -> Store:
    try:
        if topology.num_nodes > 1:
            listener = listen_for_nodes(address, port, timeout_seconds)
        else:
            listener = listen_on(address, port)
    except (OSError, OverflowError) as error:
        raise LaunchError(
            "Rank 0 cannot listen where the ranks are to meet.",
            given=f"{address}:{port}, by {topology.source}: {error}",
            fix="MASTER_PORT=<a free port>, and MASTER_ADDR=<an address of this host>, in the environment of all ranks",
        ) from error
    store: Store = serve_store(listener, address, timeout_seconds)
    return store


def _reach(topology: Topology, address: str, port: int, timeout_seconds: float) -> Store:
    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        return TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        raise LaunchError(
            f"Rank {topology.rank} does not reach the store of rank 0.",
            given=f"{address}:{port}, by {topology.source}: {error}",
            fix="see whether rank 0 has started, and that its host and port can be reached from here",
        ) from error
