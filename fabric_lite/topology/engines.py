"""What starts one program on each of several machines, and tells it which one it is: one table for all of them.

Kubeflow's Trainer, SkyPilot, dstack and Kubernetes' Indexed Jobs know nodes, not processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from fabric_lite.errors import LaunchError
from fabric_lite.topology.place import Topology

__all__ = ["ENGINES", "Engine", "engine_of", "is_node_of_several", "read_node_of_several"]


@dataclasses.dataclass(frozen=True)
class Engine:
    """Which variable of an engine stands for which option of ``fabric-run``; empty: none does.

    Args:
        name: What it is called in messages.
        mark: The variable by which it is known.
        num_nodes: ``--num-nodes``, also as a range.
        node_rank: ``--node-rank``.
        main_address: ``--main-address``; of several lines the first one.
        main_port: ``--main-port``.
        processes_per_node: ``--devices``, where it is a number.
        gpus_per_node: ``--devices``, unless the run is on CPUs.
        rdzv_backend: ``--rdzv-backend``.
        rdzv_endpoint: ``--rdzv-endpoint``.
        rdzv_id: ``--rdzv-id``.
    """

    name: str
    mark: str
    num_nodes: str = ""
    node_rank: str = ""
    main_address: str = ""
    main_port: str = ""
    processes_per_node: str = ""
    gpus_per_node: str = ""
    rdzv_backend: str = ""
    rdzv_endpoint: str = ""
    rdzv_id: str = ""


ENGINES = (
    Engine(
        "SkyPilot",
        mark="SKYPILOT_NUM_NODES",
        num_nodes="SKYPILOT_NUM_NODES",
        node_rank="SKYPILOT_NODE_RANK",
        main_address="SKYPILOT_NODE_IPS",
        gpus_per_node="SKYPILOT_NUM_GPUS_PER_NODE",
    ),
    Engine(
        "dstack",
        mark="DSTACK_NODES_NUM",
        num_nodes="DSTACK_NODES_NUM",
        node_rank="DSTACK_NODE_RANK",
        main_address="DSTACK_MASTER_NODE_IP",
        gpus_per_node="DSTACK_GPUS_PER_NODE",
    ),
    # Its older PyTorchJob sets RANK and WORLD_SIZE too, which number the pods: they are not read.
    Engine(
        "Kubeflow",
        mark="PET_NNODES",
        num_nodes="PET_NNODES",
        node_rank="PET_NODE_RANK",
        main_address="PET_MASTER_ADDR",
        main_port="PET_MASTER_PORT",
        processes_per_node="PET_NPROC_PER_NODE",
        rdzv_backend="PET_RDZV_BACKEND",
        rdzv_endpoint="PET_RDZV_ENDPOINT",
        rdzv_id="PET_RDZV_ID",
    ),
    Engine("Kubernetes' Indexed Job", mark="JOB_COMPLETION_INDEX", node_rank="JOB_COMPLETION_INDEX"),
)


def engine_of(environ: Mapping[str, str]) -> Engine | None:
    """The engine that has started this process, or what it descends from."""
    return next((engine for engine in ENGINES if environ.get(engine.mark)), None)


def is_node_of_several(environ: Mapping[str, str]) -> bool:
    """Whether an engine says that it has started the same on other nodes."""
    engine = engine_of(environ)
    return engine is not None and environ.get(engine.num_nodes, "").rpartition(":")[2] not in ("", "0", "1")


def read_node_of_several(environ: Mapping[str, str]) -> Topology:
    """Raise.

    Raises:
        LaunchError: Each node would train by itself, all of them the same, and write the same files.
    """
    engine = engine_of(environ)
    assert engine is not None
    nodes = environ[engine.num_nodes]
    raise LaunchError(
        f"{engine.name} has started this on {nodes} nodes, and it is no rank: each node would train by itself.",
        given=f"{engine.num_nodes}={nodes}, no RANK",
        fix="fabric-run script.py on each node; on this one alone: fabric-run --num-nodes 1 script.py",
    )
