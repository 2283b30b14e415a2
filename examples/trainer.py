"""The structured form of the loop: a LightningModule and a Trainer, which are made of Fabric's public names.

Commands that work (scikit-learn has the digits):

    fabric-run --devices 2 examples/trainer.py
    fabric-run --devices 2 --strategy fsdp --precision bf16-mixed examples/trainer.py
    python examples/trainer.py

Lightning's own runs the same file with ``import lightning.pytorch as pl``.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import fabric_lite.trainer as pl


class LitModel(pl.LightningModule):
    """From images (batch, 64) to logits (batch, 10)."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.loss = nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx):
        x, y = batch
        y_hat = self.model(x)
        loss = self.loss(y_hat, y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        y_hat = self.model(x)
        self.log("val_loss", self.loss(y_hat, y), sync_dist=True)
        self.log("val_accuracy", (y_hat.argmax(1) == y).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main():
    parser = argparse.ArgumentParser(description="Learn to read handwritten digits.")
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()

    pl.seed_everything(1)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    train_data, val_data = random_split(data, [1438, 359])
    train_loader = DataLoader(train_data, batch_size=16, shuffle=True)
    val_loader = DataLoader(val_data, batch_size=64)
    model = LitModel()
    trainer = pl.Trainer(max_epochs=args.epochs)
    trainer.fit(model, train_loader, val_loader)
    if trainer.is_global_zero:
        print(", ".join(f"{name} {value:.4f}" for name, value in trainer.callback_metrics.items()))


if __name__ == "__main__":
    main()
