"""What a user's script may do: each scenario is written once, and runs by hand on one process or under a layout."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.layouts import GPT, LAYOUTS, VOCABULARY, loss_of, make_gpt, token_batches
from tests.models import full

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
    """Steps only after backwards that synchronize, each with ``enabled=False`` or outside."""
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
    """One accumulates while the other synchronizes, and their backwards run in the other order."""
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
        real = nn.functional.one_hot(targets, VOCABULARY).to(judge.up.weight.dtype)
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
