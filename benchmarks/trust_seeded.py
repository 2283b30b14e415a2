"""A model that a number chooses, for trust.py: its kind, its sizes and the batch size are drawn from that seed.

fabric-bench benchmarks/trust_seeded.py 7
"""

import random
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_lite import Fabric

CLASSES = 10


def perceptron(draw: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    width, depth = draw.choice([64, 256, 512, 1024]), draw.randint(1, 5)
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*hidden, nn.Linear(width, CLASSES)), (width,)


def convolutions(draw: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    channels, size = draw.choice([8, 16, 32]), draw.choice([16, 24])
    blocks = [nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()) for _ in range(draw.randint(1, 3))]
    return nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1), *blocks, nn.Flatten(), nn.LazyLinear(CLASSES)), (
        3,
        size,
        size,
    )


def transformer(draw: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    width, length = draw.choice([32, 64, 128]), draw.choice([16, 32])
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, draw.randint(1, 3))
    return nn.Sequential(encoder, nn.Flatten(), nn.LazyLinear(CLASSES)), (length, width)


draw = random.Random(int(sys.argv[1]))
fabric = Fabric(accelerator="cpu")
fabric.launch()
torch.manual_seed(0)
model, shape = draw.choice([perceptron, convolutions, transformer])(draw)
batch_size = draw.choice([8, 32, 64])
model(torch.zeros(2, *shape))  # gives lazy layers their sizes
model, optimizer = fabric.setup(model, draw.choice([torch.optim.SGD, torch.optim.AdamW])(model.parameters(), lr=1e-3))
data = TensorDataset(torch.randn(1024, *shape), torch.randint(0, CLASSES, (1024,)))
loader = fabric.setup_dataloaders(DataLoader(data, batch_size=batch_size, shuffle=True))

while True:
    for inputs, labels in loader:
        fabric.backward(nn.functional.cross_entropy(model(inputs), labels))
        optimizer.step()
        optimizer.zero_grad()
