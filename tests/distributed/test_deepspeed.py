"""ZeRO by DeepSpeed: trains as one process does by hand, and its checkpoints are those of every other strategy.

Needs the extra, and DeepSpeed's operators compiled beforehand (see CONTRIBUTING.md), which takes minutes.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import itertools
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_lite import Fabric, StrategyError, checkpoint
from fabric_lite.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from fabric_lite.testing import RankPool
from tests.distributed.layouts import loss_of, make_gpt, token_batches
from tests.distributed.scenarios import SCENARIOS, OneProcess, good_steps, sgd
from tests.models import Normed, batches, full, make_net

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install -e '.[deepspeed]'"
)

# Else everything here would be small enough to stay whole on every rank, and stage 3 would divide nothing.
SMALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
STAGES: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3},
    "stage 2 offload": {"stage": 2, "offload_optimizer": True},
    "stage 3 offload": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
}
ON_DEVICE = ["stage 1", "stage 2", "stage 3"]


def deepspeed(name: str, **options: Any) -> DeepSpeedStrategy:
    return DeepSpeedStrategy(**STAGES[name], config=SMALL, **options)


class UnderDeepSpeed:
    """The names of Fabric's methods, for scenarios that run by hand as well."""

    def __init__(self, name: str) -> None:
        self.fabric = Fabric(accelerator="cpu", devices=2, strategy=deepspeed(name))
        self.setup, self.backward = self.fabric.setup, self.fabric.backward
        self.no_backward_sync, self.mean = self.fabric.no_backward_sync, self.fabric.all_reduce

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.chunk(2)[self.fabric.global_rank]


def under(name: str, scenario: str) -> list[torch.Tensor]:
    run = UnderDeepSpeed(name)
    result = SCENARIOS[scenario](run)
    run.fabric.close()
    return result


def cells() -> list[Any]:
    """Every scenario under every stage; plain pytest takes two stages of each, every stage several times."""
    found = []
    names = list(STAGES)
    for number, scenario in enumerate(name for name in SCENARIOS if name != "two optimizers"):
        always = {names[number % len(names)], names[(number + 2) % len(names)]}
        found += [pytest.param(scenario, name, marks=() if name in always else pytest.mark.full) for name in names]
    return found


@pytest.mark.parametrize(("scenario", "name"), cells())
def test_every_scenario_does_as_one_process(ranks: RankPool, scenario: str, name: str) -> None:
    torch.manual_seed(0)
    expected = SCENARIOS[scenario](OneProcess())  # in float64; DeepSpeed works in float32
    for result in ranks.run(under, name, scenario):
        for mine, other in zip(result, expected, strict=True):
            torch.testing.assert_close(mine, other.float(), rtol=0, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Clip:
    """How gradients are clipped: arguments of ``clip_gradients``, and the same by hand."""

    max_norm: float | None = None
    norm_type: float = 2.0
    clip_val: float | None = None

    def by_hand(self, parameters: list[torch.Tensor]) -> float:
        if self.clip_val is not None:
            torch.nn.utils.clip_grad_value_(parameters, self.clip_val)
            return 0.0
        if self.max_norm is None:
            return 0.0
        return float(torch.nn.utils.clip_grad_norm_(parameters, self.max_norm, self.norm_type))


CLIPS = {"none": Clip(), "norm": Clip(0.1), "norm of order 1": Clip(0.1, 1.0), "value": Clip(clip_val=0.01)} | {
    "largest": Clip(0.01, float("inf"))
}


def train(name: str, precision: str, clip: Clip, devices: int = 2) -> tuple[list[float], list[torch.Tensor]]:
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=deepspeed(name), precision=precision)  # type: ignore[arg-type]
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    fabric.setup(model, optimizer)
    norms = []
    for step, x in enumerate(batches(8)):
        with fabric.no_backward_sync(model, enabled=step % 2 == 0):
            fabric.backward(model(x.chunk(devices)[fabric.global_rank]).pow(2).mean() / 2)
        if step % 2:
            norm = None
            if clip != Clip():
                norm = fabric.clip_gradients(model, optimizer, clip.clip_val, clip.max_norm, clip.norm_type)
            norms.append(0.0 if norm is None else float(norm))
            assert norm is None or type(norm) is torch.Tensor
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with fabric.strategy.holding_state([model], changes=False):
        values = [full(parameter) for parameter in model.parameters()]
    fabric.close()
    return norms, values


def train_by_hand(precision: str, clip: Clip) -> tuple[list[float], list[torch.Tensor]]:
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    norms = []
    for step, x in enumerate(batches(8)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            output = model(x)
        (output.float().pow(2).mean() / 2).backward()
        if step % 2:
            norms.append(clip.by_hand(list(model.parameters())))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return norms, [parameter.detach() for parameter in model.parameters()]


# bfloat16 has 8 bits: a weight that is rounded to it is off by up to 0.4 %, and so are gradients. DeepSpeed's own Adam
# takes the root in another order.
TOLERANCES = {"32-true": 2e-6, "bf16-mixed": 4e-3}


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("clip", ["norm"])
def test_training_equals_the_hand_written_loop(ranks: RankPool, name: str, precision: str, clip: str) -> None:
    norms, values = train_by_hand(precision, CLIPS[clip])
    for mine, weights in ranks.run(train, name, precision, CLIPS[clip]):
        assert mine == pytest.approx(norms, abs=TOLERANCES[precision])
        for one, other in zip(weights, values, strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCES[precision])


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("clip", ["none", "norm of order 1", "largest", "value"])
def test_clipping_is_that_of_one_process(ranks: RankPool, name: str, clip: str) -> None:
    norms, values = train_by_hand("32-true", CLIPS[clip])
    for mine, weights in ranks.run(train, name, "32-true", CLIPS[clip]):
        assert mine == pytest.approx(norms, rel=2e-6)
        for one, other in zip(weights, values, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def nonfinite(name: str) -> tuple[bool, bool]:
    run = UnderDeepSpeed(name)
    model = make_gpt()
    optimizer = sgd(model.parameters())
    run.setup(model, optimizer)
    good_steps(run, model, optimizer)
    before = [full(parameter) for parameter in model.parameters()]
    tokens, targets = map(run.share, token_batches(1)[0])
    run.backward(loss_of(model(tokens), targets) * (float("nan") if run.fabric.global_rank else 1.0))
    with pytest.raises(RuntimeError, match="non-finite"):
        run.fabric.clip_gradients(model, optimizer, max_norm=1.0)
    with pytest.raises(StrategyError, match="clipped already"):
        run.backward(loss_of(model(tokens), targets))
    after = [full(parameter) for parameter in model.parameters()]
    untouched = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    optimizer.zero_grad()
    recovered = all(parameter.isfinite().all() for parameter in good_steps(run, model, optimizer))
    run.fabric.close()
    return untouched, recovered


@pytest.mark.parametrize("name", STAGES)
def test_a_nan_on_one_rank_raises_on_all_and_changes_nothing(ranks: RankPool, name: str) -> None:
    assert ranks.run(nonfinite, name) == [(True, True)] * 2


def orders_of_backward(name: str, order: str) -> list[torch.Tensor]:
    """Gradients of one step, made in unusual ways; the weights after it."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy=deepspeed(name)) if name else None
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if fabric is not None:
        fabric.setup(model, optimizer)
    for _ in range(2):
        first, second = (x.chunk(2)[fabric.global_rank] if fabric else x for x in batches(2))
        one, two = model(first).pow(2).mean(), model(second).pow(2).mean()
        if order == "two forwards, two backwards":
            one.backward()
            two.backward()
        elif order == "two forwards, one backward":
            (one + two).backward()
        elif order == "one forward, two backwards":
            output = model(first)
            output.pow(2).mean().backward(retain_graph=True)
            output.sin().mean().backward()
        else:
            model(first).backward(torch.full_like(model(first), 1.0 / first.numel()))
        optimizer.step()
        optimizer.zero_grad()
    result = [full(parameter) for parameter in model.parameters()]
    if fabric is not None:
        fabric.close()
    return result


@pytest.mark.parametrize("name", ON_DEVICE)
@pytest.mark.parametrize(
    "order",
    ["two forwards, two backwards", "two forwards, one backward", "one forward, two backwards", "a gradient given"],
)
def test_backward_by_torch_in_any_order_adds_up(ranks: RankPool, name: str, order: str) -> None:
    expected = orders_of_backward("", order)
    for result in ranks.run(orders_of_backward, name, order):
        for mine, other in zip(result, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def left_out(name: str) -> tuple[bool, list[torch.Tensor]]:
    """One layer is used in the first step alone; whether the second one changed it, and all weights."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy=deepspeed(name)) if name else None
    torch.manual_seed(0)
    model = nn.ModuleDict({"always": nn.Linear(4, 4), "once": nn.Linear(4, 4)})
    holder = Chosen(model)
    optimizer = torch.optim.SGD(holder.parameters(), lr=0.1)
    if fabric is not None:
        fabric.setup(holder, optimizer)
    kept: list[torch.Tensor] = []
    for step, x in enumerate(batches(2)):
        holder(x.chunk(2)[fabric.global_rank] if fabric else x, ["always", "once"][: 2 - step]).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        kept.append(full(model["once"].weight))
    result = [full(parameter) for parameter in holder.parameters()]
    if fabric is not None:
        fabric.close()
    return torch.equal(*kept), result


class Chosen(nn.Module):
    def __init__(self, layers: nn.ModuleDict) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        for name in names:
            x = self.layers[name](x)
        return x


@pytest.mark.parametrize("name", STAGES)
def test_a_layer_that_a_step_leaves_out_is_not_stepped_on_again(ranks: RankPool, name: str) -> None:
    _, expected = left_out("")
    for was_kept, result in ranks.run(left_out, name):
        assert was_kept
        for mine, other in zip(result, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def without_local_rank(name: str) -> tuple[list[torch.Tensor], bool]:
    """What comes of some steps, and whether the variable is there afterwards."""
    told = os.environ.pop("LOCAL_RANK")
    try:
        return under(name, "a schedule made before setup"), "LOCAL_RANK" in os.environ
    finally:
        os.environ["LOCAL_RANK"] = told


@pytest.mark.parametrize("name", ["stage 1", "stage 3", "stage 3 offload"])
def test_ranks_of_a_launcher_that_sets_no_local_rank_train_too(ranks: RankPool, name: str) -> None:
    expected = ranks.run(under, name, "a schedule made before setup")[0]
    for result, is_left in ranks.run(without_local_rank, name):
        assert all(torch.equal(mine, other) for mine, other in zip(result, expected, strict=True))
        assert not is_left


def frozen_later(name: str) -> list[torch.Tensor]:
    """The first of two groups is frozen after two steps."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy=deepspeed(name)) if name else None
    model = make_net()
    groups = [{"params": model.first.parameters(), "lr": 0.01}, {"params": model.second.parameters(), "lr": 0.02}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.5)
    if fabric is not None:
        fabric.setup(model, optimizer)
    for step, x in enumerate(batches(4)):
        model.first.requires_grad_(step < 2)
        model(x.chunk(2)[fabric.global_rank] if fabric else x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    result = [full(parameter) for parameter in model.parameters()]
    if fabric is not None:
        fabric.close()
    return result


@pytest.mark.parametrize("name", STAGES)
def test_a_group_that_is_frozen_after_setup_stays_and_the_others_go_on(ranks: RankPool, name: str) -> None:
    expected = frozen_later("")
    for result in ranks.run(frozen_later, name):
        for mine, other in zip(result, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=2e-6)


def with_own_settings(own: dict[str, Any], **options: Any) -> tuple[str, list[torch.Tensor]]:
    """The kind of the optimizer that DeepSpeed steps, and all weights."""
    strategy = DeepSpeedStrategy(**options, config={"zero_optimization": own})
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    fabric.setup(model, optimizer)
    for x in batches(2):
        fabric.backward(model(x.chunk(2)[fabric.global_rank]).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    from fabric_lite.strategies.deepspeed.handle import handles_of

    (handle,) = handles_of([model])
    kind, result = type(handle.inner).__name__, [full(parameter) for parameter in model.parameters()]
    fabric.close()
    return kind, result


@pytest.mark.parametrize(
    ("own", "kind"),
    [
        ({"offload_optimizer": {"device": "none"}}, "AdamW"),
        ({"offload_optimizer": {"device": "cpu"}}, "DeepSpeedCPUAdam"),
        ({"compute_grad_norm": True}, "AdamW"),
    ],
    ids=str,
)
def test_what_the_configuration_says_of_offloading_is_done(ranks: RankPool, own: dict[str, Any], kind: str) -> None:
    [(found, weights), (_, same)] = ranks.run(with_own_settings, own)
    [(_, expected), _] = ranks.run(with_own_settings, {})
    assert found == kind
    for mine, its, other in zip(weights, same, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-6)
        assert torch.equal(mine, its)


ANY: dict[str, tuple[int, Any]] = {
    "single_device": (1, "single_device"),
    "ddp": (2, "ddp"),
    "fsdp": (2, FSDPStrategy(auto_wrap_policy={nn.Linear})),
    **{name: (2, name) for name in [*ON_DEVICE, "stage 3 offload"]},
}


def any_strategy(name: str) -> tuple[int, str | Strategy]:
    return (2, deepspeed(name)) if name in STAGES else ANY[name]


def train_and_save(name: str, path: str, start: str | None, steps: int, precision: str = "32-true") -> Any:
    devices, strategy = any_strategy(name)
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy, precision=precision)
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    fabric.setup(model, optimizer)
    state = {"model": model, "nested": {"optimizer": optimizer}, "scheduler": scheduler, "step": 0}
    if start is not None:
        fabric.load(start, state)
    first = state["step"]
    for x in batches(8)[first : first + steps]:
        fabric.backward(model(x.chunk(devices)[fabric.global_rank]).pow(2).mean())
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        state["step"] += 1
    fabric.save(path, state)
    held = [type(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    fabric.close()
    return scheduler.get_last_lr(), state["step"], set(held)


def run(ranks: RankPool, name: str, path: Path, *arguments: Any) -> dict[str, Any]:
    if name == "single_device":
        result = train_and_save(name, str(path), *arguments)
    else:
        result, _ = ranks.run(train_and_save, name, str(path), *arguments)
    assert result[2] == {nn.Parameter} or name == "fsdp"  # what a save or a load showed is put away again
    return {"last_lr": result[0], **checkpoint.load(path)}


def check_alike(one: dict[str, Any], other: dict[str, Any], rtol: float, atol: float) -> None:
    assert (one["last_lr"], one["step"]) == (other["last_lr"], other["step"])
    assert list(one["model"]) == list(other["model"])
    for key, value in one["model"].items():
        torch.testing.assert_close(value, other["model"][key], rtol=rtol, atol=atol)
    mine, theirs = (state["nested"]["optimizer"]["state"] for state in (one, other))
    assert mine.keys() == theirs.keys()
    for number, entry in mine.items():
        assert entry.keys() == theirs[number].keys()
        for key, value in entry.items():
            torch.testing.assert_close(value, theirs[number][key], rtol=rtol, atol=atol)


@pytest.mark.parametrize(("saved", "loaded"), [pair for pair in itertools.product(ANY, ANY) if set(pair) & set(STAGES)])
def test_a_checkpoint_of_one_layout_goes_on_under_any_other(
    ranks: RankPool, tmp_path: Path, saved: str, loaded: str
) -> None:
    whole = run(ranks, "single_device", tmp_path / "whole", None, 8)
    half = run(ranks, saved, tmp_path / "half", None, 4)
    resumed = run(ranks, loaded, tmp_path / "end", str(tmp_path / "half"), 4)
    assert list(half["model"]) == list(make_net().state_dict())
    # Adam divides by the root of tiny second moments, so the last bits of a mean over ranks grow.
    check_alike(resumed, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", STAGES)
def test_a_run_that_is_resumed_is_the_same_to_the_bit(
    ranks: RankPool, tmp_path: Path, name: str, precision: str
) -> None:
    whole = run(ranks, name, tmp_path / "whole", None, 8, precision)
    run(ranks, name, tmp_path / "half", None, 4, precision)
    resumed = run(ranks, name, tmp_path / "end", str(tmp_path / "half"), 4, precision)
    check_alike(resumed, whole, rtol=0, atol=0)


def write_both(name: str, folder: Path, precision: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=deepspeed(name), precision=precision)
    model = make_gpt()
    model.tokens.weight.requires_grad_(False)
    optimizer = sgd(parameter for parameter in model.parameters() if parameter.requires_grad)
    fabric.setup(model, optimizer)
    for tokens, targets in token_batches(2):
        fabric.backward(loss_of(model(tokens.chunk(2)[fabric.global_rank]), targets.chunk(2)[fabric.global_rank]))
        optimizer.step()
        optimizer.zero_grad()
    from fabric_lite.strategies.deepspeed.handle import handles_of

    (handle,) = handles_of([model])
    handle.engine.save_checkpoint(str(folder / "deepspeeds"), "here")
    fabric.save(folder / "ours", {"model": model})
    fabric.close()


def consolidated(folder: Path) -> dict[str, torch.Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found = get_fp32_state_dict_from_zero_checkpoint(str(folder), "here")
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", STAGES)
def test_what_is_saved_is_what_deepspeed_consolidates(
    ranks: RankPool, tmp_path: Path, name: str, precision: str
) -> None:
    ranks.run(write_both, name, tmp_path, precision)
    (expected,) = ranks.run(consolidated, tmp_path / "deepspeeds", ranks=1)
    ours = checkpoint.load(tmp_path / "ours")["model"]
    # DeepSpeed itself loses frozen parameters in stage 1.
    assert ours.keys() - expected.keys() == ({"tokens.weight"} if name == "stage 1" else set())
    assert expected.keys() <= ours.keys()
    for key, value in expected.items():
        assert torch.equal(ours[key].float(), value.float()), key


def failing_load(name: str, path: str) -> tuple[bool, str]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=deepspeed(name))
    model, other = make_net(), make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    fabric.setup(model, optimizer)
    fabric.save(path, {"model": nn.Linear(2, 2)})
    with pytest.raises(KeyError) as error:
        fabric.load(path, {"model": model, "optimizer": optimizer})
    same = all(torch.equal(full(mine), its) for mine, its in zip(model.parameters(), other.parameters(), strict=True))
    fabric.close()
    return same, str(error.value)


@pytest.mark.parametrize("name", ON_DEVICE)
def test_a_load_that_fails_changes_nothing(ranks: RankPool, tmp_path: Path, name: str) -> None:
    for same, said in ranks.run(failing_load, name, str(tmp_path / "other")):
        assert same
        assert "optimizer" in said


def continued(name: str) -> list[torch.Tensor]:
    """The optimizer has stepped before setup."""
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    fabric = None
    for step, x in enumerate(batches(6)):
        if step == 3 and name:
            fabric = Fabric(accelerator="cpu", devices=2, strategy=deepspeed(name))
            fabric.setup(model, optimizer)
        output = model(x.chunk(2)[fabric.global_rank] if fabric else x)
        output.pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    result = [full(parameter) for parameter in model.parameters()]
    if fabric is not None:
        fabric.close()
    return result


@pytest.mark.parametrize("name", [*ON_DEVICE, "stage 3 offload"])
def test_an_optimizer_that_has_stepped_before_goes_on(ranks: RankPool, name: str) -> None:
    expected = continued("")
    for result in ranks.run(continued, name):
        for mine, other in zip(result, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def save_at_once(name: str, path: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=deepspeed(name), precision="bf16-mixed")
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters())
    fabric.setup(model, optimizer)
    fabric.save(path, {"model": model})
    fabric.close()


@pytest.mark.parametrize("name", STAGES)
def test_values_in_float32_are_those_from_before_the_cast(ranks: RankPool, tmp_path: Path, name: str) -> None:
    ranks.run(save_at_once, name, str(tmp_path / "first"))
    for key, value in checkpoint.load(tmp_path / "first")["model"].items():
        assert torch.equal(value, make_net().state_dict()[key])


def statistics(name: str) -> list[torch.Tensor]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=deepspeed(name))
    torch.manual_seed(fabric.global_rank)  # ranks follow rank 0
    model = Normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    for number in range(4):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(2 * number + fabric.global_rank))
        with fabric.no_backward_sync(model, enabled=number % 2 == 0):
            fabric.backward(model(x).pow(3).mean())
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        result = [model(torch.ones(2, 4)), *(buffer.clone() for buffer in model.buffers())]
    fabric.close()
    return result


@pytest.mark.parametrize("name", ON_DEVICE)
def test_batch_norm_evaluates_alike_on_all_ranks(ranks: RankPool, name: str) -> None:
    first, second = ranks.run(statistics, name)
    assert all(torch.equal(mine, its) for mine, its in zip(first, second, strict=True))
    assert not torch.equal(first[1], Normed().norm.running_mean)


def refusals() -> list[str]:
    said = []

    def refused(setup: Any, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        with pytest.raises(StrategyError) as error:
            setup(model, *optimizers)
        said.append(str(error.value).splitlines()[0])

    fabric = Fabric(accelerator="cpu", devices=2, strategy=deepspeed("stage 2"))
    model, other = make_net(), make_net(1)
    refused(fabric.setup, model)
    refused(fabric.setup, model, sgd(model.first.parameters()), sgd(model.second.parameters()))
    refused(fabric.setup, model, sgd([*model.parameters(), *other.parameters()]))
    refused(fabric.setup, model, torch.optim.LBFGS(model.parameters()))
    model.first.requires_grad_(False)
    refused(fabric.setup, model, sgd(model.first.parameters()))
    model.first.requires_grad_(True)
    refused(fabric.setup, other.double(), sgd(other.parameters()))
    optimizer = sgd(model.parameters())
    fabric.setup(model, optimizer)
    for copying in (copy.deepcopy, pickle.dumps):
        with pytest.raises(StrategyError, match=r"fabric\.save"):
            copying(model)
    optimizer.step()  # without gradients: nothing
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), make_net().parameters(), strict=True))
    fabric.close()
    return said


def test_what_deepspeed_cannot_do_is_refused_at_setup(ranks: RankPool) -> None:
    one_optimizer = "DeepSpeed lays a model out together with the one optimizer that trains it."
    assert ranks.run(refusals)[0] == [
        one_optimizer,
        one_optimizer,
        "The optimizer holds parameters of other models too, and DeepSpeed steps on those of one.",
        "LBFGS cannot step on parts of parameters, flat and side by side, as DeepSpeed lays them out.",
        "The optimizer trains nothing, and DeepSpeed lays out what is trained at setup.",
        "DeepSpeed takes parameters of one dtype, float32 or bfloat16.",
    ]


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "64-true"])
def test_a_precision_without_a_way_is_refused_before_anything_starts(precision: str) -> None:
    with pytest.raises(StrategyError, match="bf16-mixed"):
        Fabric(accelerator="cpu", devices=2, strategy="deepspeed", precision=precision)


def test_one_process_trains_too(ranks: RankPool) -> None:
    norms, values = train_by_hand("32-true", CLIPS["norm"])
    ((mine, weights),) = ranks.run(train, "stage 3", "32-true", CLIPS["norm"], 1, ranks=1)
    assert mine == pytest.approx(norms, abs=1e-6)
    for one, other in zip(weights, values, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
