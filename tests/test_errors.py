"""Every misuse gives the stated type and a message in three parts, and leaves nothing half done."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import fabric_lite.errors
from fabric_lite import DDPStrategy, Fabric, FabricError, Precision, SingleDeviceStrategy
from fabric_lite.run import Arguments, resolve
from fabric_lite.run_config import RunConfig
from tests.models import Net, make_net

TORCHRUN = {
    "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


def cpu(**arguments: Any) -> Fabric:
    return Fabric(**{"accelerator": "cpu", "devices": 1, **arguments})


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)


def twice(*objects: Any) -> None:
    fabric = cpu()
    fabric.setup(*objects)
    fabric.setup(*objects)


def under(environ: dict[str, str], config: RunConfig | None = None, **arguments: Any) -> None:
    resolve(Arguments(**{"accelerator": "cpu", **arguments}), None, config, environ)


class Endless(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(range(3))


# What is done wrong, the built-in type that it is, and what the message must name.
ROWS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("unknown accelerator", lambda: Fabric(accelerator="quantum"), ValueError, "auto, cpu, cuda, gpu, mps, tpu, xpu"),
    ("absent accelerator", lambda: Fabric(accelerator="cuda"), RuntimeError, "present: cpu"),
    ("absent gpu", lambda: Fabric(accelerator="gpu"), RuntimeError, "present: cpu"),
    ("absent mps", lambda: Fabric(accelerator="mps"), RuntimeError, "present: cpu"),
    ("tpu", lambda: Fabric(accelerator="tpu"), RuntimeError, "torch-xla"),
    ("unknown strategy", lambda: cpu(strategy="magic"), ValueError, "ddp_spawn"),
    ("dp is gone", lambda: cpu(strategy="DP"), ValueError, "strategy='ddp'"),
    ("strategy of a wrong type", lambda: cpu(strategy=3), TypeError, "DDPStrategy"),
    ("one device for two", lambda: cpu(strategy="single_device", devices=2), ValueError, "strategy='ddp'"),
    ("no device", lambda: cpu(devices=0), ValueError, "devices=0"),
    ("fewer than none", lambda: cpu(devices=-2), ValueError, "devices=-2"),
    ("an empty list", lambda: cpu(devices=[]), ValueError, "devices=[]"),
    ("the same device twice", lambda: cpu(devices=[1, 1]), ValueError, "devices=[1, 1]"),
    ("devices as words", lambda: cpu(devices="two"), ValueError, "devices='two'"),
    ("devices as a float", lambda: cpu(devices=2.0), TypeError, "devices=2.0"),
    ("devices as a bool", lambda: cpu(devices=True), TypeError, "devices=True"),
    ("devices as a list of words", lambda: cpu(devices=["0"]), TypeError, "indices"),
    ("a hang limit below nothing", lambda: cpu(hang_timeout=-1), ValueError, "hang_timeout=600"),
    ("a hang limit in words", lambda: cpu(hang_timeout="1 hour"), TypeError, "hang_timeout='1 hour'"),
    ("no node", lambda: cpu(num_nodes=0), ValueError, "num_nodes=0"),
    ("half a node", lambda: cpu(num_nodes=1.5), TypeError, "num_nodes=1.5"),
    ("nodes without a launcher", lambda: cpu(num_nodes=2), RuntimeError, "fabric-run --num-nodes"),
    ("unknown precision", lambda: cpu(precision="8-bit"), ValueError, "bf16-mixed"),
    ("unknown number of bits", lambda: cpu(precision=8), ValueError, "bf16-mixed"),
    ("precision of a wrong type", lambda: cpu(precision=1.5), TypeError, "bf16-mixed"),
    ("precision set twice", lambda: cpu(precision=32, plugins="bf16-mixed"), ValueError, "choose one"),
    ("two precisions", lambda: cpu(plugins=[Precision("a"), Precision("b")]), ValueError, "choose one"),
    ("unknown plugin", lambda: cpu(plugins=[object()]), TypeError, "a Precision"),
    ("unknown communication hook", lambda: DDPStrategy(communication_hook="zip"), ValueError, "powersgd"),
    ("hook of a wrong type", lambda: DDPStrategy(communication_hook=3), TypeError, "hook(state, bucket)"),  # type: ignore[arg-type]
    ("unknown start method", lambda: DDPStrategy(start_method="clone"), ValueError, "spawn"),
    ("other than what torchrun started", lambda: under(TORCHRUN, devices=4), RuntimeError, "fabric-run --devices 4"),
    ("other nodes than started", lambda: under(TORCHRUN, num_nodes=3), RuntimeError, "num_nodes=3"),
    ("a rank beyond the world", lambda: under({**TORCHRUN, "RANK": "7"}), RuntimeError, "rank 7 of 2"),
    ("a rank that is no number", lambda: under({**TORCHRUN, "RANK": "x"}), RuntimeError, "RANK='x'"),
    ("Slurm's batch shell", lambda: under({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}), RuntimeError, "srun python"),
    ("launch of no function", lambda: cpu().launch("train"), TypeError, "launch(train)"),
    ("launch of a function without fabric", lambda: cpu().launch(lambda: 1), TypeError, "parameter for fabric"),
    ("setup of no module", lambda: cpu().setup("model"), TypeError, "fabric.setup(model, optimizer)"),
    ("setup of a module as optimizer", lambda: cpu().setup(Net(), Net()), TypeError, "no Optimizer"),
    ("another model's optimizer", lambda: cpu().setup(Net(), optimizer()), ValueError, "setup_optimizers(optimizer)"),
    ("backward of no tensor", lambda: cpu().backward("loss"), TypeError, "fabric.backward(loss)"),  # type: ignore[arg-type]
    ("clipping without an optimizer", lambda: cpu().clip_gradients(Net(), Net(), 1.0), TypeError, "max_norm=1.0"),  # type: ignore[arg-type]
    ("unknown DDP option", lambda: DDPStrategy(ddp_options={"nonsense": 1}), ValueError, "init_sync"),
    ("released twice", lambda: [run.release(m, m) for run in [cpu()] for m in [run.setup(Net())]], ValueError, "once"),
    ("closed", lambda: [run.close() or run.barrier() for run in [cpu()]], RuntimeError, "make a new"),
    ("setup twice", lambda: twice(Net()), ValueError, "fabric.release"),
    ("optimizer set up twice", lambda: cpu().setup_optimizers(*[optimizer()] * 2), ValueError, "twice"),
    ("no optimizer", lambda: cpu().setup_optimizers(), ValueError, "setup_optimizers(optimizer)"),
    ("no loader", lambda: cpu().setup_dataloaders(), ValueError, "setup_dataloaders(loader)"),
    ("loader not iterable", lambda: cpu().setup_dataloaders(3), TypeError, "iterable"),
    ("loader set up twice", lambda: [cpu().setup_dataloaders(x, x) for x in [DataLoader([1])]], ValueError, "set up"),
    ("unknown uneven", lambda: cpu().setup_dataloaders(DataLoader([1]), uneven="pad"), ValueError, "stop"),
    ("unknown length", lambda: cpu().setup_dataloaders(DataLoader(Endless()), pad=False), ValueError, "Iterable"),
    ("no way to clip", lambda: cpu().clip_gradients(Net(), optimizer()), ValueError, "exactly one"),
    ("two ways to clip", lambda: cpu().clip_gradients(Net(), optimizer(), 1.0, 1.0), ValueError, "exactly one"),
    ("no_backward_sync of a raw model", lambda: cpu().no_backward_sync(Net()).__enter__(), TypeError, "setup"),
    ("unknown reduction", lambda: cpu().all_reduce(1, reduce_op="mode"), ValueError, "product"),
    ("gathering text", lambda: cpu().all_gather("text"), ValueError, "fabric.broadcast"),
    ("broadcast from nowhere", lambda: cpu().broadcast(1, src=1), ValueError, "src=1"),
    ("a missing file", lambda: cpu().load("/nowhere/x.ckpt"), FileNotFoundError, "/nowhere/x.ckpt"),
    ("a filter that is no dict", lambda: cpu().save("x", {}, filter=len), TypeError, "filter"),  # type: ignore[arg-type]
    ("a filter of no function", lambda: cpu().save("x", {"a": 1}, filter={"a": 1}), TypeError, "filter"),  # type: ignore[dict-item]
    ("a filter for nothing", lambda: cpu().save("x", {}, filter={"b": lambda *_: True}), ValueError, "b"),
    ("seed below zero", lambda: cpu().seed_everything(-1), ValueError, "-1"),
    ("release of a raw model", lambda: cpu().release(Net()), ValueError, "set up"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "named"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_misuse_says_what_was_given_and_what_to_do(
    call: Callable[[], Any], kind: type[Exception], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    assert isinstance(error, FabricError), f"{type(error).__name__} is not an error of fabric_lite: {error}"
    assert named in str(error)
    lines = str(error).splitlines()
    assert lines[0].endswith((".", ":")) or "Given:" in str(error)
    assert "  Try: " in str(error), str(error)
    assert not list(tmp_path.iterdir()), "something was half done"


def test_there_are_at_least_forty_rows() -> None:
    assert len(ROWS) >= 40


def test_a_failed_setup_leaves_the_objects_plain() -> None:
    fabric = cpu()
    model, taken = make_net(), optimizer()
    fabric.setup_optimizers(taken)
    with pytest.raises(ValueError, match="set up already"):
        fabric.setup(model, taken)
    assert type(model) is Net
    with pytest.raises(TypeError, match="no Optimizer"):
        fabric.setup(model, optimizer(), "scheduler")  # type: ignore[arg-type]
    assert type(model) is Net
    fabric.setup(model)


@pytest.mark.parametrize("name", fabric_lite.errors.__all__)
def test_errors_pickle_and_read_the_same(name: str) -> None:
    kind = getattr(fabric_lite.errors, name)
    error = kind("What went wrong.", given="x=1", fix="x=2")
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is kind
    assert str(other) == str(error) == "What went wrong.\n  Given: x=1\n  Try: x=2"


def test_strategies_compare_by_their_options() -> None:
    assert DDPStrategy(static_graph=True) == DDPStrategy(static_graph=True) != DDPStrategy()
    assert SingleDeviceStrategy() == SingleDeviceStrategy()
