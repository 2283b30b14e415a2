"""A run that can be stopped at any time and loses nothing: it saves itself, and goes on where it was. On any devices.

Commands that work, the same one again to go on:

    fabric-run --devices 2 examples/resumable.py
    torchrun --nproc-per-node 2 examples/resumable.py
    python examples/resumable.py

Stop it with Ctrl-C, and it goes on from the last of its checkpoints, of which there is one every 20 steps. Ask it to
leave as a job system does, ``kill PID`` of any of its processes, and it saves after the step that it is in and exits
with 75, "try again"; under torchrun the code is torchrun's own, 1. The weights at the end are those of a run that
nobody stopped, to the last bit, and so is the number that it prints.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_lite import Checkpoints, Fabric


def main():
    parser = argparse.ArgumentParser(description="Learn the sine of a sum, and survive.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--folder", default="resumable", help="where the checkpoints are")
    args = parser.parse_args()

    fabric = Fabric()
    fabric.launch()
    fabric.seed_everything(1)
    numbers = torch.rand(4096, 4) * 3
    data = TensorDataset(numbers, numbers.sum(1, keepdim=True).sin())
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=32, shuffle=True))

    checkpoints = Checkpoints(args.folder, every=20, keep_last=2)
    state = {"fabric": fabric, "model": model, "optimizer": optimizer, "loader": loader, "epoch": 0}
    checkpoints.resume(state)
    while state["epoch"] < args.epochs:
        for x, y in loader:
            loss = F.mse_loss(model(x), y)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            checkpoints.step(state)
        state["epoch"] += 1
        fabric.print(f"epochs {state['epoch']:2d}, steps {fabric.steps}")

    checkpoints.save(state)
    total = sum(parameter.double().sum().item() for parameter in model.parameters())
    fabric.print(f"sum of the weights: {total!r}")


if __name__ == "__main__":
    main()
