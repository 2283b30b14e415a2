"""DDP on two ranks: gradients equal one process fed both ranks' batches, whichever way the model is called."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fabric_lite import DDPStrategy, Fabric, FabricRuntimeError, StrategyError
from fabric_lite.testing import RankPool
from tests.models import CountCollectives, Net, Normed, batches, make_net, weights


def doubled(model: nn.Module) -> None:
    model.forward = lambda x: Net.forward(model, x) * 2  # type: ignore[method-assign, arg-type]


# Each way of running the model: the call, what is done to the model after setup, and how it is compiled.
WAYS: dict[str, tuple[Callable[..., Any], Callable[[nn.Module], None] | None, str]] = {
    "model(x)": (lambda model, x: model(x), None, ""),
    "model.forward(x)": (lambda model, x: model.forward(x), None, ""),
    "a method that calls self(x)": (lambda model, x: model.training_step(x), None, ""),
    "a forward assigned late": (lambda model, x: model(x), doubled, ""),
    "a forward assigned late, by hand": (lambda model, x: model.forward(x), doubled, ""),
    "recursion": (lambda model, x: model(x, 2), None, ""),
    "checkpoint": (lambda model, x: checkpoint(model, x, use_reentrant=False), None, ""),
    "reentrant checkpoint": (
        lambda model, x: checkpoint(model, x.clone().requires_grad_(), use_reentrant=True), None, ""
    ),
    "checkpointed recursion": (lambda model, x: checkpoint(model, x, 2, use_reentrant=False), None, ""),
    "model.compile() before": (lambda model, x: model(x), None, "inner before"),
    "model.compile() after": (lambda model, x: model(x), None, "inner after"),
    "model.compile() before, forward by hand": (lambda model, x: model.forward(x), None, "inner before"),
    "torch.compile(model) before": (lambda model, x: model(x), None, "outer before"),
    "torch.compile(model) before, forward by hand": (lambda model, x: model.forward(x), None, "outer before"),
    "torch.compile(model) after": (lambda model, x: model(x), None, "outer after"),
    "compiled recursion": (lambda model, x: model(x, 1), None, "inner before"),
}  # fmt: skip


def gradient_error(way: str) -> float:
    call, change, compiled = WAYS[way]
    fabric = Fabric(accelerator="cpu", devices=2)
    raw, model = make_net(), make_net()
    target: Any = model
    full_graph = {"backend": "aot_eager", "fullgraph": True}
    if compiled == "inner before":
        model.compile(**full_graph)
    if compiled == "outer before":
        target = torch.compile(model, **full_graph)
    fabric.setup(target)
    if compiled == "inner after":
        model.compile(**full_graph)
    if compiled == "outer after":
        target = torch.compile(model, backend="aot_eager")
    if change is not None:
        change(model)
        change(raw)
    halves = batches(2, 4)
    for _ in range(2):  # DDP's own errors show only in the second step
        target.zero_grad()
        fabric.backward(call(target, halves[fabric.global_rank]).pow(2).mean())
    for half in halves:
        (call(raw, half).pow(2).mean() / 2).backward()
    torch._dynamo.reset()
    return max(
        float((mine.grad - other.grad).abs().max())  # type: ignore[operator]
        for mine, other in zip(model.parameters(), raw.parameters(), strict=True)
    )


@pytest.mark.parametrize("way", WAYS)
def test_gradients_equal_one_process_in_every_way_of_running_the_model(ranks: RankPool, way: str) -> None:
    # 1e-7: the mean over ranks and the mean over the batch round differently in the last bit.
    assert max(ranks.run(gradient_error, way)) <= 1e-7


def compiled_frames(kind: str) -> int:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model: Any = make_net()
    if kind != "after":
        model.compile(backend=counter, fullgraph=True)
    target = DistributedDataParallel(model) if kind == "raw" else Fabric(accelerator="cpu", devices=2).setup(model)
    if kind == "after":
        model.compile(backend=counter, fullgraph=True)
    for x in batches(3):
        target(x).pow(2).mean().backward()
    torch._dynamo.reset()
    return int(counter.frame_count)


def test_compiling_before_or_after_setup_gives_as_many_frames_as_raw_ddp(ranks: RankPool) -> None:
    raw = ranks.run(compiled_frames, "raw")
    assert ranks.run(compiled_frames, "before") == ranks.run(compiled_frames, "after") == raw == [1, 1]


def evaluate_batch_norm(precision: str) -> Any:
    fabric = Fabric(accelerator="cpu", devices=2, precision=precision)
    torch.manual_seed(0)
    model = Normed()
    fabric.setup(model)
    torch.manual_seed(fabric.global_rank)
    for step in range(4):
        with fabric.no_backward_sync(model, enabled=step % 2 == 0):
            fabric.backward(model(torch.randn(8, 4)).sum())
    model.eval()
    with torch.no_grad():
        return model(torch.ones(2, 4)), list(model.buffers())


def test_batch_norm_evaluates_alike_on_all_ranks(ranks: RankPool) -> None:
    (first, buffers), (second, others) = ranks.run(evaluate_batch_norm, "32-true")
    assert torch.equal(first, second)
    assert all(torch.equal(mine, other) for mine, other in zip(buffers, others, strict=True))
    assert buffers[2] == 4


def rank_zero_evaluates_alone() -> float:
    fabric = Fabric(accelerator="cpu", devices=2)
    model = fabric.setup(Normed())
    model(torch.randn(4, 4)).sum().backward()
    if fabric.is_global_zero:
        with torch.no_grad():
            for _ in range(3):
                model(torch.ones(4, 4))
    return float(fabric.all_reduce(1.0, reduce_op="sum"))


def test_rank_zero_may_evaluate_alone(ranks: RankPool) -> None:
    assert ranks.run(rank_zero_evaluates_alone) == [2.0, 2.0]


def guarded_method() -> tuple[str, float]:
    fabric = Fabric(accelerator="cpu", devices=2)
    raw, model = make_net(), make_net()
    fabric.setup(model)
    halves = batches(2, 4)
    try:
        model.by_layers(halves[fabric.global_rank])
    except StrategyError as error:
        message = str(error)
    with torch.no_grad():
        model.by_layers(halves[0])  # nothing to synchronize
    model.mark_forward_method("by_layers")
    model.by_layers(halves[fabric.global_rank]).backward()
    for half in halves:
        (raw.by_layers(half) / 2).backward()
    assert not model.second._forward_pre_hooks
    return message, float((model.first.weight.grad - raw.first.weight.grad).abs().max())


def test_a_method_that_runs_layers_directly_is_refused_until_it_is_marked(ranks: RankPool) -> None:
    for message, error in ranks.run(guarded_method):
        assert "Net.by_layers()" in message
        assert "mark_forward_method('by_layers')" in message
        assert error <= 1e-7


class Outer(nn.Module):
    """Holds a model that is set up itself, makes copies of itself, and has a branch that is wrong only sometimes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def target(self) -> Outer:
        return copy.deepcopy(self)

    def step(self, x: torch.Tensor, around: bool) -> torch.Tensor:
        loss = self(x).mean()
        return loss + self.head(x).mean() if around else loss


def methods_of_all_kinds() -> None:
    fabric = Fabric(accelerator="cpu", devices=2)
    inner = fabric.setup(make_net())
    outer = fabric.setup(Outer(inner))
    x = batches(1)[0]
    outer.encode(x).sum().backward()  # the inner one synchronizes by itself
    other = outer.target()
    other(x).sum().backward()  # a plain copy, without anything that was set up
    assert not any(module._forward_pre_hooks for module in other.modules())
    outer.step(x, around=False)
    with pytest.raises(StrategyError, match=r"Outer\.step\(\) runs Linear"):
        outer.step(x, around=True)


def test_the_guard_of_methods_sees_branches_and_leaves_copies_and_set_up_children_alone(ranks: RankPool) -> None:
    ranks.run(methods_of_all_kinds)


def frames_of_a_method(kind: str) -> int:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model = make_net()
    model.compile(backend=counter)
    target: Any = DistributedDataParallel(model) if kind == "raw" else Fabric(accelerator="cpu", devices=2).setup(model)
    for x in batches(4):
        loss = target(x).pow(2).mean() if kind == "raw" else target.training_step(x)
        loss.backward()
    torch._dynamo.reset()
    return int(counter.frame_count)


def test_a_method_of_a_compiled_model_compiles_it_once(ranks: RankPool) -> None:
    assert ranks.run(frames_of_a_method, "fabric") == ranks.run(frames_of_a_method, "raw") == [1, 1]


def close_one_of_two() -> float:
    first, second = (Fabric(accelerator="cpu", devices=2) for _ in range(2))
    first.close()
    model = second.setup(make_net())
    model(torch.full((2, 4), float(second.global_rank))).sum().backward()
    return float(second.all_reduce(model.second.weight.grad.sum(), reduce_op="max") - model.second.weight.grad.sum())  # type: ignore[union-attr]


def test_closing_one_fabric_leaves_the_others_connected(ranks: RankPool) -> None:
    assert ranks.run(close_one_of_two) == [0.0, 0.0]


class Ways(Net):
    def chunks(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        yield self.second(self.first(x)).pow(2).mean()


AROUND: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "submodules in the script": lambda model, x: model.second(model.first(x)).pow(2).mean(),
    "a loop over children": lambda model, x: [x := child(x) for child in model.children()][-1].pow(2).mean(),
    "a generator method": lambda model, x: next(model.chunks(x)),
    "weights by hand": lambda model, x: nn.functional.linear(x, model.first.weight).pow(2).mean(),
}


def step_around_the_engine(way: str) -> str:
    fabric = Fabric(accelerator="cpu", devices=2)
    model = Ways()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    fabric.backward(model(batches(1)[0]).pow(2).mean())
    optimizer.step()
    optimizer.zero_grad()
    before = weights(model)
    fabric.backward(AROUND[way](model, batches(1)[0]))
    with pytest.raises(StrategyError) as error:
        optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(before, weights(model), strict=True))
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()  # zeros are nothing to synchronize
    return str(error.value)


@pytest.mark.parametrize("way", AROUND)
def test_a_step_on_gradients_that_went_around_the_engine_is_refused(ranks: RankPool, way: str) -> None:
    for message in ranks.run(step_around_the_engine, way):
        assert "were not synchronized" in message
        assert "model(...)" in message


def unfreeze_late() -> None:
    fabric = Fabric(accelerator="cpu", devices=2)
    model = make_net()
    model.first.requires_grad_(False)
    fabric.setup(model)
    model(torch.ones(2, 4)).sum().backward()
    model.first.requires_grad_(True)
    with pytest.raises(StrategyError, match=r"2 that were frozen.*\n.*fabric\.release"):
        model(torch.ones(2, 4))
    fabric.release(model)
    fabric.setup(model)
    model(torch.ones(2, 4)).sum().backward()
    assert model.first.weight.grad is not None


def test_parameters_unfrozen_after_setup_are_refused_until_it_is_set_up_again(ranks: RankPool) -> None:
    ranks.run(unfreeze_late)


def leave_parameters_unused() -> str:
    fabric = Fabric(accelerator="cpu", devices=2)
    model = fabric.setup(make_net())
    model.forward = lambda x: model.first(x)
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(StrategyError) as error:
        model(torch.ones(2, 4))
    return str(error.value)


def test_unused_parameters_name_the_strategy_that_takes_them(ranks: RankPool) -> None:
    for message in ranks.run(leave_parameters_unused):
        assert "ddp_find_unused_parameters_true" in message


def collectives_per_step(kind: str, normed: bool) -> Any:
    torch.manual_seed(0)
    model: Any = Normed() if normed else Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if kind == "fabric":
        fabric = Fabric(accelerator="cpu", devices=2)
        fabric.setup(model, optimizer)
        target = model
    else:
        target = DistributedDataParallel(model)

    def step() -> None:
        loss = target(batches(1)[0]).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    step()
    with CountCollectives() as counted:
        for _ in range(3):
            step()
    return counted.count, weights(model)


@pytest.mark.parametrize("normed", [False, True])
def test_a_step_costs_the_collectives_of_raw_ddp_and_gives_its_weights(ranks: RankPool, normed: bool) -> None:
    ours, theirs = ranks.run(collectives_per_step, "fabric", normed), ranks.run(collectives_per_step, "raw", normed)
    assert ours[0][0] == theirs[0][0]
    for (_, mine), (_, other) in zip(ours, theirs, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(mine, other, strict=True))


def accumulated(enabled: bool, fail: bool) -> Any:
    fabric = Fabric(accelerator="cpu", devices=2)
    model = fabric.setup(make_net())
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()  # DDP rebuilds its buckets once, in the second forward
    model.zero_grad()
    parts = batches(4, 4)
    mine = parts[fabric.global_rank * 2 : fabric.global_rank * 2 + 2]
    if fail:
        with pytest.raises(ZeroDivisionError), fabric.no_backward_sync(model):
            fabric.backward(model(mine[0]).pow(2).mean())
            raise ZeroDivisionError
        assert all(parameter.grad is None for parameter in model.parameters())
    with CountCollectives() as counted, fabric.no_backward_sync(model, enabled=enabled):
        fabric.backward(model(mine[0]).pow(2).mean() / 2)
    first = counted.count
    with CountCollectives() as counted:
        fabric.backward(model(mine[1]).pow(2).mean() / 2)
    raw = make_net()
    raw(torch.cat(parts)).pow(2).mean().backward()
    error = max(
        float((one.grad - two.grad).abs().max())  # type: ignore[operator]
        for one, two in zip(model.parameters(), raw.parameters(), strict=True)
    )
    return first, counted.count, error


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fail", [True, False])
def test_accumulation_equals_one_process_and_an_abandoned_window_leaves_nothing(
    ranks: RankPool, enabled: bool, fail: bool
) -> None:
    for first, last, error in ranks.run(accumulated, enabled, fail):
        assert first == (0 if enabled else 1)
        assert last == 1
        assert error <= 1e-7


def train_gan(world_size: int) -> Any:
    torch.manual_seed(0)
    generator, critic = Net(), nn.Sequential(Net(), nn.Linear(4, 1))
    g_step = torch.optim.SGD(generator.parameters(), lr=0.05, momentum=0.9)
    c_step = torch.optim.SGD(critic.parameters(), lr=0.05, momentum=0.9)
    fabric = Fabric(accelerator="cpu", devices=world_size)
    fabric.setup(generator, g_step)
    fabric.setup(critic, c_step)
    for noise, real in zip(batches(6, 8, seed=2), batches(6, 8, seed=3), strict=True):
        if world_size > 1:
            noise, real = noise.chunk(world_size)[fabric.global_rank], real.chunk(world_size)[fabric.global_rank]
        c_step.zero_grad()
        fabric.backward(critic(generator(noise).detach()).mean() - critic(real).mean())
        fabric.clip_gradients(critic, c_step, max_norm=1.0)
        c_step.step()
        g_step.zero_grad()
        fabric.backward(-critic(generator(noise)).mean())
        g_step.step()
    fabric.release(generator, g_step, critic, c_step)
    return weights(generator) + weights(critic)


def test_a_gan_has_equal_weights_on_both_ranks_and_those_of_one_process(ranks: RankPool) -> None:
    first, second = ranks.run(train_gan, 2)
    alone = train_gan(1)
    for one, two, three in zip(first, second, alone, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three, rtol=0, atol=1e-6)  # sums of halves round differently


def train_with(strategy: DDPStrategy) -> Any:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    for x in batches(6, 8):
        optimizer.zero_grad()
        fabric.backward(model(x.chunk(2)[fabric.global_rank]).pow(2).mean())
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize(
    ("strategy", "tolerance"),
    [
        (DDPStrategy(static_graph=True), 1e-6),
        (DDPStrategy(find_unused_parameters=True), 1e-6),
        (DDPStrategy(gradient_as_bucket_view=True, bucket_cap_mb=1), 1e-6),
        (DDPStrategy(ddp_options={"init_sync": False}), 1e-6),
        (DDPStrategy(communication_hook="bf16"), 5e-3),  # 8 bits of mantissa in every gradient
        (DDPStrategy(communication_hook="fp16"), 5e-4),  # 11 bits
        (DDPStrategy(communication_hook="powersgd"), 0.2),  # rank 1: lossy by design
    ],
    ids=["static graph", "find unused", "bucket view", "options", "bf16", "fp16", "powersgd"],
)
def test_ddp_options_and_communication_hooks_train_like_one_process(
    ranks: RankPool, strategy: DDPStrategy, tolerance: float
) -> None:
    first, second = ranks.run(train_with, strategy)
    raw = make_net()
    optimizer = torch.optim.SGD(raw.parameters(), lr=0.1)
    for x in batches(6, 8):
        optimizer.zero_grad()
        raw(x).pow(2).mean().backward()
        optimizer.step()
    for one, two, three in zip(first, second, raw.parameters(), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three, rtol=0, atol=tolerance)


def use_a_frozen_teacher() -> float:
    fabric = Fabric(accelerator="cpu", devices=2)
    teacher = make_net(1).requires_grad_(False)
    student = make_net(2)
    fabric.setup(teacher)
    fabric.setup(student)
    x = batches(2, 4)[fabric.global_rank]
    fabric.backward((student(x) - teacher(x)).pow(2).mean())
    return float(student.first.weight.grad.sum())  # type: ignore[union-attr]


def test_a_frozen_teacher_sets_up(ranks: RankPool) -> None:
    first, second = ranks.run(use_a_frozen_teacher)
    assert first == second != 0


def copies_are_plain() -> Any:
    fabric = Fabric(accelerator="cpu", devices=2)
    model = fabric.setup(make_net())
    other = copy.deepcopy(model)
    with CountCollectives() as counted:
        other(torch.ones(2, 4)).sum().backward()
    fabric.close()
    assert type(model) is Net
    return type(other) is Net, counted.count, dist.is_initialized()


def test_a_copy_of_a_ddp_model_is_plain_and_an_adopted_group_outlives_close(ranks: RankPool) -> None:
    assert ranks.run(copies_are_plain) == [(True, 0, True)] * 2


def call_from_two_threads() -> str:
    import threading

    fabric = Fabric(accelerator="cpu", devices=2)
    entered, done, messages = threading.Event(), threading.Event(), []

    class Waits(Net):
        def forward(self, x: torch.Tensor, depth: int = 0) -> torch.Tensor:
            if threading.current_thread() is threading.main_thread():
                entered.set()
                done.wait(20)
            return super().forward(x)

    model = fabric.setup(Waits())

    def second() -> None:
        entered.wait(20)
        try:
            model(torch.ones(2, 4))
        except FabricRuntimeError as error:
            messages.append(str(error))
        done.set()

    thread = threading.Thread(target=second)
    thread.start()
    model(torch.ones(2, 4)).sum().backward()
    thread.join()
    return messages[0]


def test_calling_one_model_from_two_threads_is_an_error(ranks: RankPool) -> None:
    assert all("two threads" in message for message in ranks.run(call_from_two_threads))
