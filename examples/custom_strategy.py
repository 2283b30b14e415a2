"""A strategy of your own, without touching the library: gradients are averaged by hooks, one parameter at a time.

Commands that work:

    fabric-run --devices 2 examples/custom_strategy.py
    torchrun --nproc-per-node 2 examples/custom_strategy.py
    python examples/custom_strategy.py

It trains the same model under this strategy and under ``auto``, which is ``ddp`` for several processes, and prints how
much the weights differ: not at all on two ranks, by rounding on more, where sums are taken in another order.
"""

import argparse
import contextlib
import dataclasses

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from fabric_lite import Fabric, Strategy
from fabric_lite.strategies import Engine


@dataclasses.dataclass(frozen=True)
class AveragedByHooks(Strategy):
    """Every rank holds the whole model; each gradient is averaged over the ranks as soon as it is there."""

    # Models that are inside no_sync, by id.
    waiting: set[int] = dataclasses.field(default_factory=set, compare=False)
    hooks: list = dataclasses.field(default_factory=list, compare=False)

    def mesh_axes(self, world_size, local_world_size):
        return {"data": world_size}

    def wrap(self, module, optimizers, run, placement):
        """All that ``setup`` asks of a strategy; without an engine, the user's own model is what runs."""
        group = placement.mesh.get_group("data")

        def average(parameter):
            if id(module) not in self.waiting:
                parameter.grad.div_(dist.get_world_size(group))
                dist.all_reduce(parameter.grad, group=group)

        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), 0, group)
        for parameter in module.parameters():
            if parameter.requires_grad:
                self.hooks.append(parameter.register_post_accumulate_grad_hook(average))
        return Engine()

    def unwrap(self, module):
        while self.hooks:
            self.hooks.pop().remove()

    @contextlib.contextmanager
    def no_sync(self, module, engine):
        self.waiting.add(id(module))
        try:
            yield
        finally:
            self.waiting.discard(id(module))


def train(fabric, epochs):
    """Train in the ordinary way, the same under any strategy; return the weights."""
    torch.manual_seed(1)
    inputs = torch.randn(512, 8)
    data = TensorDataset(inputs, inputs.sin().sum(1, keepdim=True))
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=16, shuffle=True))
    for _ in range(epochs):
        for index, (batch, targets) in enumerate(loader):
            is_second = index % 2 == 1  # the gradients of two batches make one step
            with fabric.no_backward_sync(model, enabled=not is_second):
                loss = (model(batch) - targets).square().mean()
                fabric.backward(loss / 2)
            if is_second:
                fabric.clip_gradients(model, optimizer, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()
    fabric.print(f"{type(fabric.strategy).__name__:20} loss {fabric.all_reduce(loss).item():.6f}")
    return parameters_to_vector(model.parameters()).detach()


def main():
    parser = argparse.ArgumentParser(description="Train under a strategy of one's own, and under ddp.")
    parser.add_argument("--epochs", type=int, default=25)
    args = parser.parse_args()

    fabric = Fabric(strategy=AveragedByHooks())
    fabric.launch()
    ours = train(fabric, args.epochs)
    theirs = train(Fabric(strategy="auto"), args.epochs)
    fabric.print(f"largest difference of a weight: {(ours - theirs).abs().max().item()}")


if __name__ == "__main__":
    main()
