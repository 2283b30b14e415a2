"""Ray Train's own trainer around a Fabric: ``python -m tests.clusters.ray_train_program ADDRESS FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from fabric_lite import Fabric
from tests.clusters import ray_programs


def train(config: dict[str, Any]) -> None:
    fabric = Fabric(strategy="ddp")
    fabric.launch()
    found = ray_programs.train(fabric) | {"world_size": fabric.world_size}
    fabric.close()
    found["group_is_left"] = torch.distributed.is_initialized()
    if fabric.global_rank == 0:
        torch.save(found, Path(config["folder"]) / "found.pt")


if __name__ == "__main__":
    ray.init(address=sys.argv[1])
    TorchTrainer(
        train,
        train_loop_config={"folder": sys.argv[2]},
        scaling_config=ScalingConfig(num_workers=2),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(storage_path=sys.argv[2]),
    ).fit()
