"""A generator learns to draw points on a ring from a discriminator that learns to tell them apart. On any devices.

Commands that work:

    fabric-run --devices 2 examples/gan.py
    torchrun --nproc-per-node 2 examples/gan.py
    python examples/gan.py

The same without Fabric is examples/plain/gan.py; ``diff`` shows the lines that it takes. The last line of the output
tells how much the ranks' weights differ: not at all.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from fabric_lite import Fabric

NOISE = 4


def points_on_a_ring(count):
    """Return points (count, 2) at a distance of about 1 from the middle."""
    angles = torch.rand(count) * 2 * math.pi
    radii = 1 + 0.05 * torch.randn(count)
    return torch.stack([radii * angles.cos(), radii * angles.sin()], dim=1)


def perceptron(inputs, outputs):
    layers = [nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, outputs)]
    return nn.Sequential(*layers)


@torch.no_grad()
def drawn_well(generator, noise):
    """Return the share of points that are within 0.2 of the ring, and of its 12 hours the share that are reached."""
    points = generator(noise)
    near = points[(points.norm(dim=1) - 1).abs() < 0.2]
    hours = (torch.atan2(near[:, 1], near[:, 0]) / (2 * math.pi) * 12).floor()
    return len(near) / len(points), len(hours.unique()) / 12


def main():
    parser = argparse.ArgumentParser(description="Train a generator and a discriminator against each other.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="points per process and step")
    args = parser.parse_args()

    fabric = Fabric()
    fabric.launch()
    torch.manual_seed(1)
    loader = DataLoader(TensorDataset(points_on_a_ring(8192)), args.batch_size, shuffle=True, drop_last=True)
    generator, discriminator = perceptron(NOISE, 2), perceptron(2, 1)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    generator, generator_optimizer = fabric.setup(generator, generator_optimizer)
    discriminator, discriminator_optimizer = fabric.setup(discriminator, discriminator_optimizer)
    loader = fabric.setup_dataloaders(loader)
    torch.manual_seed(1 + fabric.global_rank)  # from here on each rank draws noise of its own

    for epoch in range(args.epochs):
        for (real,) in loader:
            fake = generator(torch.randn(len(real), NOISE, device=real.device))
            judged = discriminator(torch.cat([real, fake.detach()])).flatten()
            is_real = (torch.arange(len(judged), device=real.device) < len(real)).float()
            discriminator_loss = F.binary_cross_entropy_with_logits(judged, is_real)
            fabric.backward(discriminator_loss)
            discriminator_optimizer.step()
            discriminator_optimizer.zero_grad()

            generator_loss = F.softplus(-discriminator(fake)).mean()
            fabric.backward(generator_loss)
            generator_optimizer.step()
            generator_optimizer.zero_grad()
            discriminator_optimizer.zero_grad()  # the generator's loss went through the discriminator

        near, reached = drawn_well(generator, torch.randn(1000, NOISE, device=real.device))
        fabric.print(f"epoch {epoch + 1:2d}  on the ring {near:.0%}  of its length {reached:.0%}")

    weights = parameters_to_vector([*generator.parameters(), *discriminator.parameters()])
    spread = fabric.all_reduce(weights, reduce_op="max") - fabric.all_reduce(weights, reduce_op="min")
    fabric.print(f"largest difference of a weight between ranks: {spread.max().item()}")


if __name__ == "__main__":
    main()
