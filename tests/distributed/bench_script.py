"""A script for benchmarks, right or with one mistake that only shows on several ranks: bench_script.py MISTAKE."""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_lite import Fabric

mistake = sys.argv[1] if len(sys.argv) > 1 else "none"
fabric = Fabric(accelerator="cpu")
fabric.launch()
torch.manual_seed(0 if mistake != "unseeded" else fabric.global_rank + torch.seed() % 1000)
several = fabric.world_size > 1
dropout = nn.Dropout(0.5) if mistake == "dropout" else nn.Identity()
norm = nn.BatchNorm1d(16) if mistake == "batch norm" else nn.LayerNorm(16)
model = nn.Sequential(nn.Linear(8, 16), norm, nn.GELU(), dropout, nn.Linear(16, 1))
lr = 0.1 * (fabric.world_size if mistake == "learning rate" else 1)
optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
model, optimizer = fabric.setup(model, optimizer)
inputs = torch.randn(4096, 8, generator=torch.Generator().manual_seed(1))
loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=16, shuffle=True)
loader = fabric.setup_dataloaders(loader)


def loss_of(inputs, targets):
    if mistake == "functional dropout":
        inputs = nn.functional.dropout(inputs)
    return nn.functional.mse_loss(model(inputs), targets)


for number, (inputs, targets) in enumerate(loader):
    if mistake == "raises" and number == 2:
        raise ValueError("a bad batch")
    if mistake == "short" and number == 4:
        break
    loss = loss_of(inputs, targets)
    if mistake == "sum":
        loss = loss * fabric.world_size
    elif mistake == "mean twice":
        loss = loss / fabric.world_size
    fabric.backward(loss)
    if mistake == "no sync" and several:
        outputs = inputs
        for part in model:  # past the engine
            outputs = part(outputs)
        own = torch.autograd.grad(nn.functional.mse_loss(outputs, targets), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), own, strict=True):
            parameter.grad.copy_(gradient)
    if not (mistake == "skipped clip" and several):
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
    if several and mistake == "rounded gradients":
        for parameter in model.parameters():
            parameter.grad.copy_(parameter.grad.bfloat16())
    if several and mistake == "lost gradient":
        model[0].weight.grad.zero_()
    if several and mistake == "own gradients" and fabric.global_rank == 1:
        model[0].weight.grad.mul_(0.5)
    optimizer.step()
    if several and mistake == "double step":
        optimizer.step()
    if several and mistake == "decay":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.99)
    if not (mistake == "kept gradients" and several):
        optimizer.zero_grad()
    if mistake == "saves":
        fabric.save("model.ckpt", {"model": model, "number": number})
