"""What the tests start on clusters: each a script that knows nothing of who has started it."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["PLACE", "SURVIVE", "SURVIVE_STEPS", "TRAIN", "trained"]

# Where a process is, without torch, and so in a moment; or the error that says why it is nowhere.
PLACE = """
import os, sys
from fabric_lite.errors import LaunchError
from fabric_lite.topology import read_topology
try:
    t = read_topology(os.environ)
except LaunchError as error:
    sys.exit(f"LaunchError: {error}")
print(t.rank, t.world_size, t.local_rank, t.local_world_size, t.node_rank, t.num_nodes, t.main_address, t.main_port)
"""

SAMPLES, BATCH, EPOCHS, WIDTH = 64, 4, 3, 16

MODEL = f"""
def build():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear({WIDTH}, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    inputs = torch.randn({SAMPLES}, {WIDTH})
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), inputs, inputs.sum(1, keepdim=True).sin()
"""

TRAIN = f"""
import argparse, hashlib, os
import torch
from torch.utils.data import DataLoader, TensorDataset
from fabric_lite import Fabric
{MODEL}

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", default="auto")
    fabric = Fabric(accelerator="cpu", devices=parser.parse_args().devices)
    fabric.launch()
    torch.set_num_threads(1)
    model, optimizer, inputs, targets = build()
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(inputs, targets), batch_size={BATCH}))
    for _ in range({EPOCHS}):
        for x, y in loader:
            fabric.backward((model(x) - y).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    line = f"rank {{fabric.global_rank}} of {{fabric.world_size}}: {{hashlib.sha256(weights).hexdigest()[:16]}}\\n"
    os.write(1, line.encode())  # at once: lines of several ranks don't mix


if __name__ == "__main__":
    main()
"""


def trained(ranks: int = 2) -> str:
    """The digest of the weights by a plain loop, in one process, in which ranks are a loop over their batches."""
    names: dict[str, object] = {"torch": torch}
    exec(MODEL, names)
    model, optimizer, inputs, targets = names["build"]()  # type: ignore[operator]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(EPOCHS):
            for first in range(0, SAMPLES, BATCH * ranks):
                for rank in range(ranks):
                    mine = slice(first + rank, first + BATCH * ranks, ranks)
                    # A division by two is exact, so it does not matter when DDP divides.
                    ((model(inputs[mine]) - targets[mine]).square().mean() / ranks).backward()
                optimizer.step()
                optimizer.zero_grad()
    finally:
        torch.set_num_threads(threads)
    return digest(model)


def digest(model: torch.nn.Module) -> str:
    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    return hashlib.sha256(weights).hexdigest()[:16]


SURVIVE_STEPS = 300
# A run that says how far it is, and ends with a file of its weights. A step takes 20 ms at least, or as told.
SURVIVE = f"""
import sys, time
from pathlib import Path
import torch
from torch.utils.data import DataLoader, TensorDataset
from fabric_lite import Checkpoints, Fabric

folder, seconds = Path(sys.argv[1]), float((*sys.argv, 0.02)[2])
fabric = Fabric(accelerator="cpu")
fabric.launch()
torch.set_num_threads(1)
fabric.seed_everything(1)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
data = TensorDataset(torch.randn(400, 8), torch.randn(400, 1))
loader = fabric.setup_dataloaders(DataLoader(data, batch_size=2, shuffle=True))
checkpoints = Checkpoints(folder / "checkpoints", keep_last=1)
state = {{"fabric": fabric, "model": model, "optimizer": optimizer, "loader": loader, "epoch": 0}}
checkpoints.resume(state)
if fabric.is_global_zero:
    print("begins at step", fabric.steps, flush=True)
while state["epoch"] < {SURVIVE_STEPS // 100}:
    for x, y in loader:
        fabric.backward((model(x) - y).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(seconds)
        if fabric.is_global_zero:
            (folder / "progress").write_text(str(fabric.steps))
        checkpoints.step(state)
    state["epoch"] += 1
if fabric.is_global_zero:
    torch.save([parameter.detach() for parameter in model.parameters()], folder / "weights.pt")
"""
