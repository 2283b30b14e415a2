"""What every strategy must do: each scenario once, as one process does it by hand and under each layout."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fabric_lite.testing import RankPool
from tests.distributed.layouts import (
    CONTEXT,
    GPT,
    LAYOUTS,
    VOCABULARY,
    loss_of,
    make_gpt,
    split_over_two_axes,
    token_batches,
)
from tests.models import RecordCollectives, full

NAMES = ["ddp 2", "fsdp 2", "fsdp_cpu_offload 2", "hsdp 2x2", "tensor parallel 2", "2-D 2x2"]
SHARDED = [name for name in NAMES if name != "ddp 2"]

Scenario = Callable[[Any], list[torch.Tensor]]


class OneProcess:
    """The oracle: plain PyTorch in float64 on the whole batch, under the names of Fabric's methods."""

    def setup(self, module: nn.Module, *optimizers: Any) -> None:
        module.double()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        return batch

    def mean(self, loss: torch.Tensor) -> torch.Tensor:
        return loss.detach()

    @contextlib.contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> Iterator[None]:
        """Nothing to hold back; as promised, an exception within leaves no gradient."""
        try:
            yield
        except BaseException:
            if enabled:
                module.zero_grad()
            raise


class ManyRanks:
    """The same names over a Fabric of one layout."""

    def __init__(self, layout: str) -> None:
        self.share = LAYOUTS[layout].share
        self.fabric = LAYOUTS[layout].fabric(precision="64-true")
        self.setup, self.backward = self.fabric.setup, self.fabric.backward
        self.no_backward_sync, self.mean = self.fabric.no_backward_sync, self.fabric.all_reduce


def loss_on(run: Any, model: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    tokens, targets = map(run.share, batch)
    return loss_of(model(tokens), targets)


def parameters_of(*models: nn.Module) -> list[torch.Tensor]:
    return [full(parameter) for model in models for parameter in model.parameters()]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def good_steps(run: Any, model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 2) -> list[torch.Tensor]:
    for batch in token_batches(count, seed=3):
        run.backward(loss_on(run, model, batch))
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(model)


# --- each of these runs by hand and under every layout ----------------------------------------------------------


def a_window_given_up(run: Any, clear: Callable[[nn.Module, torch.optim.Optimizer], None]) -> list[torch.Tensor]:
    model = make_gpt()
    optimizer = sgd(model.parameters())
    run.setup(model, optimizer)
    for batch in token_batches(2):
        with run.no_backward_sync(model):
            run.backward(loss_on(run, model, batch))
        clear(model, optimizer)
    return good_steps(run, model, optimizer)


def an_exception_in_a_window(run: Any, enabled: bool) -> list[torch.Tensor]:
    model = make_gpt()
    optimizer = sgd(model.parameters())
    run.setup(model, optimizer)
    with pytest.raises(KeyError), run.no_backward_sync(model, enabled=enabled):
        run.backward(loss_on(run, model, token_batches(1)[0]))
        raise KeyError
    return good_steps(run, model, optimizer)


class Fragile(GPT):
    """Raises between its layers when told to."""

    broken = False

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        if self.broken:
            raise KeyError
        return self.head(self.norm(self.layers[1](x)))


def an_exception_in_forward(run: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Fragile()
    optimizer = sgd(model.parameters())
    run.setup(model, optimizer)
    for enabled in (True, False):
        model.broken = True
        with pytest.raises(KeyError), run.no_backward_sync(model, enabled=enabled):
            loss_on(run, model, token_batches(1)[0])
        model.broken = False
        good_steps(run, model, optimizer)
    return parameters_of(model)


def a_window_without_an_end(run: Any) -> list[torch.Tensor]:
    """Steps only after backwards that synchronise, each with ``enabled=False`` or outside."""
    model = make_gpt()
    optimizer = sgd(model.parameters())
    run.setup(model, optimizer)
    for number, batch in enumerate(token_batches(4)):
        with run.no_backward_sync(model, enabled=number % 2 == 0), run.no_backward_sync(model, enabled=False):
            run.backward(loss_on(run, model, batch))
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    return good_steps(run, model, optimizer)


def interleaved_models(run: Any) -> list[torch.Tensor]:
    """One accumulates while the other synchronises, and their backwards run in the other order."""
    models = [make_gpt(seed) for seed in range(2)]
    optimizers = [sgd(model.parameters()) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        run.setup(model, optimizer)
    for number, batch in enumerate(token_batches(4)):
        with run.no_backward_sync(models[0], enabled=number % 2 == 0):
            first, second = (loss_on(run, model, batch) for model in models)
            run.backward(second)
            run.backward(first)
        optimizers[1].step()
        optimizers[1].zero_grad()
        if number % 2:
            optimizers[0].step()
            optimizers[0].zero_grad()
    return parameters_of(*models)


def two_optimizers(run: Any) -> list[torch.Tensor]:
    """On disjoint parts of one model; the second steps every other time, on two gradients."""
    model = make_gpt()
    first, second = sgd(model.layers.parameters()), torch.optim.AdamW(
        [p for name, p in model.named_parameters() if not name.startswith("layers")], lr=0.01
    )  # fmt: skip
    run.setup(model, first, second)
    for number, batch in enumerate(token_batches(4)):
        run.backward(loss_on(run, model, batch))
        for optimizer in (first, second)[: 1 + number % 2]:
            optimizer.step()
            optimizer.zero_grad()
    return parameters_of(model)


class Judge(nn.Module):
    """Whether a sequence of probabilities over the vocabulary is real."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(VOCABULARY, 16), nn.Linear(16, 16)
        self.verdict = nn.Linear(16, 1)

    def forward(self, probabilities: torch.Tensor) -> torch.Tensor:
        return self.verdict(torch.tanh(self.down(torch.tanh(self.up(probabilities)))))


def a_game_of_two_models(run: Any) -> list[torch.Tensor]:
    """Each with its optimizer; the judge is frozen while the writer learns, and its gradients are cleared by nobody."""
    writer = make_gpt()
    judge = Judge()
    first, second = sgd(writer.parameters()), sgd(judge.parameters())
    run.setup(writer, first)
    run.setup(judge, second)
    for batch in token_batches(3):
        tokens, targets = map(run.share, batch)
        judge.requires_grad_(False)
        run.backward(-judge(writer(tokens).softmax(-1)).mean())
        first.step()
        first.zero_grad()
        judge.requires_grad_(True)
        real = nn.functional.one_hot(targets, VOCABULARY).double()
        run.backward((judge(writer(tokens).softmax(-1).detach()) - judge(real)).mean())
        second.step()
        second.zero_grad()
    return parameters_of(writer, judge)


def frozen_parameters(run: Any) -> list[torch.Tensor]:
    model = make_gpt()
    for part in (model.tokens, model.layers[0].attention, model.layers[1].up, model.norm):
        part.requires_grad_(False)
    optimizer = sgd(parameter for parameter in model.parameters() if parameter.requires_grad)
    run.setup(model, optimizer)
    good_steps(run, model, optimizer)
    assert torch.equal(full(model.tokens.weight).float(), make_gpt().tokens.weight)
    assert model.tokens.weight.grad is None
    return parameters_of(model)


def a_teacher(run: Any) -> list[torch.Tensor]:
    teacher, student = make_gpt(1).requires_grad_(False), make_gpt()
    optimizer = sgd(student.parameters())
    run.setup(teacher)
    run.setup(student, optimizer)
    for tokens, _ in token_batches(2):
        tokens = run.share(tokens)
        run.backward((student(tokens) - teacher(tokens)).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    assert (full(student.head.weight) - make_gpt().head.weight).norm() > 1e-3
    return parameters_of(teacher, student)


class Trained(GPT):
    def training_step(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return loss_of(self(tokens), targets)


def a_method_that_calls_the_model(run: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Trained()
    optimizer = sgd(model.parameters())
    run.setup(model, optimizer)
    for batch in token_batches(2):
        run.backward(model.training_step(*map(run.share, batch)))
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(model)


def a_schedule_made_before(run: Any) -> list[torch.Tensor]:
    model = make_gpt()
    optimizer = sgd(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)  # changes momentum as well
    run.setup(model, optimizer)
    rates = []
    for batch in token_batches(3):
        run.backward(loss_on(run, model, batch))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        rates.append(torch.tensor([optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]]))
    assert len({float(rate[0]) for rate in rates}) == 3
    return [*rates, *parameters_of(model)]


def steps_by_closure(run: Any) -> list[torch.Tensor]:
    model = make_gpt()
    optimizer = sgd(model.parameters())
    run.setup(model, optimizer)

    def closure(batch: Any) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_on(run, model, batch)
        run.backward(loss)
        return loss

    losses = [run.mean(optimizer.step(functools.partial(closure, batch))) for batch in token_batches(3)]
    return [*(loss.detach() for loss in losses), *parameters_of(model)]


SCENARIOS: dict[str, Scenario] = {
    "a window given up, cleared by the optimizer": lambda run: a_window_given_up(run, lambda _, o: o.zero_grad()),
    "a window given up, cleared by the model": lambda run: a_window_given_up(run, lambda m, _: m.zero_grad()),
    "an exception in a window": lambda run: an_exception_in_a_window(run, True),
    "an exception in no window": lambda run: an_exception_in_a_window(run, False),
    "an exception in forward": an_exception_in_forward,
    "windows that follow each other": a_window_without_an_end,
    "interleaved models": interleaved_models,
    "two optimizers": two_optimizers,
    "a game of two models": a_game_of_two_models,
    "frozen parameters": frozen_parameters,
    "a teacher": a_teacher,
    "a method that calls the model": a_method_that_calls_the_model,
    "a schedule made before setup": a_schedule_made_before,
    "steps by closure": steps_by_closure,
}


def under(layout: str, scenario: str) -> list[torch.Tensor]:
    run = ManyRanks(layout)
    result = SCENARIOS[scenario](run)
    run.fabric.close()
    return result


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_layout_does_as_one_process(ranks: RankPool, layout: str, scenario: str) -> None:
    torch.manual_seed(0)
    expected = SCENARIOS[scenario](OneProcess())
    for result in ranks.run(under, layout, scenario, ranks=LAYOUTS[layout].ranks):
        for mine, other in zip(result, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


# --- what one process has no counterpart for --------------------------------------------------------------------


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


class Initialised(GPT):
    """Its values come from everywhere: the layers' own, torch.nn.init, a direct write, and a computed buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(CONTEXT, CONTEXT).tril() * torch.rand(1))
        self.scale = nn.Parameter(torch.randn(WIDE) * 0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.1)
        with torch.no_grad():
            self.positions.weight[0].fill_(1.0)


WIDE = 6


def made_in_place(layout: str, empty_init: bool | None, precision: str) -> tuple[bool, list[torch.Tensor]]:
    fabric = LAYOUTS[layout].fabric(precision=precision)
    torch.manual_seed(0)
    with fabric.init_module(empty_init=empty_init):
        model = Initialised()
    was_whole = not any(parameter.is_meta for parameter in model.parameters())
    fabric.setup(model)
    values = [full(tensor) for tensor in model.state_dict().values()]
    fabric.close()
    return was_whole, values


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
@pytest.mark.parametrize(("layout", "empty_init"), [(n, None) for n in NAMES] + [(n, True) for n in SHARDED])
def test_a_module_made_in_place_has_the_values_of_a_plain_one(
    ranks: RankPool, layout: str, empty_init: bool | None, precision: str
) -> None:
    dtype = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        expected = list(Initialised().state_dict().values())
    finally:
        torch.set_default_dtype(torch.float32)
    for was_whole, values in ranks.run(made_in_place, layout, empty_init, precision, ranks=LAYOUTS[layout].ranks):
        assert was_whole is (empty_init is None)
        for mine, plain in zip(values, expected, strict=True):
            assert mine.dtype == plain.dtype
            assert torch.equal(mine, plain)


def by_hand(layout: str, mesh: Any) -> tuple[Any, Callable[[bool], contextlib.AbstractContextManager[Any]]]:
    """The same layout in plain PyTorch, and what is around a micro-step, told whether it synchronises."""
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
