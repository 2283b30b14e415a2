"""Simulating one rank of a large job: what is tracked, what a fake tensor answers, what is said of a device."""

from __future__ import annotations

import copy
import doctest
import math
import os
import select
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fabric_lite.bench import devices
from fabric_lite.bench.devices import DEVICES, estimate_step, find_device
from fabric_lite.bench.faking import Faking
from fabric_lite.bench.simulation import SimulationError, simulate
from fabric_lite.bench.simulation_table import Cluster, parse_cluster
from fabric_lite.bench.steps import Step
from fabric_lite.bench.tracking import Tracker
from fabric_lite.errors import FabricValueError

EXAMPLES = Path(__file__).parent.parent.parent / "examples"

# 67 M parameters in 4 equal layers: with gradients and Adam's state 1.07 GB on one device, parameters alone 0.27 GB.
SCRIPT = """
import sys
import torch
from pathlib import Path
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fabric_lite import Fabric

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4096, 4096), nn.LayerNorm(4096)
    def forward(self, x):
        return x + torch.relu(self.norm(self.linear(x)))

class Log:
    def log_metrics(self, metrics, step):
        Path("logged").touch()

if __name__ == "__main__":
    fabric = Fabric(loggers=Log())
    fabric.launch()
    model = nn.Sequential(*[Layer() for _ in range(4)])
    optimizer = torch.optim.Adam(model.parameters())
    samples = 16 * 64 * 4
    data = TensorDataset(torch.randn(samples, 8), torch.randn(samples))
    loader = DataLoader(data, 16, num_workers=0)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(loader)
    for x, y in loader:
        loss = (model(x.repeat(1, 512)).mean(1) - y).pow(2).mean()
        if not torch.isfinite(loss) or torch.isnan(loss).any():
            raise RuntimeError("the loss is not finite")
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        fabric.log("loss", loss)
        fabric.save("checkpoint.pt", {"model": model})
        torch.save({}, "plain.pt")
        if "--fail" in sys.argv:
            raise ValueError("of the script's own")
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return str(path)


def test_bytes_alive_are_those_of_storages_and_the_peak_stays() -> None:
    with Tracker() as tracker:
        whole = torch.ones(1000)
        view = whole[:10].view(2, 5)
        assert tracker.current == 4000
        double = whole.double()
        assert tracker.current == 12000
        del whole, double
        assert tracker.current == 4000  # the view keeps it
        del view
        assert tracker.current == 0
    assert tracker.peak == sum(tracker.peak_parts().values()) == 12000


def test_parts_at_the_peak_are_told_from_what_becomes_of_tensors_later() -> None:
    with Tracker() as tracker:
        model = nn.Linear(100, 100, bias=False)
        optimizer = torch.optim.Adam(model.parameters(), foreach=False)
        model(torch.ones(1, 100)).sum().backward()
        optimizer.step()
        parts = tracker.current_parts()
    assert parts["parameters"] == parts["gradients"] == 40_000
    assert parts["optimizer"] == 2 * 40_000 + 4  # two moments, and the number of the step
    assert tracker.peak_parts()["optimizer"] > parts["optimizer"]  # what the step makes for a moment


def test_a_storage_that_is_resized_counts_with_its_new_size() -> None:
    with Tracker() as tracker:
        tensor = torch.ones(1000)
        tensor.untyped_storage().resize_(0)
        _ = tensor.shape
        tensor.resize_(0)  # the first operator that sees it
        assert tracker.current == 0


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_fake_tensor_is_full_of_ones(shape: tuple[int, ...]) -> None:
    with Faking():
        x = nn.Linear(4, 4)(torch.zeros(4)).sum().expand(shape).max()
        assert x.item() == 1.0
        assert math.log(x.item()) == 0
        assert torch.isfinite(x).all()
        assert not torch.isnan(x).any()
        assert x == x.detach() + 0
        assert not x > 1
        assert int(x.detach().long()) == 1


def test_a_fake_tensor_is_formatted_and_becomes_an_array_as_a_real_one_of_ones() -> None:
    with Faking():
        x = nn.Linear(4, 3)(torch.zeros(2, 4))
        assert f"{x.sum():.3f}" == "1.000"
        with pytest.raises(TypeError, match="unsupported format string"):
            f"{x:.3f}"
        with pytest.raises(RuntimeError, match="requires grad"):
            x.numpy()
        for array in (x.detach().numpy(), x.numpy(force=True), np.asarray(x.detach())):
            assert array.tolist() == [[1.0] * 3] * 2
            assert array.dtype == np.float32
        assert x.argmax(1).numpy().dtype == np.int64
        with pytest.raises(TypeError, match="BFloat16"):
            x.detach().bfloat16().numpy()
    with pytest.raises(TypeError):
        f"{x.sum():.3f}"  # outside nothing of torch is changed


def test_a_line_that_reads_a_number_is_noted_and_no_other() -> None:
    with Faking() as faking:
        layer = nn.Linear(4, 3)
        loss = layer(torch.zeros(2, 4)).sum()
        loss.backward()
        torch.optim.Adam(layer.parameters()).step()
        assert faking.first_read is None
        assert loss > -1
        first = faking.first_read
        assert loss.item() == 1
    assert first is not None
    assert first.startswith("test_bench_simulation.py:")
    assert faking.first_read == first


def test_a_line_search_of_torch_reads_numbers_for_the_line_that_steps() -> None:
    with Faking() as faking:
        layer = nn.Linear(4, 3)
        optimizer = torch.optim.LBFGS(layer.parameters())

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = layer(torch.zeros(2, 4)).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)
    assert str(faking.first_read).startswith("test_bench_simulation.py:")


def parts_of_a_step(tracker: Tracker, dtype: torch.dtype) -> dict[str, int]:
    """What a model with copied layers, in ``dtype`` since after its construction, and a step of it leave alive."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    held = [weakref.ref(parameter) for parameter in model.parameters()]  # as Fabric and optimizers do
    model.to(dtype)
    assert [reference() for reference in held] == list(model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), foreach=False)
    model(torch.ones(2, 5, 16, dtype=dtype)).sum().backward()
    optimizer.step()
    return tracker.current_parts()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # by deepcopy; as in a simulation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_copied_and_converted_layers_are_the_same_parts_fake_as_real(dtype: torch.dtype) -> None:
    with Tracker() as tracker:
        real = parts_of_a_step(tracker, dtype)
    with Faking() as faking, Tracker(faking.fake_mode) as tracker:
        fake = parts_of_a_step(tracker, dtype)
    assert fake == real
    one_layer = 4 * 16 * 16 + 4 * 16 + 2 * 16 * 32 + 32 + 16 + 4 * 16
    assert real["gradients"] == 3 * one_layer * dtype.itemsize


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_copies_of_a_model_come_to_the_device_with_it() -> None:
    with Faking() as faking, Tracker(faking.fake_mode, counts_host=False) as tracker:
        model = nn.Linear(100, 100, bias=False)
        both = nn.ModuleList([model, copy.deepcopy(model)]).half()
        assert tracker.current == 0
        tracker.arrive()
        assert len(both) == 2
        assert tracker.current == tracker.current_parts()["parameters"] == 2 * 20_000


@pytest.mark.parametrize(("precision", "size"), [("bf16-true", 2), ("64-true", 8)])
def test_true_precisions_are_simulated_with_parameters_of_their_size(script: str, precision: str, size: int) -> None:
    simulated = simulate(script, world_size=64, strategy="fsdp", precision=precision, steps=1, device="h100-80gb")
    assert simulated.parts["parameters"] == 4 * (4096 * 4096 + 3 * 4096) * size / 64


def test_only_what_models_make_is_fake() -> None:
    with Faking():
        assert int(torch.arange(5).max()) + 1 == 5
        assert torch.randperm(3).sort().values.tolist() == [0, 1, 2]
        weight = nn.Embedding(10, 10**9).weight  # 40 GB
        assert weight.shape == (10, 10**9)


def test_a_rank_of_64_is_simulated_and_nothing_of_it_is_left(script: str, tmp_path: Path) -> None:
    environment = dict(os.environ)
    simulated = simulate(script, world_size=64, nodes=8, strategy="fsdp", steps=2, device="h100-80gb")
    assert dict(os.environ) == environment
    assert not torch.distributed.is_initialized()
    assert {path.name for path in tmp_path.iterdir()} <= {"train.py", "__pycache__"}  # no checkpoint, no log
    parameters = 4 * (4096 * 4096 + 3 * 4096)
    assert simulated.parts["parameters"] == parameters * 4 / 64
    last = simulated.steps[-1]
    assert last.bytes["reduce_scatter_base"] == parameters * 4
    assert last.calls["reduce_scatter_base"] == 4
    assert simulated.fits is True


def test_a_model_made_on_the_meta_device_is_simulated_with_its_shards(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    made = "with fabric.init_module(empty_init=True):\n        model = nn.Sequential("
    path.write_text(SCRIPT.replace("model = nn.Sequential(", made), encoding="utf-8")
    simulated = simulate(path, world_size=64, strategy="fsdp", steps=2, device="h100-80gb")
    assert simulated.parts["parameters"] == 4 * (4096 * 4096 + 3 * 4096) * 4 / 64


def test_tensor_parallel_ranks_are_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    simulated = simulate(EXAMPLES / "tensor_parallel.py", world_size=8, steps=2)
    assert simulated.steps[-1].calls["all_reduce"] > 0  # of activations
    assert simulated.steps[-1].calls["reduce_scatter_base"] > 0  # of gradients


def test_what_does_not_fit_is_said_with_what_would(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = devices.Device(0.9e9, 1e12, 1e12, 1e12, 1e9, 1e9)
    monkeypatch.setattr(devices, "DEVICES", {**DEVICES, "small": small})
    simulated = simulate(script, world_size=8, strategy="ddp", device="small", steps=2)
    assert simulated.fits is False
    assert simulated.sentence.startswith("does not fit: ")
    assert simulated.sentence.endswith(" MiB of 858 MiB (0.9 GB); fits with fsdp")
    estimate = simulated.estimate
    assert estimate is not None
    assert estimate.seconds == max(estimate.arithmetic, estimate.memory) + estimate.exposed_communication


def test_batch_size_is_of_every_loader(script: str) -> None:
    flops = [
        simulate(script, world_size=2, strategy="ddp", steps=1, batch_size=size).steps[0].flops["float32"]
        for size in (4, 8)
    ]
    assert flops[1] == 2 * flops[0] > 0


def test_an_error_of_the_script_is_shown(script: str) -> None:
    line = 1 + SCRIPT.splitlines().index('            raise ValueError("of the script\'s own")')
    with pytest.raises(SimulationError, match="Try: `python ") as error:
        simulate(script, ["--fail"], world_size=2, strategy="ddp")
    assert error.value.cause == f"ValueError: of the script's own, at train.py:{line}"


def test_an_error_that_says_what_to_do_keeps_it(script: str) -> None:
    with pytest.raises(SimulationError) as error:
        simulate(script, world_size=2, strategy="nonsense")
    assert error.value.cause.startswith("FabricValueError: This strategy does not exist. Given: strategy='nonsense'")
    assert error.value.fix.startswith("one of auto, single_device, ddp")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 8, "nodes": 3}, "Every node has equally many ranks"),
        ({"world_size": 8, "device": "h999"}, "This device is not known"),
    ],
)
def test_values_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(FabricValueError, match=message):
        simulate("script.py", **options)  # type: ignore[arg-type]


@pytest.mark.full
def test_a_loader_of_too_little_data_is_repeated_and_that_is_said() -> None:
    simulated = simulate(EXAMPLES / "char_gpt.py", world_size=1024, nodes=128, strategy="fsdp", steps=1)
    assert any("Without padding, some ranks would have no batch at all" in notice for notice in simulated.notices)


def test_communication_that_fits_beside_backward_is_not_exposed() -> None:
    device = find_device("h100-80gb")
    flops = {"bfloat16": device.half_flops}

    def seconds(sent: float) -> float:
        return estimate_step(Step({}, {}, flops, 0, {"network": sent}), device).seconds

    assert seconds(0) == seconds(device.network_bandwidth) < seconds(10 * device.network_bandwidth)


def test_the_examples_of_the_devices_hold() -> None:
    failed, tried = doctest.testmod(devices)
    assert (failed, tried > 0) == (0, True)


def test_a_cluster_is_read_or_refused() -> None:
    assert parse_cluster("devices=64,nodes=8,gpu=h100-80gb") == Cluster(64, 8, "h100-80gb")
    assert parse_cluster("devices=4") == Cluster(4, 1, None)
    for text in ("64", "devices=x", "devices=0", "devices=4,color=red", "nodes=2"):
        with pytest.raises(FabricValueError, match="cluster to simulate could not be read"):
            parse_cluster(text)
    with pytest.raises(FabricValueError, match=r"Given: devices=10,nodes=3\n  Try: devices= a multiple of nodes="):
        parse_cluster("devices=10,nodes=3")
    with pytest.raises(FabricValueError, match=r"Given: gpu=nonsense\n  Try: gpu= one of a100"):
        parse_cluster("devices=8,gpu=nonsense")


def test_a_simulation_ends_with_the_process_that_asked_for_it(tmp_path: Path) -> None:
    script, pid = tmp_path / "hangs.py", tmp_path / "pid"
    os.mkfifo(pid)
    script.write_text(f"import os, signal\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\nsignal.pause()\n")
    code = f"from fabric_lite.bench.simulation import simulate; simulate({str(script)!r}, world_size=2)"
    with subprocess.Popen([sys.executable, "-c", code]) as asking:
        simulating = int(pid.read_text())
        ended = os.pidfd_open(simulating)
        asking.kill()
    try:
        assert select.select([ended], [], [], 30)[0]
    finally:
        os.close(ended)
