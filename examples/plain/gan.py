"""A generator learns to draw points on a ring from a discriminator that learns to tell them apart. Plain PyTorch.

Commands that work:

    python examples/plain/gan.py

The same with Fabric is examples/gan.py; ``diff`` shows the lines that it takes.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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

    torch.manual_seed(1)
    loader = DataLoader(TensorDataset(points_on_a_ring(8192)), args.batch_size, shuffle=True, drop_last=True)
    generator, discriminator = perceptron(NOISE, 2), perceptron(2, 1)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99))

    for epoch in range(args.epochs):
        for (real,) in loader:
            fake = generator(torch.randn(len(real), NOISE, device=real.device))
            judged = discriminator(torch.cat([real, fake.detach()])).flatten()
            is_real = (torch.arange(len(judged), device=real.device) < len(real)).float()
            discriminator_loss = F.binary_cross_entropy_with_logits(judged, is_real)
            discriminator_loss.backward()
            discriminator_optimizer.step()
            discriminator_optimizer.zero_grad()

            generator_loss = F.softplus(-discriminator(fake)).mean()
            generator_loss.backward()
            generator_optimizer.step()
            generator_optimizer.zero_grad()
            discriminator_optimizer.zero_grad()  # the generator's loss went through the discriminator

        near, reached = drawn_well(generator, torch.randn(1000, NOISE, device=real.device))
        print(f"epoch {epoch + 1:2d}  on the ring {near:.0%}  of its length {reached:.0%}")


if __name__ == "__main__":
    main()
