"""A script that does one thing out of the ordinary, and nothing wrong: bench_odd_script.py WHAT."""

import pathlib
import sys
import threading
import time

import numpy
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from fabric_lite import Checkpoints, Fabric

what = sys.argv[1]
SLOW_SECONDS = 0.05


def work_long():
    end = time.perf_counter() + SLOW_SECONDS
    while time.perf_counter() < end:
        pass


def leaves_early(*numbers):
    """In these runs of all. The first two come one after the other, the next two take turns."""
    with pathlib.Path("runs.txt").open("a") as file:
        file.write(".")
        return file.tell() in numbers


def computes_beside():
    """For as long as the script runs, as a thread would that prepares batches."""
    ones = torch.ones(64, 64)
    while True:
        ones @ ones


class SlowToStart:
    """Three batches an epoch, which takes long to begin."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        work_long()
        return iter(self.batches)


fabric = Fabric(accelerator="cpu")
fabric.launch()
if what == "another fabric":
    other = Fabric(accelerator="cpu")
    other.setup_dataloaders([1, 2, 3])
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
if what == "several models":
    critic = nn.Linear(8, 1)
    second = torch.optim.SGD(critic.parameters(), lr=0.01)
    critic, second = fabric.setup(critic, second)
model, optimizer = fabric.setup(model, optimizer)
# Numbers of its own in every process and run.
rows = 64 if what == "few batches" else 2048
inputs = torch.randn(rows, 8) if what != "own data" else torch.from_numpy(numpy.random.rand(rows, 8)).float()
data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
if what == "batch sampler":
    loader = DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 16, True))
elif what == "numpy batches":
    loader = [(part.numpy(), part.sum(1, keepdim=True).numpy()) for part in inputs.split(16)]
elif what == "slow to start":
    loader = SlowToStart([(part, part.sum(1, keepdim=True)) for part in inputs[:48].split(16)])
else:
    loader = DataLoader(data, batch_size=16, shuffle=True)
loader = fabric.setup_dataloaders(loader)
held_out = fabric.setup_dataloaders(DataLoader(inputs, batch_size=256))
state = {"model": model, "optimizer": optimizer, "loader": loader, "fabric": fabric}
checkpoints = Checkpoints("runs", every=2, keep_last=1, async_=True)
if what == "checkpoints":
    checkpoints.resume(state)


def step(inputs, targets):
    inputs, targets = torch.as_tensor(inputs), torch.as_tensor(targets)
    if what == "several models":
        fabric.backward(critic(inputs).square().mean())
        second.step()
        second.zero_grad()
    if what == "accumulates":
        for part, wanted in zip(inputs.chunk(2), targets.chunk(2), strict=True):
            with fabric.no_backward_sync(model, enabled=part is not None and part.data_ptr() == inputs.data_ptr()):
                fabric.backward(nn.functional.mse_loss(model(part), wanted) / 2)
    else:
        fabric.backward(nn.functional.mse_loss(model(inputs), targets))
    optimizer.step()
    optimizer.zero_grad()
    if what == "evaluates":
        with torch.no_grad():
            for batch in held_out:
                model(batch)
    if what == "checkpoints":
        checkpoints.step(state)
    if what == "leaves once" and fabric.steps == 4 and leaves_early(3):
        sys.exit()
    if what == "leaves twice" and fabric.steps == 4 and leaves_early(3, 5):
        sys.exit()
    if what == "waits for saves":
        handle = fabric.save("model.ckpt", state, async_=True)
        handle.then(work_long)
        handle.result()


if what == "computes beside":
    threading.Thread(target=computes_beside, daemon=True).start()
while True:
    for inputs, targets in loader:
        if what != "catches exits":
            step(inputs, targets)
            continue
        try:
            step(inputs, targets)
        except BaseException as error:
            print(f"ignored: {error!r}")
