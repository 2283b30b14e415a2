"""One set of verbs for every layout: sharding after the optimizer was made, engines that own the step, any-to-any."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from fabric_lite import Fabric, Strategy, StrategyError, checkpoint
from fabric_lite.strategies import Engine, FSDPStrategy, Placement
from fabric_lite.testing import RankPool
from tests.models import batches, full, make_net

STRATEGIES = {
    "single_device": (1, "single_device"),
    "ddp": (2, "ddp"),
    "fsdp": (2, FSDPStrategy(auto_wrap_policy={nn.Linear})),
}


def train_and_save(name: str, path: str, start: str | None, steps: int) -> Any:
    devices, strategy = STRATEGIES[name]
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy)
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)  # made before the parameters are sharded
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    fabric.setup(model, optimizer)
    state = {"model": model, "nested": {"optimizer": optimizer}, "scheduler": scheduler, "step": 0}
    if start is not None:
        fabric.load(start, state)
    first = state["step"]
    for x in batches(8)[first : first + steps]:
        fabric.backward(model(x.chunk(devices)[fabric.global_rank]).pow(2).mean())
        norm = fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        state["step"] += 1
    assert type(norm) is torch.Tensor
    fabric.save(path, state)
    moments = [full(value) for entry in optimizer.state.values() for value in entry.values()]
    return [full(parameter) for parameter in model.parameters()], moments, scheduler.get_last_lr(), state["step"]


def run(ranks: RankPool, name: str, *arguments: Any) -> Any:
    if STRATEGIES[name][0] == 1:
        return train_and_save(name, *arguments)
    first, second = ranks.run(train_and_save, name, *arguments)
    assert all(torch.equal(one, two) for one, two in zip(first[0] + first[1], second[0] + second[1], strict=True))
    return first


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.product(STRATEGIES, STRATEGIES)))
def test_a_checkpoint_of_one_layout_goes_on_under_any_other(
    ranks: RankPool, tmp_path: Path, saved: str, loaded: str
) -> None:
    whole = run(ranks, "single_device", str(tmp_path / "whole.ckpt"), None, 8)
    run(ranks, saved, str(tmp_path / "half.ckpt"), None, 4)
    resumed = run(ranks, loaded, str(tmp_path / "end.ckpt"), str(tmp_path / "half.ckpt"), 4)
    assert resumed[2:] == whole[2:]
    # Adam divides by the root of tiny second moments, so the last bits of a mean over ranks grow.
    for one, two in zip(resumed[0] + resumed[1], whole[0] + whole[1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    keys = {path: list(checkpoint.load(tmp_path / path)["model"]) for path in ("half.ckpt", "end.ckpt")}
    assert keys["half.ckpt"] == keys["end.ckpt"] == list(make_net().state_dict())


class OwnEngine(nn.Module):
    """Stands for an engine such as DeepSpeed's: it owns forward, backward and step."""

    def __init__(self, run: Callable[..., Any], optimizers: Sequence[Optimizer]) -> None:
        super().__init__()
        self.run = run
        self.optimizers = optimizers
        self.calls: list[str] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("forward")
        return self.run(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class OwnsEverything(Strategy):
    engines: list[OwnEngine] = dataclasses.field(default_factory=list)

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], run: Callable[..., Any], placement: Placement
    ) -> Engine:
        self.engines.append(OwnEngine(run, optimizers))
        return Engine(module=self.engines[-1])

    def backward(self, tensor: torch.Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        self.engines[0].calls.append("backward")
        tensor.backward(*args, **kwargs)

    @property
    def owns_step(self) -> bool:
        return True

    def step(self, optimizer: Optimizer) -> None:
        self.engines[0].calls.append("step")
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter -= group["lr"] * parameter.grad


def test_an_engine_may_own_backward_and_step_without_any_type_test() -> None:
    strategy = OwnsEverything()
    fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy)
    raw, model = make_net(), make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # the engine has no momentum
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    fabric.setup(model, optimizer)
    by_hand = torch.optim.SGD(raw.parameters(), lr=0.1)
    by_hand_schedule = torch.optim.lr_scheduler.StepLR(by_hand, 1, 0.5)
    for x in batches(3):
        fabric.backward(model(x).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        raw(x).pow(2).mean().backward()
        by_hand.step()
        by_hand.zero_grad()
        by_hand_schedule.step()
    assert strategy.engines[0].calls == ["forward", "backward", "step"] * 3
    assert strategy.engines[0].optimizers == (optimizer,)
    assert not any(entry.get("momentum_buffer") is not None for entry in optimizer.state.values())
    for one, two in zip(model.parameters(), raw.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-7)


def sharded_forward_by_hand() -> float:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=STRATEGIES["fsdp"][1])
    model, raw = make_net(), make_net()
    fabric.setup(model)
    x = batches(1)[0]
    for copying in (copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(StrategyError, match=r"fabric\.save.*get_model_state_dict"):
            copying(model)
    return float((model.forward(x) - raw(x)).abs().max() + (model(x, 1) - raw(x, 1)).abs().max())


def test_forward_by_hand_gathers_a_sharded_model_and_copies_are_refused(ranks: RankPool) -> None:
    assert ranks.run(sharded_forward_by_hand) == [0.0, 0.0]
