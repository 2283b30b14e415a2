"""Devices: what is asked for, what is there, and a run on an accelerator that is simulated.

No accelerator is needed: a process of its own registers a device named ``simdev`` with torch, whose tensors are fake.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_lite import Fabric, FabricRuntimeError, FabricValueError
from fabric_lite.device import Accelerator, choose_accelerator, parse_devices
from fabric_lite.mesh import backend_for
from fabric_lite.topology import Topology

CPU = Accelerator("cpu")


@pytest.mark.parametrize(
    ("devices", "indices"),
    [
        (1, (0,)),
        (3, (0, 1, 2)),
        ("3", (0, 1, 2)),
        ([0, 2], (0, 2)),
        ("0,2", (0, 2)),
        ("auto", (0,)),
        (-1, (0,)),
        ("-1", (0,)),
    ],
)
def test_devices_are_counts_lists_or_text(devices: object, indices: tuple[int, ...]) -> None:
    assert parse_devices(devices, CPU) == indices  # type: ignore[arg-type]


def test_auto_is_cpu_where_there_is_no_accelerator() -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    assert choose_accelerator("auto") == CPU
    assert CPU.device(3) == torch.device("cpu")
    assert Accelerator("cuda").device(1) == torch.device("cuda", 1)
    assert Accelerator("mps").device(1) == torch.device("mps")
    assert not Accelerator("cuda").is_available()


def test_a_topology_knows_whether_a_launcher_made_it() -> None:
    assert not Topology().is_managed
    assert Topology(source="Slurm (srun)").is_managed


SIMULATED_DEVICE = """
import types, torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

class Stream:
    def __init__(self, *a, **k): self.device = torch.device("simdev", 0)
    def wait_stream(self, other): pass
class Module(types.ModuleType):
    calls = []
    current = 0
    def is_available(self): return True
    def is_initialized(self): return True
    def device_count(self): return 4
    def current_device(self): return Module.current
    def set_device(self, device): Module.current = device if isinstance(device, int) else device.index
    def _is_in_bad_fork(self): return False
    def manual_seed_all(self, seed): Module.calls.append(("manual_seed_all", seed))
    def get_rng_state(self, device=None): return torch.arange(4, dtype=torch.uint8)
    def set_rng_state(self, state, device=None): Module.calls.append(("set_rng_state", state.tolist()))
    def get_amp_supported_dtype(self): return [torch.bfloat16, torch.float16]
    Stream = Stream
backend = Module("simdev")
_setup_privateuseone_for_python_backend("simdev", backend_module=backend)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch import nn
from fabric_lite import Fabric
"""


def on_a_simulated_device(code: str) -> str:
    """Run ``code`` in a process where torch has four devices of a kind that the library has never heard of."""
    script = SIMULATED_DEVICE + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_auto_takes_the_accelerator_and_all_of_its_devices() -> None:
    output = on_a_simulated_device("""
        fabric = Fabric()
        print(fabric.accelerator.device_type, fabric.world_size, fabric.strategy.__class__.__name__, fabric.device)
        one = Fabric(devices=[2])
        print(one.device, one.world_size)
        for wrong in (5, [4]):
            try:
                Fabric(devices=wrong)
            except ValueError as error:
                print(str(error).splitlines()[1])
        print(Fabric(accelerator="cpu").device)
    """)
    assert output.splitlines() == [
        "simdev 4 DDPStrategy simdev:0",
        "simdev:2 1",
        "  Given: devices=5, and 4 of type simdev",
        "  Given: devices=[4], and 4 of type simdev",
        "cpu",
    ]


def test_a_training_step_has_every_tensor_and_optimizer_state_on_the_accelerator() -> None:
    output = on_a_simulated_device("""
        fabric = Fabric(devices=[0])
        with FakeTensorMode():
            with fabric.init_module():
                model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            model, optimizer = fabric.setup(model, optimizer)
            with fabric.init_tensor():
                x = torch.ones(2, 4)
            loss = model(x).mean()
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
            optimizer.step()
            tensors = [x, loss, *model.parameters(), *(p.grad for p in model.parameters())]
            tensors += [v for s in optimizer.state.values() for v in s.values() if v.dim()]
            print({str(tensor.device) for tensor in tensors}, len(tensors))
            moved = fabric.to_device({"a": torch.ones(2, device="cpu"), "b": [torch.ones(1, device="cpu")]})
            print(moved["a"].device, moved["b"][0].device)
            try:
                model(torch.ones(2, 4, device="cpu"))
            except RuntimeError as error:
                print("two devices" in str(error))
    """)
    assert output.splitlines() == ["{'simdev:0'} 18", "simdev:0 simdev:0", "True"]


def test_autocast_is_entered_for_the_accelerators_own_type() -> None:
    output = on_a_simulated_device("""
        fabric = Fabric(devices=[0], precision="bf16-mixed")
        seen = []
        class Looks(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(1, device="simdev"))
            def forward(self, x):
                seen.append([torch.is_autocast_enabled(kind) for kind in ("simdev", "cpu")])
                seen.append(torch.get_autocast_dtype("simdev"))
                return x
        with FakeTensorMode():
            fabric.setup(Looks())(None)
        print(seen)
        with fabric.autocast():
            print(torch.is_autocast_enabled("simdev"))
    """)
    assert output.splitlines() == ["[[True, False], torch.bfloat16]", "True"]


def test_seeding_and_random_state_reach_the_accelerator() -> None:
    output = on_a_simulated_device("""
        fabric = Fabric(devices=[0])
        fabric.seed_everything(7)
        print(("manual_seed_all", 7) in Module.calls)
        state = fabric.state_dict()
        Module.calls.clear()
        fabric.load_state_dict(state)
        print(any(name == "set_rng_state" for name, _ in Module.calls))
    """)
    assert output.splitlines() == ["True", "True"]


def test_the_group_of_an_accelerator_also_carries_what_is_in_the_hosts_memory() -> None:
    assert backend_for(torch.device("cpu")) == "gloo"
    assert backend_for(torch.device("cuda", 1)) == "cpu:gloo,cuda:nccl"


def present(monkeypatch: pytest.MonkeyPatch, kind: str, count: int = 1) -> None:
    """Let torch say that devices of this kind are here; none is used."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"precision": "64-true"}, "mps has no float64"),
        ({"strategy": "fsdp"}, "a strategy that shards"),
        ({"devices": 2}, "devices=2, and 1 of type mps"),
    ],
)
def test_what_mps_can_not_do_is_said_when_the_fabric_is_made(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], said: str
) -> None:
    present(monkeypatch, "mps")
    with pytest.raises(FabricValueError, match=said):
        Fabric(**arguments)


def test_ranks_that_a_launcher_started_can_not_share_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, "mps")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FabricValueError, match="mps has one device and no communication"):
        Fabric()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "16-true", "bf16-true"])
def test_mps_takes_every_other_precision_and_has_no_index(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    present(monkeypatch, "mps")
    fabric = Fabric(precision=precision)
    assert fabric.device == torch.device("mps")
    assert fabric.world_size == 1


@pytest.mark.parametrize(
    ("has_float64", "precision", "said"),
    [
        (False, "64-true", "xpu:0 has no float64"),
        (False, "16-mixed", "in which torch scales the loss"),
        (False, "bf16-mixed", None),
        (True, "64-true", None),
        (True, "16-mixed", None),
    ],
)
def test_an_xpu_has_float64_if_it_says_so(
    monkeypatch: pytest.MonkeyPatch, has_float64: bool, precision: str, said: str | None
) -> None:
    present(monkeypatch, "xpu", 2)
    monkeypatch.setattr(torch.xpu, "get_device_capability", lambda _: {"has_fp64": has_float64})
    if said is None:
        assert Fabric(devices=1, precision=precision).device == torch.device("xpu", 0)
        return
    with pytest.raises(FabricValueError, match=said):
        Fabric(devices=1, precision=precision)


def test_a_cuda_device_without_bfloat16_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(FabricValueError, match="no autocast to bfloat16"):
        Fabric(precision="bf16-mixed")


def test_a_run_on_a_device_like_mps_makes_no_double_there_and_copies_in_order() -> None:
    output = on_a_simulated_device("""
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves
        from torch.utils.data import DataLoader, TensorDataset
        from fabric_lite import device
        device.KINDS["simdev"] = device.KINDS["mps"]

        class LikeMetal(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                kwargs = kwargs or {}
                result = func(*args, **kwargs)
                for leaf in tree_leaves(result):
                    if isinstance(leaf, torch.Tensor) and leaf.device.type == "simdev":
                        seen.append(str(func))
                        assert leaf.dtype not in (torch.float64, torch.complex128), func
                        assert not kwargs.get("non_blocking"), func
                return result

        seen = []
        fabric = Fabric(devices=1)
        print(fabric.device, fabric.world_size)
        with FakeTensorMode(), LikeMetal():
            with fabric.init_module():
                model = nn.Linear(4, 1)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            model, optimizer = fabric.setup(model, optimizer, move_to_device=False)  # fakes can't be swapped
            for x in (torch.ones(2, 4, device="cpu"), torch.ones(2, 4, device="cpu")):
                x = fabric.to_device({"x": x})["x"]
                loss = model(x).mean()
                (loss * 2).backward()
                fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
            doubles, whole = (torch.ones(2, dtype=dtype, device="cpu") for dtype in (torch.float64, torch.int64))
            means = [fabric.all_reduce(value) for value in (doubles, whole)]
            print([mean.dtype for mean in means], {mean.device.type for mean in means})
            try:
                torch.ones(1, dtype=torch.float64, device="simdev")
            except AssertionError:
                print("refused")
        print(len(seen) > 20)
    """)
    lines = output.splitlines()
    assert lines == ["simdev 1", "[torch.float32, torch.float32] {'simdev'}", "refused", "True"]


def test_a_tpu_says_what_it_needs() -> None:
    with pytest.raises(
        FabricRuntimeError, match=r"torch 2\.9 alone[\s\S]*torch-xla is not installed[\s\S]*torch==2\.9"
    ):
        Fabric(accelerator="tpu")


def test_a_torch_xla_that_fits_another_torch_is_said(tmp_path: Path) -> None:
    package = tmp_path / "torch_xla"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('undefined symbol: deleteNode')")
    code = """
import importlib.util, sys
from fabric_lite import Fabric
try:
    Fabric(accelerator="tpu")
except RuntimeError as error:
    print(error)
Fabric(accelerator="cpu")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path.cwd())])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "torch-xla cannot be imported: undefined symbol: deleteNode" in done.stdout


def test_strategies_of_other_devices_are_refused() -> None:
    for strategy in ("xla", "xla_spmd"):
        with pytest.raises(FabricValueError, match="XLAStrategy is for xla, accelerator 'cpu'"):
            Fabric(accelerator="cpu", devices=1, strategy=strategy)
