"""Handwritten digits with a small convolutional network. On any devices.

Commands that work (scikit-learn has the images):

    fabric-run --devices 2 examples/image_classifier.py
    fabric-run --devices 2 --precision bf16-mixed examples/image_classifier.py
    torchrun --nproc-per-node 2 examples/image_classifier.py
    python examples/image_classifier.py

The same without Fabric is examples/plain/image_classifier.py; ``diff`` shows the lines that it takes. The accuracy is
exact on any number of ranks: each test image is shown once.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from fabric_lite import Fabric


def read_digits():
    """Return 1438 images (1, 8, 8) with their digits to learn from, and 359 to test on."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    return random_split(data, [1438, 359], generator=torch.Generator().manual_seed(1))


class Classifier(nn.Module):
    """From images (batch, 1, 8, 8) to logits (batch, 10)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.25), nn.Linear(64 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def forward(self, images):
        return self.head(self.features(images))


@torch.no_grad()
def accuracy(fabric, model, loader):
    """Return the share of images that the model gets right, and how many it was shown."""
    model.eval()
    right, shown = 0, 0
    for images, targets in loader:
        right += (model(images).argmax(1) == targets).sum().item()
        shown += len(targets)
    model.train()
    right, shown = fabric.all_reduce((right, shown), reduce_op="sum")
    return right / shown, shown


def main():
    parser = argparse.ArgumentParser(description="Learn to read handwritten digits.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="images per process and step")
    args = parser.parse_args()

    fabric = Fabric()
    fabric.launch()
    torch.manual_seed(1)
    train_data, test_data = read_digits()
    train = DataLoader(train_data, args.batch_size, shuffle=True)
    test = DataLoader(test_data, args.batch_size)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model, optimizer = fabric.setup(model, optimizer)
    train = fabric.setup_dataloaders(train)
    test = fabric.setup_dataloaders(test, pad=False)

    for epoch in range(args.epochs):
        for images, targets in train:
            loss = F.cross_entropy(model(images), targets)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        share, shown = accuracy(fabric, model, test)
        fabric.print(f"epoch {epoch + 1:2d}  loss {loss.item():.4f}  {share:.2%} of {shown} test images right")


if __name__ == "__main__":
    main()
