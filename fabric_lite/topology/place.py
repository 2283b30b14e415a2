"""The place of a process among all processes of its job, as plain data."""

from __future__ import annotations

import dataclasses

from fabric_lite.errors import LaunchError

__all__ = ["ALONE", "Topology", "check_place"]


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


def check_place(topology: Topology) -> Topology:
    """Return the same.

    Raises:
        LaunchError: Its numbers do not fit together.
    """
    world_size, local_world_size = topology.world_size, topology.local_world_size
    fits = 0 <= topology.rank < world_size and 0 <= topology.local_rank < local_world_size
    if not fits or local_world_size > world_size:
        raise LaunchError(
            f"The variables of {topology.source} do not fit together.",
            given=f"rank {topology.rank} of {world_size}, local rank {topology.local_rank} of {local_world_size}",
            fix="unset the stray variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE), "
            "or start the script with fabric-run",
        )
    return topology
