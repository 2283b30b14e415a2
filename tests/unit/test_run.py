"""From arguments, command line and environment to one description of the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fabric_lite import Precision
from fabric_lite.accelerators import Accelerator
from fabric_lite.errors import FabricValueError, LaunchError
from fabric_lite.run import Arguments, Run, resolve
from fabric_lite.run_config import RunConfig
from fabric_lite.topology import topology_of_group

TWO_RANKS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def resolved(environ: dict[str, str], config: RunConfig | None = None, **arguments: Any) -> Run:
    return resolve(Arguments(**{"accelerator": "cpu", **arguments}), None, config, environ)


@pytest.mark.parametrize("devices", ["auto", "AUTO", " Auto ", "-1", " -1", -1])
def test_all_devices_under_a_launcher_are_as_many_as_it_started_however_it_is_written(devices: Any) -> None:
    assert resolved(TWO_RANKS, devices=devices).topology.world_size == 2
    assert resolved(TWO_RANKS, RunConfig(devices=str(devices))).topology.world_size == 2


@pytest.mark.parametrize("devices", [" 2 ", "2", [0, 1], "0, 1"])
def test_a_number_of_devices_is_held_against_what_was_started(devices: Any) -> None:
    assert resolved(TWO_RANKS, devices=devices).topology.world_size == 2
    with pytest.raises(LaunchError, match="so 3 processes, and 2 started by torchelastic"):
        resolved(TWO_RANKS, devices=3)


@pytest.mark.parametrize("task", [0, 2])
def test_ranks_whose_own_node_is_right_see_too_that_another_is_not(task: int) -> None:
    """Of three tasks on two nodes, two each were asked for: without this, the first two would wait for a fourth."""
    srun = {"SLURM_STEP_ID": "0", "SLURM_PROCID": str(task), "SLURM_LOCALID": "0", "SLURM_NODEID": str(task // 2)}
    srun |= {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    with pytest.raises(LaunchError, match=r"so 4 processes, and 3 started by Slurm.*\n.*--nodes=2 --ntasks-per-node=2"):
        resolved({**srun, "MASTER_ADDR": "127.0.0.1"}, devices=2)


def test_a_number_of_nodes_is_held_against_what_was_started() -> None:
    with pytest.raises(LaunchError, match=r"devices=4 on 2 nodes, so 8 processes, and 2 started"):
        resolved(TWO_RANKS, devices=4, num_nodes=2)
    with pytest.raises(LaunchError, match=r"num_nodes=2 and 1 by torchelastic"):
        resolved(TWO_RANKS, num_nodes=2)
    # Of fabric-run's range of nodes not all may have come.
    assert resolved(TWO_RANKS, RunConfig(num_nodes=2, devices="2")).topology.num_nodes == 1


@pytest.mark.parametrize("precision", ["bf16", "BF16", " bf16 ", 16, "16"])
def test_an_ambiguous_precision_has_its_line_however_it_is_written(precision: Any) -> None:
    (notice,) = resolved({}, precision=precision).notices
    assert "means" in notice


def test_a_precision_of_ones_own_that_is_named_like_an_alias_has_none() -> None:
    assert resolved({}, precision=Precision("16")).notices == ()
    assert resolved({}, precision="BF16-mixed").notices == ()


def test_the_same_word_on_the_command_line_in_capitals_is_no_contradiction() -> None:
    assert resolved(TWO_RANKS, RunConfig(strategy="DDP"), strategy="ddp").notices == ()


def test_the_device_is_looked_up_once() -> None:
    run = resolved({}, accelerator=" CPU")
    assert run.device is run.device
    assert run.device == torch.device("cpu")


def test_a_group_of_somebody_elses_gives_the_place() -> None:
    one_node = topology_of_group({}, 1, 2)
    assert (one_node.local_rank, one_node.local_world_size, one_node.num_nodes) == (1, 2, 1)
    assert one_node.is_managed
    two_nodes = topology_of_group({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 3, 4)
    assert (two_nodes.local_rank, two_nodes.node_rank, two_nodes.num_nodes) == (1, 1, 2)
    with pytest.raises(LaunchError, match="a process group that exists already do not fit together"):
        topology_of_group({"LOCAL_RANK": "5"}, 1, 2)


def test_a_rank_runs_on_what_it_was_given_alone_and_another_device_asked_for_is_an_error() -> None:
    config = RunConfig(only_accelerator="cpu")
    for asked in ("auto", " CPU ", Accelerator("cpu")):
        run = resolved({}, config, accelerator=asked)
        assert (run.accelerator.device_type, run.notices) == ("cpu", ())
    for asked in ("GPU", Accelerator("cuda")):
        with pytest.raises(FabricValueError, match=r"accelerator=.*(gpu|cuda).*, and resources for 'cpu' alone"):
            resolved({}, config, accelerator=asked)
    with pytest.raises(FabricValueError, match=r"accelerator='gpu'"):
        resolved({}, RunConfig(only_accelerator="cpu", accelerator="gpu"))
