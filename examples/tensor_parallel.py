"""A small GPT whose layers are cut over ranks (tensor parallelism), with sharded data parallelism around it.

Commands that work:

    fabric-run --devices 4 examples/tensor_parallel.py
    fabric-run --devices 4 examples/tensor_parallel.py --steps 200 --resume
    fabric-run --devices 2 examples/tensor_parallel.py
    fabric-run --devices 4 examples/tensor_parallel.py --tensor-parallel 4
    torchrun --nproc-per-node 4 examples/tensor_parallel.py

4 processes are 2 groups of 2: each group gets batches of its own, and within it each rank holds half of the heads and
half of the perceptron. What is left is sharded over the groups. A checkpoint is a folder, for any number of ranks.
"""

import argparse
import os
import pydoc_data.topics

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from fabric_lite import Fabric
from fabric_lite.strategies import ModelParallelStrategy

CONTEXT, WIDTH, HEADS, LAYERS = 64, 64, 4, 2


class Block(nn.Module):
    """Causal self-attention, then a perceptron; each adds to what came in."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        # Three layers and not one: cut in the middle, one of three times the width would give rank 0 no values.
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.project = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        normed = self.norm1(x)
        # -1: the heads that this rank holds.
        heads = [
            layer(normed).unflatten(-1, (-1, WIDTH // HEADS)).movedim(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.project(attended.movedim(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """From characters (batch, time) to logits for the character after each (batch, time, vocabulary)."""

    def __init__(self, vocabulary_size):
        super().__init__()
        self.characters, self.positions = nn.Embedding(vocabulary_size, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary_size)

    def forward(self, inputs):
        x = self.characters(inputs) + self.positions.weight[: inputs.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def parallelize(model, device_mesh):
    """Cut each pair of layers first by columns, then by rows: one sum over the ranks per pair."""
    for block in model.blocks:
        plan = {name: ColwiseParallel() for name in ("query", "key", "value", "up")}
        plan |= {name: RowwiseParallel() for name in ("project", "down")}
        parallelize_module(block, device_mesh["tensor_parallel"], plan)
    return model


def read_text():
    """Return the text of Python's own help pages as one tensor of character numbers, and the number of characters."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    number = {character: index for index, character in enumerate(sorted(set(text)))}
    return torch.tensor([number[character] for character in text]), len(number)


def print_layout(fabric, model):
    """Print the axes of the mesh, how a layer is laid out, and how many numbers each rank holds."""
    mesh = fabric.device_mesh
    fabric.print(", ".join(f"{name} {mesh[name].size()}" for name in mesh.mesh_dim_names))
    local = {name: getattr(p, "to_local", lambda p=p: p)() for name, p in model.named_parameters()}
    for name in ("characters.weight", "blocks.0.norm1.weight", "blocks.0.up.weight", "blocks.0.down.weight"):
        whole = model.get_parameter(name)
        fabric.print(f"{name:24} {tuple(whole.shape)!s:12} rank 0 holds {tuple(local[name].shape)}")
    held = fabric.all_gather(sum(part.numel() for part in local.values())).tolist()
    fabric.print(f"{sum(p.numel() for p in model.parameters()):,} parameters; the ranks hold {held}")


def main():
    parser = argparse.ArgumentParser(description="Train a small GPT whose layers are cut over the ranks.")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps, those before a resume included")
    parser.add_argument("--batch-size", type=int, default=16, help="pieces of text per group of ranks and step")
    parser.add_argument("--tensor-parallel", type=int, default=2, help="ranks of a group, over which layers are cut")
    parser.add_argument("--checkpoint", default="tensor_parallel", help="the folder that is written at the end")
    parser.add_argument("--resume", action="store_true", help="go on from that folder if it exists")
    args = parser.parse_args()

    fabric = Fabric(strategy=ModelParallelStrategy(parallelize, tensor_parallel_size=args.tensor_parallel))
    fabric.launch()
    torch.manual_seed(1)
    text, vocabulary_size = read_text()
    pieces = text.unfold(0, CONTEXT + 1, 1)
    train = DataLoader(TensorDataset(pieces[:, :-1], pieces[:, 1:]), args.batch_size, shuffle=True, drop_last=True)
    model = GPT(vocabulary_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model, optimizer = fabric.setup(model, optimizer)
    train = fabric.setup_dataloaders(train)
    print_layout(fabric, model)

    state = {"model": model, "optimizer": optimizer, "train": train, "fabric": fabric, "step": 0}
    if args.resume and os.path.exists(args.checkpoint):
        fabric.load(args.checkpoint, state)
        fabric.print(f"resumed at step {state['step']}")

    while state["step"] < args.steps:
        for inputs, targets in train:
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            state["step"] += 1
            if state["step"] % 25 == 0 or state["step"] in (1, args.steps):
                fabric.print(f"step {state['step']:4d}  loss {fabric.all_reduce(loss).item():.4f}")
            if state["step"] == args.steps:
                break
        fabric.save(args.checkpoint, state)


if __name__ == "__main__":
    main()
