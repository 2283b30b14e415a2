"""Lightning modules for tests, and the loops written by hand that do the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fabric_lite.trainer as pl
from fabric_lite import Fabric

__all__ = ["LitModel", "Net", "by_hand", "data", "digest", "loader"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class LitModel(pl.LightningModule):
    """The article's own, and a validation."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Net()
        self.loss = nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        y_hat = self.model(x)
        loss = self.loss(y_hat, y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", self.loss(self.model(x), y), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def data(samples: int = 48, seed: int = 5) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(samples, 6, generator=generator), torch.arange(samples) % 3)


def loader(samples: int = 48, batch_size: int = 4, shuffle: bool = True) -> DataLoader:
    return DataLoader(data(samples), batch_size=batch_size, shuffle=shuffle)


def digest(model: nn.Module) -> list[list[float]]:
    """All parameters in full; under sharding every rank calls."""
    return [
        getattr(one, "full_tensor", lambda one=one: one)().detach().flatten().tolist() for one in model.parameters()
    ]


def by_hand(
    fabric: Fabric,
    epochs: int,
    *,
    accumulate: int = 1,
    clip: float | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    validation: DataLoader | None = None,
) -> nn.Module:
    """What a Trainer does with :class:`LitModel`, written with Fabric."""
    torch.manual_seed(1)
    model, loss = Net(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = None if schedule is None else schedule(optimizer)
    model, optimizer = fabric.setup(model, optimizer)
    batches = fabric.setup_dataloaders(loader())
    held_out = [] if validation is None else fabric.setup_dataloaders(validation, pad=False)
    for _ in range(epochs):
        for number, (x, y) in enumerate(batches):
            is_last = (number + 1) % accumulate == 0 or number + 1 == len(batches)
            with fabric.no_backward_sync(model, enabled=not is_last):
                value = loss(model(x), y)
                fabric.backward(value / accumulate if accumulate > 1 else value)
            if is_last:
                if clip is not None:
                    fabric.clip_gradients(model, optimizer, max_norm=clip)
                optimizer.step()
                optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        model.eval()
        with torch.no_grad():
            for x, _ in held_out:
                model(x)
        model.train()
    return model
