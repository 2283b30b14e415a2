"""Small models and data that many tests share; top-level, so that ranks can import them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountCollectives(TorchDispatchMode):
    """Counts calls into ``torch.distributed``'s backends, DDP's own included."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace in ("c10d", "c10d_functional", "_c10d_functional")
        return func(*args, **(kwargs or {}))


class RecordCollectives(TorchDispatchMode):
    """Notes each call into ``torch.distributed``'s backends: its name, and how many elements went in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "c10d_functional", "_c10d_functional"):
            sizes = [leaf.numel() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.calls.append((func.__name__, sum(sizes)))
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """Two linear layers, with the ways in which users run a model."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.second = nn.Linear(width, 4)
        self.note = "unchanged"

    def forward(self, x: torch.Tensor, depth: int = 0) -> torch.Tensor:
        y = self.second(torch.relu(self.first(x)))
        return self(y, depth - 1) if depth else y

    def training_step(self, x: torch.Tensor) -> torch.Tensor:
        """Calls the model as a whole."""
        return self(x).pow(2).mean()

    def by_layers(self, x: torch.Tensor) -> torch.Tensor:
        """Runs submodules directly, around ``forward``."""
        return self.second(torch.relu(self.first(x))).pow(2).mean()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.mix(self.norm(x)))


class Stack(nn.Module):
    """Three equal blocks between two layers, as most large models are built."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.last = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Counter:
    """A user's object with a state of its own."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def make_stack(seed: int = 0) -> Stack:
    torch.manual_seed(seed)
    return Stack()


def full(tensor: Any) -> torch.Tensor:
    """A copy of the whole tensor, also of a sharded one; then every rank calls."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def make_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batches(count: int = 4, size: int = 8, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 4, generator=generator) for _ in range(count)]


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


@functools.cache
def mesh_of(shape: tuple[int, ...], names: tuple[str, ...]) -> Any:
    """A mesh over the ranks of a warm pool; one for all tests, since torch keeps each, and gloo's threads with it."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)
