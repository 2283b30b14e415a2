"""A script of known speed for trust.py: under ``--batch-size 1`` and ``2`` it is the same, under ``3`` 5 % slower.

A step is the same work twenty times, or twenty-one times. The batches are numbers, which only say how large they are.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader

from fabric_lite import Fabric

PARTS, SLOW_PARTS, SLOW_BATCH_SIZE = 20, 21, 3

fabric = Fabric(accelerator="cpu")
fabric.launch()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256))
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.01))
inputs = torch.randn(64, 256)
loader = fabric.setup_dataloaders(DataLoader(range(1_000_000), batch_size=1, collate_fn=len))

for batch_size in loader:
    parts = SLOW_PARTS if batch_size == SLOW_BATCH_SIZE else PARTS
    for _ in range(parts):
        fabric.backward(model(inputs).square().mean() / parts)
    optimizer.step()
    optimizer.zero_grad()
