"""Every name that public programs import from Lightning Fabric is there, under its sub-path, and does what it says."""

from __future__ import annotations

import ast
import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_lite import Fabric, FabricError, FSDPStrategy
from fabric_lite.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator, MPSAccelerator, XLAAccelerator
from fabric_lite.errors import FabricImportError, FabricValueError
from fabric_lite.plugins import BitsandbytesPrecision, DoublePrecision, HalfPrecision, MixedPrecision, Precision
from fabric_lite.plugins.collectives import TorchCollective
from fabric_lite.strategies import DeepSpeedStrategy, XLAStrategy
from fabric_lite.utilities import is_shared_filesystem, move_data_to_device, suggested_max_num_workers
from fabric_lite.utilities.cloud_io import get_filesystem
from fabric_lite.utilities.init import _materialize_meta_tensors
from fabric_lite.utilities.load import _lazy_load, _NotYetLoadedTensor
from fabric_lite.utilities.types import _PATH, LRScheduler, Optimizable
from fabric_lite.wrappers import _FabricDataLoader, _FabricModule, _FabricOptimizer, _unwrap_objects

# Counted over ten public programs.
NAMES = {
    "": ["Fabric", "seed_everything", "is_wrapped"],
    "strategies": [
        "FSDPStrategy", "DDPStrategy", "ModelParallelStrategy", "SingleDeviceStrategy", "Strategy",
        "DeepSpeedStrategy", "XLAStrategy", "STRATEGY_REGISTRY",
    ],
    "loggers": ["CSVLogger", "TensorBoardLogger", "Logger"],
    "loggers.logger": ["Logger", "rank_zero_experiment"],
    "plugins": [
        "Precision", "MixedPrecision", "HalfPrecision", "DoublePrecision", "BitsandbytesPrecision", "CheckpointIO",
    ],
    "plugins.environments": ["ClusterEnvironment"],
    "plugins.collectives": ["TorchCollective"],
    "accelerators": ["Accelerator", "CPUAccelerator", "CUDAAccelerator", "MPSAccelerator", "XLAAccelerator"],
    "utilities": [
        "ThroughputMonitor", "Throughput", "measure_flops", "rank_zero_only", "rank_zero_warn", "rank_zero_info",
        "move_data_to_device", "is_shared_filesystem", "suggested_max_num_workers", "AttributeDict",
    ],
    "utilities.throughput": ["ThroughputMonitor", "Throughput", "measure_flops"],
    "utilities.rank_zero": ["rank_zero_only", "rank_zero_warn", "rank_zero_info"],
    "utilities.seed": ["reset_seed", "seed_everything"],
    "utilities.types": ["LRScheduler", "Optimizable", "_PATH"],
    "utilities.distributed": ["ReduceOp"],
    "utilities.cloud_io": ["get_filesystem"],
    "utilities.init": ["_materialize_meta_tensors"],
    "utilities.load": ["_lazy_load", "_NotYetLoadedTensor"],
    "wrappers": ["_FabricModule", "_FabricOptimizer", "_FabricDataLoader", "_unwrap_objects"],
}  # fmt: skip


@pytest.mark.parametrize("path", NAMES)
def test_names_are_under_the_same_sub_paths(path: str) -> None:
    module = importlib.import_module(f"fabric_lite.{path}" if path else "fabric_lite")
    assert [name for name in NAMES[path] if not hasattr(module, name)] == []
    assert set(NAMES[path]) <= set(module.__all__)


def test_importing_them_all_loads_nothing_heavy() -> None:
    imports = "; ".join(f"import fabric_lite.{path}" for path in NAMES if path)
    code = (
        f"import sys, torch, numpy; before = set(sys.modules); {imports}; print([m for m in set(sys.modules) - before"
    )
    code += " if m.split('.')[0] not in ('fabric_lite', 'torch') and m.split('.')[0] not in sys.stdlib_module_names])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [name for name in ast.literal_eval(output) if not name.startswith("_sysconfigdata")] == []
    heavy = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; {imports}; print([m for m in ('torch._dynamo', 'sympy') if m in sys.modules])",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert heavy == "[]\n"


def cpu(**arguments: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, **arguments)


def test_what_was_set_up_is_an_instance_and_itself() -> None:
    fabric = cpu()
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.ones(4, 2)))
    kinds = [(model, _FabricModule), (optimizer, _FabricOptimizer), (loader, _FabricDataLoader)]
    assert not any(isinstance(one, kind) for one, kind in kinds)
    fabric.setup(model, optimizer)
    fabric.setup_dataloaders(loader)
    assert [[isinstance(one, kind) for _, kind in kinds] for one, _ in kinds] == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]
    state = {"model": model, "optimizer": optimizer}
    assert _unwrap_objects(state) is state
    assert model.module is model


@pytest.mark.parametrize(
    ("made", "name", "kind"),
    [
        (MixedPrecision("16-mixed", "cuda"), "16-mixed", MixedPrecision),
        (MixedPrecision("bf16-mixed", device="cpu"), "bf16-mixed", MixedPrecision),
        (HalfPrecision("bf16-true"), "bf16-true", HalfPrecision),
        (HalfPrecision(), "16-true", HalfPrecision),
        (DoublePrecision(), "64-true", DoublePrecision),
    ],
    ids=str,
)
def test_precisions_by_their_classes_are_plugins(made: Any, name: str, kind: type) -> None:
    fabric = cpu(plugins=made)
    assert fabric.precision.name == name
    kinds = (MixedPrecision, HalfPrecision, DoublePrecision, BitsandbytesPrecision)
    assert [one for one in kinds if isinstance(fabric.strategy.precision, one)] == [kind]
    assert isinstance(made, Precision)
    assert not isinstance(cpu().strategy.precision, kinds)


def test_what_there_is_not_says_so_when_it_is_used() -> None:
    with pytest.raises(FabricValueError, match="16-mixed or bf16-mixed"):
        MixedPrecision("16-true", "cuda")
    assert not isinstance(FSDPStrategy(), (DeepSpeedStrategy, XLAStrategy))


def test_accelerators_by_their_classes() -> None:
    assert CPUAccelerator.is_available()
    assert CPUAccelerator.auto_device_count() == 1
    assert isinstance(cpu().accelerator, CPUAccelerator)
    assert isinstance(cpu().accelerator, Accelerator)
    assert Fabric(accelerator=CPUAccelerator(), devices=1).device.type == "cpu"
    if not CUDAAccelerator.is_available():
        with pytest.raises(RuntimeError, match="present: cpu"):
            Fabric(accelerator=CUDAAccelerator())
    for absent in (CUDAAccelerator, MPSAccelerator, XLAAccelerator):
        if not absent.is_available():
            assert absent.auto_device_count() == 0
        assert not isinstance(cpu().accelerator, absent)


def test_meta_tensors_get_memory_and_values() -> None:
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.LayerNorm(2))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.LayerNorm(2))
    torch.manual_seed(0)
    _materialize_meta_tensors(model, torch.device("cpu"))
    assert all(
        torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True)
    )

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2, device="meta"))

    with pytest.raises(TypeError, match="Own without such a method"):
        _materialize_meta_tensors(Own(), torch.device("cpu"))


@pytest.mark.parametrize("saver", ["torch", "fabric"])
def test_tensors_are_read_when_they_are_used(tmp_path: Path, saver: str) -> None:
    state = {"model": {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}, "step": 3, "list": [1, None]}
    if saver == "torch":
        torch.save(state, tmp_path / "a.ckpt")
    else:
        cpu().save(tmp_path / "a.ckpt", state)
    lazy = _lazy_load(tmp_path / "a.ckpt")
    weight = lazy["model"]["weight"]
    assert isinstance(weight, _NotYetLoadedTensor)
    assert (weight.shape, weight.dtype, lazy["step"], lazy["list"]) == (torch.Size([2, 3]), torch.float32, 3, [1, None])
    assert torch.equal(weight._load_tensor(), state["model"]["weight"])
    assert torch.equal(torch.add(weight, lazy["model"]["bias"][:, None]), torch.arange(6.0).reshape(2, 3) + 1)
    assert weight.sum() == 15
    assert torch.cat([weight, weight]).shape == (4, 3)
    assert (len(weight), weight[1].tolist()) == (2, [3.0, 4.0, 5.0])
    assert torch.equal(copy.deepcopy(weight)._load_tensor(), weight._load_tensor())
    with pytest.raises(FabricError):
        _lazy_load(tmp_path / "absent.ckpt")


def test_helpers_do_what_they_say(tmp_path: Path) -> None:
    assert suggested_max_num_workers(1) == max(1, len(os.sched_getaffinity(0)) - 1)
    assert suggested_max_num_workers(1000) == 1
    assert is_shared_filesystem(None, tmp_path)
    moved = move_data_to_device({"a": [torch.ones(1)], "b": 2}, torch.device("meta"))
    assert (moved["a"][0].device.type, moved["b"]) == ("meta", 2)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    assert isinstance(optimizer, Optimizable)
    assert isinstance(torch.optim.lr_scheduler.ConstantLR(optimizer), LRScheduler)
    assert isinstance(Path("path"), _PATH)


def test_file_systems_of_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec", reason="the extra fabric-lite[remote]")
    assert "file" in get_filesystem(tmp_path).protocol
    assert "memory" in get_filesystem("memory://a").protocol
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(FabricImportError, match="fabric-lite\\[remote\\]"):
        get_filesystem("s3://bucket/a")


def test_a_collective_without_processes_says_what_is_missing() -> None:
    with pytest.raises(FabricError, match="not connected"):
        _ = TorchCollective().rank
