"""Train on XLA's CPU device, and hold it against the loop written by hand.

    python -m venv xla && . xla/bin/activate
    pip install torch==2.9.1 torch-xla==2.9.0 pytest -e .
    python -m tests.xla

torch-xla 2.9 is the last one and fits torch 2.9 alone, whose build brings CUDA (7 GB), so it is no part of the suite.
Each check is a process of its own: how many devices XLA's CPU has is decided when it starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fabric_lite import Fabric

STEPS = 12


def model_and_data() -> tuple[nn.Module, DataLoader]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    data = TensorDataset(torch.randn(8 * STEPS, 8), torch.arange(8 * STEPS) % 3)
    return model, DataLoader(data, batch_size=8)


def by_hand(device: torch.device | str, sync: Callable[[], None] = lambda: None) -> list[torch.Tensor]:
    """The loop without Fabric, on a device."""
    model, loader = model_and_data()
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for x, y in loader:
        loss = cross_entropy(model(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()
        sync()
        optimizer.zero_grad()
    return [parameter.detach().cpu() for parameter in model.parameters()]


def with_fabric(fabric: Fabric) -> list[torch.Tensor]:
    """The same with Fabric; in the middle all is saved, spoiled and loaded."""
    model, loader = model_and_data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer = fabric.setup(model, optimizer)
    state = {"model": model, "optimizer": optimizer}
    with tempfile.TemporaryDirectory() as folder:
        for number, (x, y) in enumerate(fabric.setup_dataloaders(loader)):
            loss = cross_entropy(model(x), y)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if number == STEPS // 2:
                fabric.save(Path(folder) / "half.pt", state)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.zero_()
                fabric.load(Path(folder) / "half.pt", state)
    assert fabric.steps == STEPS
    return [parameter.detach().cpu() for parameter in model.parameters()]


def one_device() -> None:
    """The loop by hand on the same device gives the same bits, and on torch's CPU the same numbers."""
    import torch_xla

    fabric = Fabric(accelerator="tpu")
    fabric.launch()
    assert fabric.device.type == "xla"
    weights = with_fabric(fabric)
    hand = by_hand(torch_xla.device(), torch_xla.sync)
    assert all(map(torch.equal, weights, hand)), max((a - b).abs().max() for a, b in zip(weights, hand, strict=True))
    for own, other in zip(weights, by_hand("cpu"), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def four_devices() -> None:
    """Each batch is split between the devices of the process, with the same numbers as without."""
    import torch_xla

    fabric = Fabric(accelerator="tpu", strategy="xla_spmd")
    fabric.launch()
    weights = with_fabric(fabric)
    for own, other in zip(weights, by_hand("cpu"), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    model = fabric.setup(nn.Linear(8, 3))
    x = torch.ones(8, 8, device=fabric.device)
    model(x)
    assert "devices=[4,1]" in torch_xla._XLAC._get_xla_sharding_spec(x)
    with pytest.raises(ValueError, match="a multiple of 4"):
        model(torch.ones(6, 8, device=fabric.device))


def mixed_precision() -> None:
    """Forward runs in bfloat16, and parameters stay float32."""
    fabric = Fabric(accelerator="tpu", precision="bf16-mixed")
    fabric.launch()
    model = fabric.setup(nn.Sequential(nn.Linear(8, 3)))
    seen = []
    model[0].register_forward_hook(lambda *arguments: seen.append(arguments[-1].dtype))
    assert model(torch.ones(2, 8, device=fabric.device)).dtype == torch.float32
    assert seen == [torch.bfloat16], seen
    assert model[0].weight.dtype == torch.float32


def random_numbers() -> None:
    """A state that is loaded draws the same numbers again; a seed too."""
    fabric = Fabric(accelerator="tpu")
    fabric.launch()

    def draw() -> list[float]:
        return torch.rand(3, device=fabric.device).tolist()

    fabric.seed_everything(3)
    first, state, second = draw(), fabric.state_dict(), draw()
    fabric.load_state_dict(state)
    assert draw() == second != first
    fabric.seed_everything(3)
    assert draw() == first


CHECKS = {check.__name__: check for check in (one_device, four_devices, mixed_precision, random_numbers)}


def main() -> int:
    if len(sys.argv) > 1:
        CHECKS[sys.argv[1]]()
        return 0
    failed = 0
    for name in CHECKS:
        devices = "4" if name == "four_devices" else "1"
        environment = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": devices}
        code = subprocess.run([sys.executable, "-m", "tests.xla", name], env=environment, check=False).returncode
        print(f"{name}: {'passed' if code == 0 else 'failed'}", flush=True)
        failed += code != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
