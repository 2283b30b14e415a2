"""Trains one of three small models under Fabric for a few steps: what is run for real and simulated, and compared."""

from __future__ import annotations

import argparse
import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_lite import Fabric

WIDTH, CONTEXT, VOCABULARY = 128, 64, 96


class Block(nn.Module):
    """Causal self-attention, then a perceptron; each adds to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).movedim(1, 3)
        attended = F.scaled_dot_product_attention(*heads.unbind(1), is_causal=True)
        x = x + self.project(attended.movedim(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """From tokens (batch, time) to logits (batch, vocabulary) of the one after the last."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.tokens(x) + self.positions.weight[: x.shape[1]])))[:, -1]


class CNN(nn.Module):
    """Convolutions with batch norm, from images (batch, 3, 32, 32) to ten classes."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 32, 64, 128]
        self.layers = nn.Sequential(
            *[
                nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2))
                for before, after in itertools.pairwise(widths)
            ]
        )
        self.head = nn.Linear(widths[-1] * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x).flatten(1))


def make_mlp() -> nn.Module:
    """Five layers of a perceptron."""
    hidden = [nn.Sequential(nn.Linear(512, 512), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(nn.Linear(64, 512), *hidden, nn.Linear(512, 10))


def make(kind: str, samples: int) -> tuple[nn.Module, torch.Tensor]:
    """A model, and inputs for it."""
    if kind == "mlp":
        return make_mlp(), torch.randn(samples, 64)
    if kind == "gpt":
        return GPT(), torch.randint(VOCABULARY, (samples, CONTEXT))
    return CNN(), torch.randn(samples, 3, 32, 32)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=["mlp", "gpt", "cnn"], required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    fabric = Fabric()
    fabric.launch()
    torch.manual_seed(1)
    model, inputs = make(args.model, args.batch_size * fabric.world_size * args.accumulate * args.steps)
    loader = DataLoader(TensorDataset(inputs, torch.randint(10, (len(inputs),))), args.batch_size, shuffle=True)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    for number, (x, y) in enumerate(fabric.setup_dataloaders(loader), start=1):
        is_last = number % args.accumulate == 0
        with fabric.no_backward_sync(model, enabled=not is_last):
            fabric.backward(F.cross_entropy(model(x), y))
        if is_last:
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main()
