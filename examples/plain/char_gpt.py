"""A small GPT learns English from the text of Python's own help pages, character by character. Plain PyTorch.

Commands that work:

    python examples/plain/char_gpt.py
    python examples/plain/char_gpt.py --steps 400 --resume

The same with Fabric is examples/char_gpt.py; ``diff`` shows the lines that it takes.
"""

import argparse
import math
import os
import pydoc_data.topics
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CONTEXT, WIDTH, HEADS, LAYERS = 64, 96, 4, 3


class Block(nn.Module):
    """Causal self-attention, then a perceptron; each adds to what came in."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).movedim(1, 3)  # batch, 3, heads, time, features
        attended = F.scaled_dot_product_attention(*heads.unbind(1), is_causal=True)
        x = x + self.project(attended.movedim(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


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


def read_text():
    """Return the text as one tensor of character numbers, and the characters."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    vocabulary = sorted(set(text))
    number = {character: index for index, character in enumerate(vocabulary)}
    return torch.tensor([number[character] for character in text]), vocabulary


def windows(text, stride):
    """Return a dataset of pieces of text, each with the same piece one character on."""
    pieces = text.unfold(0, CONTEXT + 1, stride)
    return TensorDataset(pieces[:, :-1], pieces[:, 1:])


def loss_of(model, inputs, targets):
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def bits_per_character(model, loader):
    """Return how many bits the model needs for a character of text that it has not seen."""
    model.eval()
    nats, pieces = 0.0, 0
    for inputs, targets in loader:
        nats += loss_of(model, inputs, targets).item() * len(inputs)
        pieces += len(inputs)
    model.train()
    return nats / pieces / math.log(2)


@torch.no_grad()
def sample(model, vocabulary, length=300):
    """Let the model write."""
    text = torch.tensor([[vocabulary.index("\n")]], device=model.head.weight.device)
    for _ in range(length):
        probabilities = model(text[:, -CONTEXT:])[:, -1].float().softmax(-1)
        text = torch.cat([text, torch.multinomial(probabilities, 1)], dim=1)
    return "".join(vocabulary[index] for index in text[0].tolist())


def main():
    parser = argparse.ArgumentParser(description="Train a small GPT on the text of Python's own help pages.")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps, those before a resume included")
    parser.add_argument("--batch-size", type=int, default=32, help="pieces of text per process and step")
    parser.add_argument("--checkpoint", default="char_gpt.pt", help="the file that is written every 100 steps and last")
    parser.add_argument("--resume", action="store_true", help="go on from that file if it exists")
    args = parser.parse_args()

    torch.manual_seed(1)
    text, vocabulary = read_text()
    split = len(text) * 9 // 10
    train = DataLoader(windows(text[:split], 1), args.batch_size, shuffle=True, drop_last=True)
    held_out = DataLoader(windows(text[split:], CONTEXT), args.batch_size)
    model = GPT(len(vocabulary))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    step = 0
    if args.resume and os.path.exists(args.checkpoint):
        state = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        print(f"resumed at step {step}")

    tokens = args.batch_size * CONTEXT
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokens:,} tokens per step")
    start, start_step = time.perf_counter(), step
    while step < args.steps:
        for inputs, targets in train:
            loss = loss_of(model, inputs, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == 1 or step % 25 == 0 or step == args.steps:
                rate = (step - start_step) * tokens / (time.perf_counter() - start)
                print(f"step {step:4d}  loss {loss.item():.4f}  {rate:,.0f} tokens/s")
            if step % 100 == 0 or step == args.steps:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, args.checkpoint)
            if step == args.steps:
                break

    print(f"held-out text: {bits_per_character(model, held_out):.2f} bits per character")
    print(sample(model, vocabulary))


if __name__ == "__main__":
    main()
