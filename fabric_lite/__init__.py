"""Your loop, any hardware, nothing in between.

    from fabric_lite import Fabric

    fabric = Fabric()
    fabric.launch()
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(loader)
    ...
    fabric.backward(loss)

Names load on first use, so that ``fabric-run --help`` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fabric_lite.adopt import is_wrapped, plain
    from fabric_lite.attribute_dict import AttributeDict
    from fabric_lite.checkpoint import SaveHandle
    from fabric_lite.checkpoints import Checkpoints
    from fabric_lite.errors import (
        CheckpointDamagedError,
        CheckpointError,
        CollectiveError,
        FabricError,
        FabricImportError,
        FabricKeyError,
        FabricRuntimeError,
        FabricTypeError,
        FabricValueError,
        LaunchError,
        StrategyError,
    )
    from fabric_lite.fabric import Fabric
    from fabric_lite.flops import measure_flops
    from fabric_lite.precision import Precision
    from fabric_lite.profiling import profile
    from fabric_lite.run_config import EXIT_PREEMPTED
    from fabric_lite.seed import seed_everything
    from fabric_lite.strategies import (
        DDPStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        SingleDeviceStrategy,
        Strategy,
    )
    from fabric_lite.throughput import Throughput, ThroughputMonitor

__version__ = "0.1.0"

_HOMES = {
    "AttributeDict": "attribute_dict",
    "CheckpointDamagedError": "errors",
    "CheckpointError": "errors",
    "Checkpoints": "checkpoints",
    "CollectiveError": "errors",
    "DDPStrategy": "strategies",
    "EXIT_PREEMPTED": "run_config",
    "FSDPStrategy": "strategies",
    "ModelParallelStrategy": "strategies",
    "Fabric": "fabric",
    "FabricError": "errors",
    "FabricImportError": "errors",
    "FabricKeyError": "errors",
    "FabricRuntimeError": "errors",
    "FabricTypeError": "errors",
    "FabricValueError": "errors",
    "LaunchError": "errors",
    "Precision": "precision",
    "SaveHandle": "checkpoint",
    "SingleDeviceStrategy": "strategies",
    "Strategy": "strategies",
    "StrategyError": "errors",
    "Throughput": "throughput",
    "ThroughputMonitor": "throughput",
    "is_wrapped": "adopt",
    "measure_flops": "flops",
    "plain": "adopt",
    "profile": "profiling",
    "seed_everything": "seed",
}

__all__ = [  # noqa: RUF022 - the order of a first reading
    "Fabric",
    "seed_everything",
    "is_wrapped",
    "plain",
    "AttributeDict",
    "Precision",
    "Checkpoints",
    "EXIT_PREEMPTED",
    "Strategy",
    "SingleDeviceStrategy",
    "DDPStrategy",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "SaveHandle",
    "Throughput",
    "ThroughputMonitor",
    "measure_flops",
    "profile",
    "FabricError",
    "FabricImportError",
    "FabricKeyError",
    "FabricRuntimeError",
    "FabricTypeError",
    "FabricValueError",
    "CheckpointError",
    "CheckpointDamagedError",
    "CollectiveError",
    "LaunchError",
    "StrategyError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fabric_lite' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fabric_lite.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
