"""What every strategy must do: as one process does it by hand, and what one process has no counterpart for."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fabric_lite import StrategyError
from fabric_lite.testing import RankPool
from tests.distributed.layouts import (
    CONTEXT,
    GPT,
    LAYOUTS,
    loss_of,
    make_gpt,
    pairwise,
    split_over_two_axes,
    token_batches,
)
from tests.distributed.scenarios import SCENARIOS, ManyRanks, OneProcess, good_steps, loss_on, parameters_of, sgd
from tests.models import RecordCollectives, full

NAMES = ["ddp 2", "fsdp 2", "fsdp_cpu_offload 2", "hsdp 2x2", "tensor parallel 2", "2-D 2x2"]
SHARDED = [name for name in NAMES if name != "ddp 2"]


def under(layout: str, scenario: str) -> list[torch.Tensor]:
    run = ManyRanks(layout)
    result = SCENARIOS[scenario](run)
    run.fabric.close()
    return result


def cells() -> list[Any]:
    """Every scenario under every layout; plain pytest takes two layouts of each, every layout several times."""
    found = []
    for number, scenario in enumerate(SCENARIOS):
        always = {NAMES[number % len(NAMES)], NAMES[(number + 1) % len(NAMES)]}
        found += [
            pytest.param(scenario, layout, marks=() if layout in always else pytest.mark.full) for layout in NAMES
        ]
    return found


@pytest.mark.parametrize(("scenario", "layout"), cells())
def test_every_layout_does_as_one_process(ranks: RankPool, scenario: str, layout: str) -> None:
    torch.manual_seed(0)
    expected = SCENARIOS[scenario](OneProcess())
    for result in ranks.run(under, layout, scenario, ranks=LAYOUTS[layout].ranks):
        for mine, other in zip(result, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def train_with_a_nan(layout: str, where: str) -> tuple[bool, bool]:
    """On the last rank a NaN in the loss, or in this rank's part of one gradient; return what held."""
    run = ManyRanks(layout)
    model = make_gpt()
    optimizer = sgd(model.parameters())
    run.setup(model, optimizer)
    good_steps(run, model, optimizer)
    before = parameters_of(model)
    is_last = run.fabric.global_rank == run.fabric.world_size - 1
    run.backward(loss_on(run, model, token_batches(1)[0]) * (float("nan") if is_last and where == "loss" else 1.0))
    if is_last and where == "gradient":
        gradient: Any = model.layers[0].up.weight.grad
        gradient.to_local()[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="non-finite"):
        run.fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=True)
    untouched = all(torch.equal(a, b) for a, b in zip(before, parameters_of(model), strict=True))
    optimizer.zero_grad()
    recovered = all(parameter.isfinite().all() for parameter in good_steps(run, model, optimizer))
    run.fabric.close()
    return untouched, recovered


@pytest.mark.parametrize(("layout", "where"), [(n, "loss") for n in NAMES] + [(n, "gradient") for n in SHARDED])
def test_a_nan_on_one_rank_raises_on_all_and_changes_nothing(ranks: RankPool, layout: str, where: str) -> None:
    count = LAYOUTS[layout].ranks
    assert ranks.run(train_with_a_nan, layout, where, ranks=count) == [(True, True)] * count


class Normed(nn.Module):
    """Linear layers of which a plan of tensor parallelism takes two, and two kinds of running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.BatchNorm1d(8), nn.Linear(16, 8)
        self.last = nn.BatchNorm1d(8, momentum=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.down(torch.tanh(self.up(self.norm(x)))))


def evaluate_batch_norm(layout: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Normed()
    share, fabric = LAYOUTS[layout].share, LAYOUTS[layout].fabric()
    optimizer = sgd(model.parameters())
    fabric.setup(model, optimizer)
    for number in range(4):
        x = share(torch.randn(16, 8, generator=torch.Generator().manual_seed(number)))
        with fabric.no_backward_sync(model, enabled=number % 2 == 0):
            fabric.backward(model(x).pow(3).mean())
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        result = [model(torch.ones(2, 8)), *(buffer.clone() for buffer in model.buffers())]
    fabric.close()
    return result


@pytest.mark.parametrize("layout", NAMES)
def test_batch_norm_evaluates_alike_on_all_ranks(ranks: RankPool, layout: str) -> None:
    first, *others = ranks.run(evaluate_batch_norm, layout, ranks=LAYOUTS[layout].ranks)
    assert first[3] == 4  # batches tracked
    assert not torch.equal(first[1], Normed().norm.running_mean)
    for other in others:
        assert all(torch.equal(mine, its) for mine, its in zip(first, other, strict=True))


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    extras: dict[str, Any]


class Nested(GPT):
    def forward(self, tokens: torch.Tensor) -> Any:  # type: ignore[override]
        logits = super().forward(tokens)
        hidden = self.head(self.norm(self.tokens(tokens)))
        return {"output": Output(logits, {"hidden": [hidden, (hidden.argmax(-1), None)], "length": tokens.shape[1]})}


def nested_outputs(layout: str) -> list[Any]:
    torch.manual_seed(0)
    model = Nested()
    share, fabric = LAYOUTS[layout].share, LAYOUTS[layout].fabric(precision="bf16-mixed")
    optimizer = sgd(model.parameters())
    fabric.setup(model, optimizer)
    tokens, targets = map(share, token_batches(1)[0])
    output = model(tokens)["output"]
    fabric.backward(loss_of(output.logits, targets) + output.extras["hidden"][0].pow(2).mean())
    hidden, (best, nothing) = output.extras["hidden"]
    found = [type(output) is Output, output.logits.dtype, hidden.dtype, best.dtype, nothing, output.extras["length"]]
    # Rounded to bfloat16 on the way: the computation itself was not in float32.
    found.append(torch.equal(output.logits, output.logits.bfloat16().float()))
    found.append({parameter.grad.dtype for parameter in model.parameters()})  # type: ignore[union-attr]
    fabric.close()
    return found


@pytest.mark.parametrize("layout", NAMES)
def test_nested_outputs_of_mixed_precision_are_float32(ranks: RankPool, layout: str) -> None:
    expected = [True, torch.float32, torch.float32, torch.int64, None, CONTEXT, True, {torch.float32}]
    count = LAYOUTS[layout].ranks
    assert ranks.run(nested_outputs, layout, ranks=count) == [expected] * count


class Initialized(GPT):
    """Its values come from everywhere: the layers' own, torch.nn.init, a direct write, and a computed buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(CONTEXT, CONTEXT).tril() * torch.rand(1))
        self.scale = nn.Parameter(torch.randn(6) * 0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.1)
        with torch.no_grad():
            self.positions.weight[0].fill_(1.0)


def made_in_place(layout: str, empty_init: bool | None, precision: str) -> tuple[bool, list[torch.Tensor]]:
    fabric = LAYOUTS[layout].fabric(precision=precision)
    torch.manual_seed(0)
    with fabric.init_module(empty_init=empty_init):
        model = Initialized()
    was_whole = not any(parameter.is_meta for parameter in model.parameters())
    fabric.setup(model)
    values = [full(tensor) for tensor in model.state_dict().values()]
    fabric.close()
    return was_whole, values


# Without a sharded layout, empty_init leaves whatever memory held.
MADE_IN_PLACE = [
    cell
    for cell in itertools.product(NAMES, [None, True], ["32-true", "bf16-true", "64-true"])
    if cell[0] in SHARDED or cell[1] is None
]


@pytest.mark.parametrize(("layout", "empty_init", "precision"), pairwise(MADE_IN_PLACE))
def test_a_module_made_in_place_has_the_values_of_a_plain_one(
    ranks: RankPool, layout: str, empty_init: bool | None, precision: str
) -> None:
    dtype = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        expected = list(Initialized().state_dict().values())
    finally:
        torch.set_default_dtype(torch.float32)
    for was_whole, values in ranks.run(made_in_place, layout, empty_init, precision, ranks=LAYOUTS[layout].ranks):
        assert was_whole is (empty_init is None)
        for mine, plain in zip(values, expected, strict=True):
            assert mine.dtype == plain.dtype
            assert torch.equal(mine, plain)


def pretrained(layout: str, when: str, path: Path) -> tuple[list[torch.Tensor], str]:
    """Weights of a file in a model made without memory; return them, and what was said where it can't be so."""
    fabric = LAYOUTS[layout].fabric(precision="64-true")
    said = ""
    with fabric.init_module(empty_init=True):
        model = Initialized()
    weights = torch.load(path, weights_only=True)
    if when == "written before":
        with pytest.warns(UserWarning, match="no-op"):
            model.load_state_dict(weights)
    if when == "assigned before":
        model.load_state_dict(weights, assign=True)
    if when == "made elsewhere":
        with torch.device("meta"):
            model = Initialized()
    try:
        fabric.setup(model)
        if when == "after":
            fabric.load_raw(path, model)
        values = [full(tensor) for tensor in model.state_dict().values()]
    except StrategyError as error:
        said, values = str(error), []
    fabric.close()
    return values, said


def written_weights(path: Path) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model = Initialized().double()
    torch.save(model.state_dict(), path)
    return list(model.state_dict().values())


@pytest.mark.parametrize("layout", ["fsdp 2", "tensor parallel 2"])
@pytest.mark.parametrize("when", ["after", "assigned before"])
def test_weights_of_a_file_reach_a_model_made_without_memory(
    ranks: RankPool, tmp_path: Path, layout: str, when: str
) -> None:
    expected = written_weights(tmp_path / "weights.pt")
    for values, said in ranks.run(pretrained, layout, when, tmp_path / "weights.pt", ranks=LAYOUTS[layout].ranks):
        assert said == ""
        for mine, saved in zip(values, expected, strict=True):
            assert torch.equal(mine, saved)


@pytest.mark.parametrize("when", ["written before", "made elsewhere"])
def test_weights_written_where_there_is_no_memory_yet_are_told_the_ways_that_work(
    ranks: RankPool, tmp_path: Path, when: str
) -> None:
    written_weights(tmp_path / "weights.pt")
    for _, said in ranks.run(pretrained, "fsdp 2", when, tmp_path / "weights.pt", ranks=2):
        ways = said.partition("Try: ")[2]
        assert "after setup" in ways
        assert "fabric.load_raw(" in ways
        assert "fabric.load()" in ways
        assert ("load_state_dict(..., assign=True) before it" in ways) is (when == "written before")


def by_hand(layout: str, mesh: Any) -> tuple[Any, Callable[[bool], contextlib.AbstractContextManager[Any]]]:
    """The same layout in plain PyTorch, and what is around a micro-step, told whether it synchronizes."""
    from torch.distributed.fsdp import fully_shard

    model: Any = make_gpt().double()
    if layout == "ddp 2":
        model = DistributedDataParallel(model)
        return model, lambda last: contextlib.nullcontext() if last else model.no_sync()
    axes = mesh.mesh_dim_names
    if "tensor_parallel" in axes:
        model = split_over_two_axes(model, mesh)
    if layout == "tensor parallel 2":
        return model, lambda _: contextlib.nullcontext()
    for part in [*model.layers, model]:
        fully_shard(part, mesh=mesh["data_parallel"] if "tensor_parallel" in axes else mesh)

    def around(last: bool) -> contextlib.AbstractContextManager[Any]:
        model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    return model, around


def window(model: Any, around: Callable[[bool], contextlib.AbstractContextManager[Any]], share: Any) -> Any:
    """The collectives of three micro-steps."""
    with RecordCollectives() as record:
        for number, batch in enumerate(token_batches(3)):
            tokens, targets = map(share, batch)
            with around(number == 2):
                loss_of(model(tokens), targets).backward()
    return record.calls


def collectives_of_windows(layout: str) -> tuple[Any, Any]:
    run = ManyRanks(layout)
    model = make_gpt()
    optimizer = sgd(model.parameters())
    run.setup(model, optimizer)
    raw, around_raw = by_hand(layout, run.fabric.device_mesh)

    def around(last: bool) -> contextlib.AbstractContextManager[Any]:
        return run.no_backward_sync(model, enabled=not last)

    for _ in range(2):  # after the first, DDP arranges its buckets anew; and a plan's gradients are checked in it
        window(model, around, run.share)
        window(raw, around_raw, run.share)
    optimizer.step()
    optimizer.zero_grad()
    result = window(model, around, run.share), window(raw, around_raw, run.share)
    run.fabric.close()
    return result


@pytest.mark.parametrize("layout", NAMES)
def test_a_window_has_the_collectives_of_plain_pytorch(ranks: RankPool, layout: str) -> None:
    ours, theirs = ranks.run(collectives_of_windows, layout, ranks=LAYOUTS[layout].ranks)[0]
    names = [name for name, _ in ours]
    groups, micro_steps, rows = 3, 3, 4  # of parameters: two layers and the root; outputs that rows add up
    assert ours == theirs
    scatters = 0 if layout in ("ddp 2", "tensor parallel 2") else groups
    assert sum("reduce_scatter" in name for name in names) == scatters  # once, at the end of the window
    if layout == "ddp 2":
        assert len(names) == 1
    if "tensor" in layout or layout.startswith("2-D"):
        assert sum("all_reduce" in name for name in names) >= micro_steps * rows
