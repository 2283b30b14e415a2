"""A pretraining loop in the style of the public ones for Lightning Fabric; only the imports say fabric_lite."""

import argparse
import math
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import fabric_lite as L
from fabric_lite.loggers import CSVLogger
from fabric_lite.strategies import FSDPStrategy
from fabric_lite.utilities.throughput import ThroughputMonitor, measure_flops

BLOCK_SIZE, VOCAB, WIDTH = 16, 32, 32


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        q, k, v = self.attn(self.norm_1(x)).unflatten(-1, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.proj(y)
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, idx):
        x = self.wte(idx)
        for block in self.h:
            x = block(x)
        return self.lm_head(x)

    def reset_parameters(self):
        pass

    def _init_weights(self, module, n_layer):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / 5 / WIDTH))


class Tokens(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        start = int(torch.randint(VOCAB, (1,), generator=generator))
        return (torch.arange(BLOCK_SIZE + 1) + start) % VOCAB


def main(fabric, args):
    fabric.seed_everything(42)
    if fabric.global_rank == 0:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    train_dataloader = DataLoader(Tokens(), batch_size=4, shuffle=True, drop_last=True)
    train_dataloader = fabric.setup_dataloaders(train_dataloader)

    t0 = time.perf_counter()
    with fabric.init_module(empty_init=args.strategy == "fsdp"):
        model = GPT()
        model.apply(partial(model._init_weights, n_layer=2))
    fabric.print(f"Time to instantiate model: {time.perf_counter() - t0:.02f} seconds.", end="\n", flush=True)
    model = fabric.setup_module(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=False)
    optimizer = fabric.setup_optimizers(optimizer)

    state = {"model": model, "optimizer": optimizer, "hparams": {"lr": 3e-3}, "iter_num": 0, "step_count": 0}
    if args.resume:
        fabric.load(args.out_dir / "lit_model.pth", state)
    train(fabric, state, train_dataloader, args)
    val = validate(fabric, model)
    save_checkpoint(fabric, state, args.out_dir / "lit_model.pth")
    fabric.print(f"final loss {val:.4f} at {state['step_count']}")


def train(fabric, state, train_dataloader, args):
    model, optimizer = state["model"], state["optimizer"]
    with torch.device("meta"):
        meta_model = GPT()
        x = torch.randint(0, 1, (4, BLOCK_SIZE))
        measured_flops = measure_flops(meta_model, lambda: meta_model(x), lambda y: y.float().mean())
    throughput = ThroughputMonitor(fabric, window_size=5, available_flops=1e12)
    fabric.barrier()
    total_t0 = time.perf_counter()
    first_iter = state["iter_num"]
    while state["step_count"] < args.max_steps:
        for batch in train_dataloader:
            if state["step_count"] >= args.max_steps:
                break
            state["iter_num"] += 1
            input_ids, targets = batch[:, :-1].contiguous().long(), batch[:, 1:].contiguous().long()
            is_accumulating = state["iter_num"] % args.accumulate != 0
            with fabric.no_backward_sync(model, enabled=is_accumulating):
                logits = model(input_ids)
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
                fabric.backward(loss / args.accumulate)
            if not is_accumulating:
                fabric.clip_gradients(model, optimizer, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()
                state["step_count"] += 1
            count = state["iter_num"] - first_iter
            throughput.update(
                time=time.perf_counter() - total_t0,
                flops=measured_flops,
                batches=count,
                samples=count * 4,
                lengths=count * 4 * BLOCK_SIZE,
            )
            if not is_accumulating:
                metrics = {"loss": loss.item(), "iter": state["iter_num"], **throughput.compute()}
                fabric.log_dict(metrics, step=state["iter_num"])


@torch.no_grad()
def validate(fabric, model):
    model.eval()
    batch = torch.stack([Tokens()[index] for index in range(8)])
    logits = model(batch[:, :-1])
    val_loss = fabric.all_reduce(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), reduce_op="mean")
    model.train()
    return val_loss.item()


def save_checkpoint(fabric, state, path):
    fabric.save(path, state)
    fabric.save(path.with_name("weights.pth"), {"model": state["model"]}, filter={"model": lambda k, _: "lm_head" in k})


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    parser = argparse.ArgumentParser()
    parser.add_argument("--out_dir", type=Path, default=Path("out"))
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    strategy = args.strategy
    if strategy == "fsdp":
        strategy = FSDPStrategy(
            auto_wrap_policy={Block},
            activation_checkpointing_policy=None,
            state_dict_type="full",
            limit_all_gathers=True,
            cpu_offload=False,
        )
    logger = CSVLogger(root_dir=args.out_dir, name="logs", flush_logs_every_n_steps=1)
    fabric = L.Fabric(
        accelerator="cpu", devices=args.devices, strategy=strategy, precision=args.precision, loggers=[logger]
    )
    fabric.launch(main, args)
