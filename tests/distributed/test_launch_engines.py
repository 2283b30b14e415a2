"""``fabric-run`` takes what it is not told from the engine that has started it on several nodes."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import pytest

from fabric_lite.errors import LaunchError
from fabric_lite.launch.engines import with_defaults
from tests.distributed.launching import FABRIC_RUN, assert_nothing_left, started, write
from tests.distributed.test_launch_nodes import free_port

OPTIONS = ("num_nodes", "node_rank", "main_address", "main_port", "devices", "accelerator")
OPTIONS += ("rdzv_backend", "rdzv_endpoint", "rdzv_id")
SKYPILOT = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
}
DSTACK = {
    "DSTACK_NODES_NUM": "2",
    "DSTACK_NODE_RANK": "1",
    "DSTACK_MASTER_NODE_IP": "10.0.0.1",
    "DSTACK_NODES_IPS": "10.0.0.1\n10.0.0.2",
    "DSTACK_GPUS_PER_NODE": "8",
    "DSTACK_GPUS_NUM": "16",
}
KUBEFLOW = {
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "10.0.0.1",
    "PET_MASTER_PORT": "29400",
    "PET_NPROC_PER_NODE": "8",
}
# RANK and WORLD_SIZE number the pods.
PYTORCH_JOB = {**KUBEFLOW, "RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}
ELASTIC = {"PET_NNODES": "1:4", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "job-0:29400", "PET_RDZV_ID": "job"}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "localhost,n2",
}
MEETING = {"num_nodes": "2", "node_rank": 1, "main_address": "10.0.0.1"}


def taken(environ: dict[str, str], **given: Any) -> dict[str, Any]:
    """What is taken from the environment, where ``given`` stands on the command line."""
    options = argparse.Namespace(**{**dict.fromkeys(OPTIONS), **given})
    found, line = with_defaults(options, environ)
    changed = {name: value for name, value in vars(found).items() if value != getattr(options, name)}
    assert (line is None) == (not changed)
    for name, value in changed.items():
        assert line is not None
        assert f"--{name.replace('_', '-')} {value}" in line
    return changed


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {}),
        (SKYPILOT, {**MEETING, "devices": "8"}),
        (DSTACK, {**MEETING, "devices": "8"}),
        (KUBEFLOW, {**MEETING, "main_port": 29400, "devices": "8"}),
        (PYTORCH_JOB, {**MEETING, "main_port": 29400, "devices": "8"}),
        (ELASTIC, {"num_nodes": "1:4", "rdzv_backend": "c10d", "rdzv_endpoint": "job-0:29400", "rdzv_id": "job"}),
        (SRUN, {**MEETING, "main_address": "localhost", "main_port": 23206}),
        ({**SKYPILOT, "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}, {"devices": "8"}),
        ({**KUBEFLOW, "PET_NPROC_PER_NODE": "auto"}, {**MEETING, "main_port": 29400}),
        ({**SKYPILOT, "SKYPILOT_NUM_GPUS_PER_NODE": "0"}, MEETING),
        ({"JOB_COMPLETION_INDEX": "1"}, {}),  # nobody has said that there are several nodes
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}, {}),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, {}),  # a batch script, on its own node
        ({"SLURM_PROCID": "0", "SLURM_NNODES": "2"}, {}),
    ],
)
def test_what_an_engine_says_is_taken(environ: dict[str, str], expected: dict[str, Any]) -> None:
    assert taken(environ) == expected


def test_what_is_given_wins() -> None:
    assert taken(SKYPILOT, num_nodes="3", main_address="other") == {"node_rank": 1, "devices": "8"}
    assert taken(KUBEFLOW, main_port=1, devices="2", node_rank=0) == {"num_nodes": "2", "main_address": "10.0.0.1"}
    assert taken(SKYPILOT, num_nodes="1") == {"devices": "8"}
    assert taken(SKYPILOT, num_nodes="1:1") == {"devices": "8"}
    assert taken(SKYPILOT, accelerator="cpu") == MEETING  # the engine counts GPUs
    assert taken(SKYPILOT, rdzv_endpoint="host:1", devices="1") == {"num_nodes": "2"}
    assert taken({"JOB_COMPLETION_INDEX": "1"}, num_nodes="2", main_address="job-0") == {"node_rank": 1}


def test_a_number_that_is_none_is_an_error_that_names_the_variable() -> None:
    with pytest.raises(LaunchError, match=r"PET_NODE_RANK is not a number.*\n.*'worker'"):
        taken({**KUBEFLOW, "PET_NODE_RANK": "worker"})


OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
MPICH = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}
JSRUN = {"JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_SIZE": "2"}
JSRUN |= {"JSM_NAMESPACE_LOCAL_RANK": "0", "JSM_NAMESPACE_LOCAL_SIZE": "2"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}


@pytest.mark.parametrize(
    ("environ", "who", "ranks", "once_on_each_node"),
    [
        (OPEN_MPI, "Open MPI", "mpirun python", "mpirun --map-by ppr:1:node"),
        (MPICH, "PMI", "mpirun python", "mpirun -ppn 1"),
        (JSRUN, "LSF", "jsrun python", "jsrun --rs_per_host 1"),
        (SRUN, "Slurm", "srun python", "srun --ntasks-per-node=1"),
    ],
)
def test_several_fabric_run_of_one_launcher_on_a_node_are_an_error_with_its_own_commands(
    environ: dict[str, str], who: str, ranks: str, once_on_each_node: str
) -> None:
    with pytest.raises(LaunchError, match=rf"{who} .* has started fabric-run 2 times on this node") as raised:
        taken(environ)
    assert f"Try: {ranks} script.py; or fabric-run once on each node: {once_on_each_node} fabric-run" in str(
        raised.value
    )


SCRIPT = """
import os
assert os.environ["WORLD_SIZE"] == "2"
os.write(1, f"{os.environ['RANK']} {os.environ['GROUP_RANK']} {os.environ['MASTER_ADDR']}\\n".encode())
"""


@pytest.mark.parametrize(
    ("engine", "variables", "words"),
    [
        ("Kubeflow", "PET_NNODES=2 PET_NODE_RANK={} PET_MASTER_ADDR=127.0.0.1 PET_MASTER_PORT={}", ""),
        (
            "SkyPilot",
            "SKYPILOT_NUM_NODES=2 SKYPILOT_NODE_RANK={} SKYPILOT_NODE_IPS=127.0.0.1\n127.0.0.2",
            "--main-port {}",
        ),
        ("dstack", "DSTACK_NODES_NUM=2 DSTACK_NODE_RANK={} DSTACK_MASTER_NODE_IP=127.0.0.1", "--main-port {}"),
        (
            "Kubernetes' Indexed Job",
            "JOB_COMPLETION_INDEX={}",
            "--num-nodes 2 --main-address 127.0.0.1 --main-port {}",
        ),
    ],
)
def test_two_nodes_of_an_engine_make_one_job(tmp_path: Path, engine: str, variables: str, words: str) -> None:
    script, port = write(tmp_path, SCRIPT), free_port()
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(
                started(
                    "env",
                    *variables.format(node, port).split(" "),
                    *FABRIC_RUN,
                    "--accelerator=cpu",
                    *words.format(port).split(),
                    script,
                    cwd=tmp_path,
                )
            )
            for node in (0, 1)
        ]
        outputs = [node.communicate(timeout=60) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert [said for said, _ in outputs] == ["0 0 127.0.0.1\n", "1 1 127.0.0.1\n"]
    for node, (_, said) in enumerate(outputs):
        (line,) = (line for line in said.splitlines() if line.startswith("fabric-run: from"))
        assert line.startswith(f"fabric-run: from {engine}: ")
        assert f"--node-rank {node}" in line
    assert_nothing_left(tmp_path)
