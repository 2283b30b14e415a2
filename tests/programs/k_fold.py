"""K-fold cross-validation: one model and optimizer set up once, their state saved and restored for each fold."""

import argparse
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from fabric_lite import Fabric, seed_everything


def folds(count, samples):
    indices = torch.randperm(samples, generator=torch.Generator().manual_seed(0)).chunk(count)
    for number in range(count):
        yield (
            torch.cat([part for other, part in enumerate(indices) if other != number]).tolist(),
            indices[number].tolist(),
        )


def train_dataloader(model, data_loader, optimizer, fabric, epoch, hparams):
    model.train()
    for batch_idx, (data, target) in enumerate(data_loader):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data), target)
        fabric.backward(loss)
        optimizer.step()
        if batch_idx == 0 and epoch == hparams.epochs - 1:
            fabric.print(f"Train Epoch: {epoch} Loss: {loss.item():.6f}")


def validate_dataloader(model, data_loader, fabric):
    model.eval()
    correct, total = 0, 0
    with torch.no_grad():
        for data, target in data_loader:
            correct += (model(data).argmax(dim=1) == target).sum()
            total += len(target)
    counts = fabric.all_reduce(torch.tensor([int(correct), total]), reduce_op="sum")
    return (counts[0] / counts[1]).item()


def run(hparams):
    fabric = Fabric(accelerator="cpu")
    fabric.launch()
    seed_everything(hparams.seed)
    inputs = torch.randn(120, 8, generator=torch.Generator().manual_seed(1))
    dataset = TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())

    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    initial = {"model": deepcopy(model.state_dict())}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model, optimizer = fabric.setup(model, optimizer)
    initial["optimizer"] = deepcopy(optimizer.state_dict())
    states, metrics = {}, {}
    for fold, (train_ids, val_ids) in enumerate(folds(hparams.folds, len(dataset))):
        fabric.print(f"Working on fold {fold}")
        train_loader = DataLoader(dataset, batch_size=8, sampler=SubsetRandomSampler(train_ids))
        val_loader = DataLoader(dataset, batch_size=8, sampler=SubsetRandomSampler(val_ids))
        train_loader, val_loader = fabric.setup_dataloaders(train_loader, val_loader)
        model.load_state_dict(initial["model"])
        optimizer.load_state_dict(deepcopy(initial["optimizer"]))
        for epoch in range(hparams.epochs):
            train_dataloader(model, train_loader, optimizer, fabric, epoch, hparams)
        metrics[fold] = validate_dataloader(model, val_loader, fabric)
        states[fold] = deepcopy(model.state_dict())
        fabric.save(
            hparams.out / f"fold_{fold}.ckpt", {"model": model, "optimizer": optimizer, "metric": metrics[fold]}
        )

    best = max(metrics, key=metrics.get)
    restored = {"model": model, "optimizer": optimizer, "metric": None}
    fabric.load(hparams.out / f"fold_{best}.ckpt", restored)
    assert restored["metric"] == metrics[best]
    assert all(torch.equal(value, states[best][name]) for name, value in model.state_dict().items())
    fabric.print(f"average of {len(metrics)} folds {sum(metrics.values()) / len(metrics):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("folds"))
    run(parser.parse_args())
