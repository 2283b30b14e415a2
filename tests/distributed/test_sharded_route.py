"""Sharded models on two ranks: every way of running them, compiled or not, trains like one process."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from fabric_lite import Fabric, Strategy, StrategyError
from fabric_lite.activation_checkpointing import checkpoint_activations
from fabric_lite.buffers import keep_statistics_alike
from fabric_lite.hooked import options_of
from fabric_lite.strategies import Engine, FSDPStrategy, Placement
from fabric_lite.strategies.sharding import is_synchronizing
from fabric_lite.testing import RankPool
from tests.models import CountCollectives, Net, batches, make_net


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(torch.relu(self.linear(x)))


class Deep(nn.Module):
    """Repeated blocks between two layers that are in the root's group."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.second = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, depth: int = 0) -> torch.Tensor:
        y = self.first(x)
        for block in self.blocks:
            y = block(y)
        y = self.second(y)
        return self(y, depth - 1) if depth else y

    def training_step(self, x: torch.Tensor) -> torch.Tensor:
        return self(x).pow(2).mean()

    def by_layers(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.blocks[0](self.first(x))).pow(2).mean()


def make_deep(blocks: int = 3) -> Deep:
    torch.manual_seed(0)
    return Deep(blocks)


def connect(has_blocks: bool = True, precision: str = "32-true") -> Fabric:
    strategy = FSDPStrategy(auto_wrap_policy={Block} if has_blocks else ())
    return Fabric(accelerator="cpu", devices=2, strategy=strategy, precision=precision)


def full(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def gradient_error(model: nn.Module, raw: nn.Module) -> float:
    """The largest difference to the gradients of one process; gathers, so every rank calls it."""
    return max(
        float((full(mine.grad) - other.grad).abs().max())  # type: ignore[operator]
        for mine, other in zip(model.parameters(), raw.parameters(), strict=True)
    )


def doubled(model: nn.Module) -> None:
    model.forward = lambda x: Deep.forward(model, x) * 2  # type: ignore[method-assign, arg-type]


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
    "block.compile() before": (lambda model, x: model(x), None, "blocks before"),
    "compiled, a forward assigned late": (lambda model, x: model(x), doubled, "inner before"),
    "compiled and checkpointed": (lambda model, x: checkpoint(model, x, use_reentrant=False), None, "inner before"),
}  # fmt: skip


def error_of_a_way(way: str, has_blocks: bool) -> Any:
    call, change, compiled = WAYS[way]
    fabric = connect(has_blocks)
    raw, model = make_deep(), make_deep()
    target: Any = model
    full_graph = {"backend": "aot_eager", "fullgraph": True}
    if compiled == "inner before":
        model.compile(**full_graph)
    if compiled == "outer before":
        target = torch.compile(model, **full_graph)
    if compiled == "blocks before":
        for block in model.blocks:
            block.compile(**full_graph)
    fabric.setup(target)
    if compiled == "inner after":
        model.compile(**full_graph)
    if compiled == "outer after":
        target = torch.compile(model, backend="aot_eager")
    if change is not None:
        change(model)
        change(raw)
    halves = batches(2, 4)
    for _ in range(2):
        target.zero_grad()
        fabric.backward(call(target, halves[fabric.global_rank]).pow(2).mean())
    for half in halves:
        (call(raw, half).pow(2).mean() / 2).backward()
    keys = [key.removeprefix("_orig_mod.") for key in target.state_dict()]
    assert keys == list(raw.state_dict()) == list(model.state_dict())
    torch._dynamo.reset()
    return gradient_error(model, raw)


@pytest.mark.parametrize("has_blocks", [True, False], ids=["blocks", "one group"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_equal_one_process_in_every_way_of_running_the_model(
    ranks: RankPool, way: str, has_blocks: bool
) -> None:
    # 1e-6: the mean over ranks and the mean over the batch round differently in the last bits.
    assert max(ranks.run(error_of_a_way, way, has_blocks)) <= 1e-6


def frames(kind: str, has_blocks: bool) -> list[int]:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model = make_deep(10)  # more than dynamo compiles anew
    target: Any = model
    options = {"backend": counter, "fullgraph": True}
    compiled = list(model.blocks) if has_blocks and kind in ("raw", "blocks") else [model]
    if kind == "outer":
        target = torch.compile(model, **options)
    elif kind != "after":
        for module in compiled:
            module.compile(**options)
    if kind != "raw":
        connect(has_blocks).setup(target)
    if kind == "after":
        model.compile(backend="eager")
        model.compile(**options)
    counts = []
    for _ in range(2):
        for x in batches(2):
            target.train()
            target(x).pow(2).mean().backward()
        counts.append(counter.frame_count)
        target.eval()
        with torch.no_grad():
            target(x)
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    return counts


@pytest.mark.parametrize("has_blocks", [True, False], ids=["blocks", "one group"])
@pytest.mark.parametrize("kind", ["before", "after", "outer", "blocks"])
def test_compiling_gives_the_frames_of_compiled_blocks_without_sharding(
    ranks: RankPool, kind: str, has_blocks: bool
) -> None:
    raw = ranks.run(frames, "raw", has_blocks)
    assert [counts[0] for counts in raw] == [1, 1]
    assert ranks.run(frames, kind, has_blocks) == raw


def compiled_before_and_released(kind: str) -> None:
    fabric = connect()
    model = make_deep()
    target: Any = torch.compile(model, backend="eager") if kind == "outer" else model
    if kind == "inner":
        model.compile(backend="eager")
    model.blocks[0].compile(backend="eager")
    before = [module.__dict__.get("_compiled_call_impl") for module in model.modules()]
    fabric.setup(target)
    assert [bool(block._compiled_call_impl) for block in model.blocks] == [True] * 3
    assert model._compiled_call_impl is None
    fabric.release(target)
    assert [module.__dict__.get("_compiled_call_impl") for module in model.modules()] == before
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert type(model).__name__ != "OptimizedModule"


@pytest.mark.parametrize("kind", ["inner", "outer"])
def test_release_gives_back_what_was_compiled(ranks: RankPool, kind: str) -> None:
    ranks.run(compiled_before_and_released, kind)


def compiled_in_special_ways() -> Any:
    fabric = connect()
    model = make_deep()
    model.compile(disable=True)
    fabric.setup(model)
    assert not any(block._compiled_call_impl for block in model.blocks)
    outer: Any = torch.compile(make_deep(), backend="eager")
    fabric.setup(outer)
    outer.mark_forward_method("by_layers")
    calls: list[nn.Module] = []
    for module in outer.modules():
        module.register_forward_hook(lambda module, *_: calls.append(module))
    x = torch.ones(2, 4)
    outer(x).sum().backward()
    counts = [calls.count(module) for module in outer.modules()]
    torch._dynamo.reset()
    return counts, float((outer.by_layers(x) - make_deep().by_layers(x)).abs())


def test_hooks_of_a_compiled_model_fire_once_and_its_methods_are_marked_through_it(ranks: RankPool) -> None:
    for counts, error in ranks.run(compiled_in_special_ways):
        assert set(counts) == {0, 1}  # the list of blocks is never called
        assert counts.count(0) == 1
        assert error == 0


def test_a_compiled_call_that_does_not_show_its_options_is_refused() -> None:
    def compiled() -> None:
        """Stands for what another torch returns."""

    compiled._torchdynamo_orig_callable = None  # type: ignore[attr-defined]
    with pytest.raises(StrategyError, match=r"block\.compile\(\) for each block"):
        options_of(compiled)


def steps_with_dropout(checkpointed: bool, compiled: bool) -> Any:
    fabric = connect()
    model = make_deep()
    for block in model.blocks:
        block.dropout.p = 0.5
    if checkpointed:
        checkpoint_activations(model, Block)
    fabric.setup(model)
    if compiled:
        model.compile(backend="aot_eager", fullgraph=True)
    x = batches(2, 4)[fabric.global_rank]
    model(x).pow(2).mean().backward()  # torch finds out its order of prefetching
    # Dynamo compiles nothing under a mode that counts.
    with contextlib.nullcontext() if compiled else CountCollectives() as counted:
        model(x).pow(2).mean().backward()
    torch._dynamo.reset()
    return getattr(counted, "count", 1), [full(parameter.grad) for parameter in model.parameters()]


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointed_blocks_gather_as_often_and_give_the_same_bits(ranks: RankPool, compiled: bool) -> None:
    with_it, without = ranks.run(steps_with_dropout, True, compiled), ranks.run(steps_with_dropout, False, compiled)
    for mine, other in zip(with_it, without, strict=True):
        assert mine[0] == other[0] > 0
        assert all(torch.equal(one, two) for one, two in zip(mine[1], other[1], strict=True))


def refused_then_marked(precision: str) -> Any:
    fabric = connect(precision=precision)
    raw, model = make_deep(), make_deep()
    fabric.setup(model)
    halves = batches(2, 4)
    with pytest.raises(StrategyError) as refused:
        model.by_layers(halves[0])
    model.mark_forward_method("by_layers")
    loss = model.by_layers(halves[fabric.global_rank])  # before any forward of the whole
    loss.backward()
    fabric.backward(model(halves[fabric.global_rank]).pow(2).mean())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
        for half in halves:
            (raw.by_layers(half) / 2).backward()
            (raw(half).float().pow(2).mean() / 2).backward()
    assert type(refused.value.__cause__) is RuntimeError
    return str(refused.value), loss.dtype, gradient_error(model, raw)


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-6), ("bf16-mixed", 2e-2)])
def test_a_method_that_runs_layers_is_refused_by_name_until_it_is_marked(
    ranks: RankPool, precision: str, tolerance: float
) -> None:
    # bf16: 8 bits of mantissa, and gradients of bf16 weights are bf16 before they are summed.
    for message, dtype, error in ranks.run(refused_then_marked, precision):
        assert "Deep.by_layers() uses parameters that are in shards" in message
        assert "model.mark_forward_method('by_layers')" in message
        assert dtype == torch.float32
        assert error <= tolerance


def block_before_the_whole() -> float:
    fabric = connect()
    raw, model = make_deep(), make_deep()
    fabric.setup(model)
    halves = batches(2, 4)
    model.blocks[1](halves[fabric.global_rank])
    fabric.backward(model(halves[fabric.global_rank]).pow(2).mean())
    for half in halves:
        (raw(half).pow(2).mean() / 2).backward()
    return gradient_error(model, raw)


def test_a_block_may_run_before_the_whole_model_has(ranks: RankPool) -> None:
    assert max(ranks.run(block_before_the_whole)) <= 1e-6


EVALUATIONS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "gradients on": torch.enable_grad,
}


def train_between_evaluations(evaluation: str, rank_count: int) -> list[torch.Tensor]:
    """Trains, with an evaluation before the first step and between each backward and its step."""
    raw = make_deep()
    fabric = connect()
    optimizer = torch.optim.SGD(raw.parameters(), lr=0.1)
    if rank_count > 1:
        fabric.setup(raw, optimizer)
    outputs = []
    with EVALUATIONS[evaluation]():
        outputs.append(raw(torch.ones(2, 4)).detach().clone())
    for x in batches(3, 4):
        raw(x).pow(2).mean().backward()
        with EVALUATIONS[evaluation]():
            outputs.append(raw(torch.ones(2, 4)).detach().clone())
        if rank_count > 1 and evaluation != "gradients on":
            assert all(hasattr(parameter, "placements") for parameter in raw.parameters())
        optimizer.step()
        optimizer.zero_grad()
        if rank_count > 1:
            assert all(hasattr(parameter, "placements") for parameter in raw.parameters())
    return [*outputs, *(full(parameter) for parameter in raw.parameters())]


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_nothing_stays_gathered_after_an_evaluation_and_no_step_is_lost(ranks: RankPool, evaluation: str) -> None:
    first, second = ranks.run(train_between_evaluations, evaluation, 2)
    alone = ranks.run(train_between_evaluations, evaluation, 1)[0]
    for one, two, three in zip(first, second, alone, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three, rtol=0, atol=1e-6)  # sums of halves round differently


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x))


def set_up_inside_another(inner_first: bool) -> float:
    fabric = connect()
    torch.manual_seed(0)
    raw = Outer(make_deep())
    torch.manual_seed(0)
    model = Outer(make_deep())
    halves = batches(2, 4)
    fabric.setup(model.inner)
    if inner_first:
        with torch.no_grad():
            model.inner(halves[0])
    fabric.setup(model)
    mine = halves[fabric.global_rank]
    for _ in range(2):
        model.zero_grad()
        fabric.backward(model(mine).pow(2).mean())
        fabric.backward(model.inner(mine).pow(2).mean())
    for half in halves:
        (raw(half).pow(2).mean() / 2).backward()
        (raw.inner(half).pow(2).mean() / 2).backward()
    return gradient_error(model, raw)


@pytest.mark.parametrize("inner_first", [False, True])
def test_a_model_that_is_set_up_may_be_part_of_another(ranks: RankPool, inner_first: bool) -> None:
    assert max(ranks.run(set_up_inside_another, inner_first)) <= 1e-6


def share_a_part() -> str:
    fabric = connect()
    shared = make_deep()
    fabric.setup(Outer(shared))
    with pytest.raises(StrategyError) as error:
        fabric.setup(Outer(shared))
    return str(error.value)


def test_a_part_of_a_model_that_is_set_up_cannot_be_part_of_another(ranks: RankPool) -> None:
    for message in ranks.run(share_a_part):
        assert "of another model" in message


def train_gan(world_size: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    generator, critic = Net(), nn.Sequential(Net(), nn.Linear(4, 1))
    g_step = torch.optim.SGD(generator.parameters(), lr=0.05, momentum=0.9)
    c_step = torch.optim.SGD(critic.parameters(), lr=0.05, momentum=0.9)
    strategy = FSDPStrategy(auto_wrap_policy={nn.Linear}) if world_size > 1 else "single_device"
    fabric = Fabric(accelerator="cpu", devices=world_size, strategy=strategy)
    fabric.setup(generator, g_step)
    fabric.setup(critic, c_step)
    for noise, real in zip(batches(4, 8, seed=2), batches(4, 8, seed=3), strict=True):
        if world_size > 1:
            noise, real = noise.chunk(world_size)[fabric.global_rank], real.chunk(world_size)[fabric.global_rank]
        c_step.zero_grad()
        fabric.backward(critic(generator(noise).detach()).mean() - critic(real).mean())
        c_step.step()
        g_step.zero_grad()
        fabric.backward(-critic(generator(noise)).mean())
        g_step.step()
    return [full(parameter) for parameter in [*generator.parameters(), *critic.parameters()]]


def test_a_gan_of_two_sharded_models_has_the_weights_of_one_process(ranks: RankPool) -> None:
    first, second = ranks.run(train_gan, 2)
    for one, two, three in zip(first, second, train_gan(1), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three, rtol=0, atol=1e-6)  # sums of halves round differently


def change_an_output_in_place() -> float:
    fabric = connect()
    raw, model = make_deep(), make_deep()
    fabric.setup(model)
    model.mark_forward_method("by_layers")
    halves = [half.reshape(2, 2, 4) for half in batches(2, 4)]  # a layer returns a view of what it computes
    for target, parts in ((model, halves[fabric.global_rank : fabric.global_rank + 1]), (raw, halves)):
        for part in parts:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                output = target(part)
            output /= 2
            (output.pow(2).mean() / len(parts)).backward()
    return gradient_error(model, raw)


def test_an_output_may_be_changed_in_place_and_nothing_warns(ranks: RankPool) -> None:
    assert max(ranks.run(change_an_output_in_place)) <= 1e-6


class Saves(nn.Module):
    """Returns a view of what backward needs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.linear(x)).view(-1)


def spoil_an_output() -> str:
    model = connect(has_blocks=False).setup(Saves())
    output = model(torch.ones(2, 4))
    output *= 2
    with pytest.raises(RuntimeError) as error:
        output.sum().backward()
    return str(error.value)


def test_a_change_in_place_of_what_backward_needs_is_still_seen(ranks: RankPool) -> None:
    assert all("modified by an inplace operation" in message for message in ranks.run(spoil_an_output))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.wide = nn.BatchNorm1d(4, affine=False, dtype=torch.float64)
        self.register_buffer("constant", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(self.norm(self.linear(x)).double()).float() + self.constant


class Follows(FSDPStrategy):
    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], run: Callable[..., Any], placement: Placement
    ) -> Engine:
        engine = super().wrap(module, optimizers, run, placement)
        keep_statistics_alike(module, None, lambda: is_synchronizing(module))
        return engine


def evaluate_batch_norm(strategy: str | Strategy, compiled: bool) -> Any:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    torch.manual_seed(0)
    model = fabric.setup(Normed())
    if compiled:
        model.compile(backend="aot_eager", fullgraph=True)
    torch.manual_seed(fabric.global_rank)
    for step in range(4):
        with fabric.no_backward_sync(model, enabled=step % 2 == 0):
            fabric.backward(model(torch.randn(8, 4)).sum())
        model.zero_grad()
    with torch.no_grad():
        model(torch.ones(8, 4))  # in training mode: statistics change, and nobody is to follow
    model.eval()
    torch._dynamo.reset()
    with torch.no_grad():
        return model(torch.ones(2, 4)), [buffer.clone() for buffer in model.buffers()]


@pytest.mark.parametrize("compiled", [False, True])
def test_running_statistics_are_equal_on_all_ranks_and_those_of_ddp(ranks: RankPool, compiled: bool) -> None:
    (first, buffers), (second, others) = ranks.run(evaluate_batch_norm, Follows(), compiled)
    ddp, its_buffers = ranks.run(evaluate_batch_norm, "ddp", compiled)[0]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, ddp, rtol=0, atol=1e-6)
    for mine, other, its in zip(buffers, others, its_buffers, strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-6)


def collectives_of_a_forward(strategy: Strategy, module: nn.Module) -> int:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    model = fabric.setup(module)
    model.register_buffer("mask", torch.ones(3))
    for _ in range(2):
        with CountCollectives() as counted:
            model(torch.randn(8, 4)).sum().backward()
    return counted.count


def test_statistics_cost_a_collective_per_dtype_and_models_without_any_none(ranks: RankPool) -> None:
    plain, following = (ranks.run(collectives_of_a_forward, s, Normed())[0] for s in (FSDPStrategy(), Follows()))
    assert following == plain + 3  # float32, float64 and the counts of batches
    plain, following = (ranks.run(collectives_of_a_forward, s, make_net())[0] for s in (FSDPStrategy(), Follows()))
    assert following == plain


@dataclasses.dataclass(frozen=True)
class Parallel(Strategy):
    """Tensor parallelism, without hooks of a call on the model."""

    def mesh_axes(self, world_size: int, local_world_size: int) -> dict[str, int]:
        return {"tensor_parallel": world_size}

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], run: Callable[..., Any], placement: Placement
    ) -> Engine:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        assert placement.mesh is not None
        parallelize_module(module, placement.mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})
        return Engine()


def parallel_and_compiled(kind: str) -> float:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=Parallel())
    raw, model = make_net(), make_net()
    target: Any = model
    if kind == "before":
        model.compile(backend="aot_eager")
    if kind == "outer":
        target = torch.compile(model, backend="aot_eager")
    fabric.setup(target)
    if kind == "after":
        model.compile(backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    x = batches(1)[0]
    for _ in range(2):
        target.zero_grad()
        fabric.backward(target(x).pow(2).mean())
    raw(x).pow(2).mean().backward()
    assert kind == "" or torch._dynamo.utils.counters["frames"]["ok"] > 0
    torch._dynamo.reset()
    return gradient_error(model, raw)


@pytest.mark.parametrize("kind", ["", "before", "after", "outer"])
def test_a_tensor_parallel_model_compiles(ranks: RankPool, kind: str) -> None:
    assert max(ranks.run(parallel_and_compiled, kind)) <= 1e-6


def two_models_around_one() -> float:
    fabric = connect()
    torch.manual_seed(0)
    shared, raw_shared = make_deep(), make_deep()
    torch.manual_seed(1)
    models = [Outer(shared), Outer(shared)]
    torch.manual_seed(1)
    raws = [Outer(raw_shared), Outer(raw_shared)]
    fabric.setup(shared)
    for model in models:
        fabric.setup(model)
    halves = batches(2, 4)
    for _ in range(2):
        models[0].zero_grad()
        models[1].zero_grad()
        x = halves[fabric.global_rank]
        fabric.backward(models[0](x).pow(2).mean() + models[1](x + 1).pow(2).mean())
        fabric.backward(models[0](x).pow(2).mean())
    for half in halves:
        ((raws[0](half).pow(2).mean() * 2 + raws[1](half + 1).pow(2).mean()) / 2).backward()
    return max(gradient_error(model, raw) for model, raw in zip(models, raws, strict=True))


def test_two_models_may_hold_one_that_was_set_up_first(ranks: RankPool) -> None:
    assert max(ranks.run(two_models_around_one)) <= 1e-6
