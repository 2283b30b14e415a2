"""Tensor parallelism and meshes of two axes: training equals one process, whatever the plan."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fabric_lite import Fabric, FabricTypeError, FabricValueError, StrategyError
from fabric_lite.strategies import ModelParallelStrategy
from fabric_lite.testing import RankPool
from tests.models import CountCollectives, full

VOCABULARY, WIDTH = 11, 8


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(self.norm(x)))))


class Model(nn.Module):
    """Tokens (batch, time) to logits (batch, time, vocabulary)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(Block(dropout), Block(dropout))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.blocks(self.tokens(tokens))))
        return logits


def make_model(dropout: float = 0.0) -> Model:
    torch.manual_seed(0)
    return Model(dropout)


def tokens(count: int, size: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (size, 4), generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model(x).flatten(0, 1), x.roll(-1, 1).flatten())


def by_columns_and_rows(model: nn.Module, device_mesh: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import parallelize_module

    return parallelize_module(model, device_mesh["tensor_parallel"], styles())


def with_own_fully_shard(model: Any, device_mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    by_columns_and_rows(model, device_mesh)
    for block in model.blocks:
        fully_shard(block, mesh=device_mesh["data_parallel"])
    return model


def styles() -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}


def along_the_sequence(norms: bool = True) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    plan = {
        "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "blocks.*.up": ColwiseParallel(input_layouts=Shard(1)),
        "blocks.*.down": RowwiseParallel(output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return {**plan, "blocks.*.norm": SequenceParallel(), "norm": SequenceParallel()} if norms else plan


PLANS: dict[str, Any] = {
    "function": lambda: by_columns_and_rows,
    "own fully_shard": lambda: with_own_fully_shard,
    "mapping": styles,
    "sequence": along_the_sequence,
}
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def planned(plan: str, data: int, tensor: int, **options: Any) -> Fabric:
    strategy = ModelParallelStrategy(PLANS[plan](), data, tensor)
    return Fabric(accelerator="cpu", devices=data * tensor, strategy=strategy, **options)


def share_of(fabric: Fabric, x: torch.Tensor) -> torch.Tensor:
    axis = fabric.device_mesh["data_parallel"]
    return x.chunk(axis.size())[axis.get_local_rank()]


def train(strategy: ModelParallelStrategy | None, ranks: int, optimizer_name: str, accumulate: int, clip: float) -> Any:
    """One process where there is no strategy; else this rank's share of the same batches."""
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy or "auto", precision="64-true")
    model = make_model()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    fabric.setup(model, optimizer)
    norms = []
    for step, x in enumerate(tokens(4 * accumulate)):
        last = (step + 1) % accumulate == 0
        x = x if strategy is None else share_of(fabric, x)
        with fabric.no_backward_sync(model, enabled=not last):
            fabric.backward(loss_of(model, x) / accumulate)
        if last:
            norms.append(float(fabric.clip_gradients(model, optimizer, max_norm=clip)))
            optimizer.step()
            optimizer.zero_grad()
    return [full(parameter) for parameter in model.parameters()], norms


def train_planned(plan: str, data: int, tensor: int, optimizer_name: str, accumulate: int, clip: float) -> Any:
    strategy = ModelParallelStrategy(PLANS[plan](), data, tensor)
    return train(strategy, data * tensor, optimizer_name, accumulate, clip)


@pytest.mark.parametrize(
    ("plan", "data", "tensor", "optimizer_name", "accumulate"),
    [
        ("function", 1, 2, "sgd", 1),
        ("mapping", 1, 2, "adamw", 2),
        ("sequence", 1, 2, "sgd", 2),
        ("function", 2, 2, "sgd", 2),
        ("own fully_shard", 2, 2, "adamw", 1),
        ("own fully_shard", 1, 2, "sgd", 1),
        ("sequence", 2, 2, "sgd", 1),
        ("sequence", 2, 1, "adamw", 1),
    ],
)
def test_training_equals_one_process_on_the_global_batch(
    ranks: RankPool, plan: str, data: int, tensor: int, optimizer_name: str, accumulate: int
) -> None:
    expected, norms = train(None, 1, optimizer_name, accumulate, 0.5)
    for found, norms_found in ranks.run(
        train_planned, plan, data, tensor, optimizer_name, accumulate, 0.5, ranks=data * tensor
    ):
        assert norms_found == pytest.approx(norms, rel=1e-12)
        for one, two in zip(found, expected, strict=True):
            # Adam divides by the root of tiny second moments, so the last bits grow.
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12 if optimizer_name == "sgd" else 1e-9)


def start_unseeded(data: int, tensor: int) -> Any:
    fabric = planned("function", data, tensor, precision="64-true")
    torch.manual_seed(fabric.global_rank)  # as a script that sets no seed
    model = Model()
    model.register_buffer("scale", torch.rand(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    for x in tokens(2):
        fabric.backward(loss_of(model, share_of(fabric, x)))
        optimizer.step()
        optimizer.zero_grad()
    return [full(tensor) for tensor in [*model.parameters(), *model.buffers()]]


@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 2)])
def test_ranks_that_start_from_different_values_train_rank_zeros_model(ranks: RankPool, data: int, tensor: int) -> None:
    model = make_model()
    scale = torch.rand(3).double()
    model = model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in tokens(2):
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found in ranks.run(start_unseeded, data, tensor, ranks=data * tensor):
        for one, two in zip(found, [*model.parameters(), scale], strict=True):
            torch.testing.assert_close(one, two.detach(), rtol=0, atol=1e-12)


def draws_after_setup(data: int, tensor: int) -> Any:
    fabric = planned("function", data, tensor)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(fabric.global_rank)
    model = fabric.setup(Model(dropout=0.5))
    output = model(tokens(1)[0]).detach()
    return output, random.random(), float(np.random.rand()), float(torch.rand(1))


def test_the_ranks_of_a_group_draw_the_same_numbers_and_those_of_other_data_do_not(ranks: RankPool) -> None:
    draws = ranks.run(draws_after_setup, 2, 2, ranks=4)
    for one, two in ((0, 1), (2, 3)):
        torch.testing.assert_close(draws[one][0], draws[two][0], rtol=0, atol=1e-6)  # sums over ranks round alike
        assert draws[one][1:] == draws[two][1:]
    assert not torch.allclose(draws[0][0], draws[2][0])
    assert not set(draws[0][1:]) & set(draws[2][1:])


def batches_of(data: int, tensor: int) -> list[list[int]]:
    fabric = planned("function", data, tensor)
    loader = DataLoader(TensorDataset(torch.arange(16)), batch_size=2, shuffle=True)
    fabric.setup_dataloaders(loader)
    epochs = []
    for _ in range(2):
        torch.rand(1 + fabric.global_rank)  # each rank draws for itself, as in logging or augmentation
        epochs.append([int(index) for (batch,) in loader for index in batch])
    return epochs


@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 2)])
def test_loaders_are_dealt_out_along_the_data_axis_alone(ranks: RankPool, data: int, tensor: int) -> None:
    found = ranks.run(batches_of, data, tensor, ranks=data * tensor)
    groups = [found[start : start + tensor] for start in range(0, data * tensor, tensor)]
    assert all(one == two for one, two in groups)
    for epoch in range(2):
        together = [index for group in groups for index in group[0][epoch]]
        assert sorted(together) == list(range(16))
        assert together != sorted(together)
    assert found[0][0] != found[0][1]


def incomplete_sequence_plan(data: int, tensor: int) -> str:
    strategy = ModelParallelStrategy(along_the_sequence(norms=False), data, tensor)
    fabric = Fabric(accelerator="cpu", devices=data * tensor, strategy=strategy)
    model = fabric.setup(make_model())
    with pytest.raises(
        StrategyError, match=r"norm\.(weight|bias) differ.*\n.*leaves out.*\n.*SequenceParallel"
    ) as error:
        fabric.backward(loss_of(model, share_of(fabric, tokens(1)[0])))
    return str(error.value)


@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 2)])
def test_a_norm_that_a_sequence_parallel_plan_forgets_is_named_on_all_ranks(
    ranks: RankPool, data: int, tensor: int
) -> None:
    messages = ranks.run(incomplete_sequence_plan, data, tensor, ranks=data * tensor)
    assert len({message.split(" of ")[1] for message in messages}) == 1


@pytest.mark.parametrize(
    ("data", "tensor", "world_size", "local_world_size", "expected"),
    [
        ("auto", "auto", 16, 8, (2, 8)),
        ("auto", "auto", 4, 4, (1, 4)),
        ("auto", 2, 8, 8, (4, 2)),
        (4, "auto", 8, 8, (4, 2)),
        (2, 2, 4, 4, (2, 2)),
        ("auto", "auto", 1, 1, (1, 1)),
    ],
)
def test_the_sizes_of_the_mesh_follow_from_the_ranks(
    data: Any, tensor: Any, world_size: int, local_world_size: int, expected: tuple[int, int]
) -> None:
    axes = ModelParallelStrategy(styles(), data, tensor).mesh_axes(world_size, local_world_size)
    assert list(axes.items()) == [("data_parallel", expected[0]), ("tensor_parallel", expected[1])]


@pytest.mark.parametrize(
    ("data", "tensor", "arithmetic"), [(2, 3, "2 x 3 = 6"), ("auto", 3, "1 x 3 = 3"), (8, "auto", "8 x 1 = 8")]
)
def test_sizes_that_do_not_multiply_to_the_ranks_are_refused(data: Any, tensor: Any, arithmetic: str) -> None:
    with pytest.raises(FabricValueError, match=f"of 4: {arithmetic}"):
        ModelParallelStrategy(styles(), data, tensor).mesh_axes(4, 4)


@pytest.mark.parametrize("option", ["data_parallel_size", "tensor_parallel_size"])
@pytest.mark.parametrize("size", [0, True, "all", 2.0])
def test_a_size_is_a_positive_whole_number_or_auto(option: str, size: Any) -> None:
    with pytest.raises(FabricValueError, match=option):
        ModelParallelStrategy(styles(), **{option: size})


def test_a_plan_is_a_function_or_a_mapping() -> None:
    with pytest.raises(FabricTypeError, match="def parallelize"):
        ModelParallelStrategy("blocks")  # type: ignore[arg-type]


def returns_nothing(model: nn.Module, device_mesh: Any) -> None:
    del model, device_mesh


def returns_a_part(model: Any, device_mesh: Any) -> nn.Module:
    del device_mesh
    head: nn.Module = model.head
    return head


def wrong_plans() -> None:
    for plan, message in (
        (returns_nothing, "returned None"),
        (returns_a_part, "returned another Linear"),
        ({"blocks.*.upp": styles()["blocks.*.up"]}, r"blocks\.\*\.upp.*\n.*blocks\.\*\.up"),
    ):
        fabric = Fabric(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(plan))  # type: ignore[arg-type]
        with pytest.raises(StrategyError, match=message):
            fabric.setup(make_model())


def test_a_plan_that_returns_another_model_or_names_no_layer_is_refused(ranks: RankPool) -> None:
    ranks.run(wrong_plans, ranks=2)


def overflow_on_one_rank(data: int, tensor: int, layer: str) -> Any:
    fabric = planned("function", data, tensor, precision="16-mixed")
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    planted: Any = dict(model.named_parameters())[layer]
    moved, scales = [], []
    for step, x in enumerate(tokens(3)):
        before = [full(parameter) for parameter in model.parameters()]
        fabric.backward(loss_of(model, share_of(fabric, x)))
        if step == 1 and fabric.global_rank == data * tensor - 1:
            gradient = planted.grad
            (gradient.to_local() if hasattr(gradient, "to_local") else gradient).fill_(float("inf"))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        after = [full(parameter) for parameter in model.parameters()]
        moved.append([not torch.equal(one, two) for one, two in zip(before, after, strict=True)])
        assert all(bool(parameter.isfinite().all()) for parameter in after)
        scales.append(fabric.state_dict()["loss_scaler"]["scale"])
    return [any(step) for step in moved], [scale / scales[0] for scale in scales]


@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 2)])
@pytest.mark.parametrize("layer", ["blocks.0.up.weight", "blocks.0.down.bias", "norm.weight"])
def test_an_overflow_on_one_rank_of_any_axis_skips_the_step_on_all(
    ranks: RankPool, data: int, tensor: int, layer: str
) -> None:
    for moved, scales in ranks.run(overflow_on_one_rank, data, tensor, layer, ranks=data * tensor):
        assert moved == [True, False, True]
        assert scales == [1.0, 0.5, 0.5]


class Recording(torch.optim.AdamW):
    """Remembers with which option each step ran."""

    seen: list[Any]

    def step(self, closure: Any = None) -> Any:
        self.seen = [*getattr(self, "seen", []), *(group["foreach"] for group in self.param_groups)]
        return super().step(closure)


def kernels(data: int, tensor: int, asked: bool | None) -> Any:
    fabric = planned("function", data, tensor, precision="16-mixed")
    model = make_model()
    optimizer = Recording(model.parameters(), lr=0.01, foreach=asked)
    fabric.setup(model, optimizer)
    for step, x in enumerate(tokens(3)):
        fabric.backward(loss_of(model, share_of(fabric, x)) * (float("inf") if step == 1 else 1.0))
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()
    fabric.release(model, optimizer)
    return optimizer.seen, state["param_groups"][0]["foreach"], optimizer.param_groups[0]["foreach"]


def test_torchs_loop_steps_on_plain_tensors_beside_dtensors_and_the_option_stays_the_users(ranks: RankPool) -> None:
    for seen, saved, left in ranks.run(kernels, 1, 2, None, ranks=2):
        assert seen == [False] * 3
        assert saved is left is None
    assert ranks.run(kernels, 1, 2, False, ranks=2) == [([False] * 3, False, False)] * 2


def test_two_meshes_keep_the_foreach_kernels(ranks: RankPool) -> None:
    assert ranks.run(kernels, 2, 2, True, ranks=4) == [([True] * 3, True, True)] * 4


def fused_on_a_mixture() -> None:
    fabric = planned("function", 1, 2)
    for option in ("foreach", "fused"):
        model = make_model()
        with pytest.raises(StrategyError, match=f"{option}=True.*plain tensors"):
            fabric.setup(model, torch.optim.AdamW(model.parameters(), **{option: True}))


def test_kernels_that_cannot_take_the_mixture_are_refused_when_asked_for(ranks: RankPool) -> None:
    ranks.run(fused_on_a_mixture, ranks=2)


def step_before_setup(data: int, tensor: int) -> Any:
    """The optimizer has state already, which has to follow its parameters."""
    model = make_model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    first, second = tokens(2)
    loss_of(model, first).backward()
    optimizer.step()
    optimizer.zero_grad()
    fabric = planned("function", data, tensor) if data * tensor > 1 else Fabric(accelerator="cpu", devices=1)
    fabric.setup(model, optimizer)
    fabric.backward(loss_of(model, share_of(fabric, second) if data * tensor > 1 else second))
    optimizer.step()
    return [full(parameter) for parameter in model.parameters()]


@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 2)])
def test_the_state_of_an_optimizer_follows_its_parameters(ranks: RankPool, data: int, tensor: int) -> None:
    expected = step_before_setup(1, 1)
    for found in ranks.run(step_before_setup, data, tensor, ranks=data * tensor):
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def give_up_a_window(data: int, tensor: int) -> Any:
    fabric = planned("function", data, tensor, precision="64-true")
    model, frozen = make_model(), make_model().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    fabric.setup(frozen)
    first, second = tokens(2)
    with contextlib.suppress(KeyError), fabric.no_backward_sync(model):
        fabric.backward(loss_of(model, share_of(fabric, first)))
        raise KeyError
    x = share_of(fabric, second)
    fabric.backward(loss_of(model, x) + functional.mse_loss(model(x), frozen(x)))
    optimizer.step()
    return [full(parameter) for parameter in model.parameters()]


@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 2)])
def test_a_window_that_was_given_up_leaves_nothing_and_a_frozen_teacher_works(
    ranks: RankPool, data: int, tensor: int
) -> None:
    model, frozen = make_model().double(), make_model().double()
    x = tokens(2)[1]
    (loss_of(model, x) + functional.mse_loss(model(x), frozen(x).detach())).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for found in ranks.run(give_up_a_window, data, tensor, ranks=data * tensor):
        for one, two in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(one, two.detach(), rtol=0, atol=1e-12)


def layouts_of_gradients() -> list[bool]:
    fabric = planned("sequence", 1, 2)
    model = fabric.setup(make_model())
    alike = []
    for x in tokens(2):  # the second is added to the first
        fabric.backward(loss_of(model, x))
        alike += [parameter.grad.placements == parameter.placements for parameter in model.parameters()]
    return alike


def test_gradients_are_laid_out_as_their_parameters(ranks: RankPool) -> None:
    """Autograd leaves those of norms on sharded activations as parts of sums, which nobody may add up or save."""
    assert ranks.run(layouts_of_gradients, ranks=2) == [[True] * 34] * 2


class Counted(Block):
    """Counts how often its forward runs."""

    count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counted.count += 1  # not of the type: fully_shard makes one of its own
        return super().forward(x)


def train_one_step(data: int, tensor: int, *, recompute: bool, compiled: bool) -> Any:
    strategy = ModelParallelStrategy(
        styles(), data, tensor, activation_checkpointing_policy={Counted} if recompute else None
    )
    fabric = Fabric(accelerator="cpu", devices=data * tensor, strategy=strategy, precision="64-true")
    Counted.count = 0
    model = make_model(dropout=0.5)
    for block in model.blocks:
        block.__class__ = Counted
    if compiled:
        model.compile(backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    torch.manual_seed(5)
    fabric.backward(loss_of(model, share_of(fabric, tokens(1)[0])))
    optimizer.step()
    torch._dynamo.reset()
    return [full(parameter) for parameter in model.parameters()], Counted.count


@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 2)])
def test_recomputed_blocks_train_as_kept_ones_with_the_same_dropout(ranks: RankPool, data: int, tensor: int) -> None:
    kept = ranks.run(train_one_step, data, tensor, recompute=False, compiled=False, ranks=data * tensor)
    recomputed = ranks.run(train_one_step, data, tensor, recompute=True, compiled=False, ranks=data * tensor)
    for (expected, runs), (found, runs_again) in zip(kept, recomputed, strict=True):
        assert (runs, runs_again) == (2, 4)
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 2)])
def test_a_compiled_model_trains_as_a_plain_one(ranks: RankPool, data: int, tensor: int) -> None:
    plain = ranks.run(train_one_step, data, tensor, recompute=False, compiled=False, ranks=data * tensor)
    compiled = ranks.run(train_one_step, data, tensor, recompute=False, compiled=True, ranks=data * tensor)
    for (expected, _), (found, _) in zip(plain, compiled, strict=True):
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def collectives_of_a_window(compiled: bool) -> int:
    fabric = planned("function", 2, 1)
    model = make_model()
    target: Any = torch.compile(model, backend="eager") if compiled else model
    fabric.setup(target)
    with CountCollectives() as counted, fabric.no_backward_sync(target):
        fabric.backward(loss_of(target, share_of(fabric, tokens(1)[0])))
    torch._dynamo.reset()
    assert all(parameter.grad is None for parameter in model.parameters())
    return counted.count


def test_gradients_of_a_compiled_model_wait_for_the_end_of_a_window_too(ranks: RankPool) -> None:
    assert ranks.run(collectives_of_a_window, True) == ranks.run(collectives_of_a_window, False)


def tie(model: Model) -> Model:
    model.head.weight = model.tokens.weight
    return model


def train_tied(data: int, tensor: int, sequence: bool) -> Any:
    fabric = planned("sequence" if sequence else "function", data, tensor, precision="64-true")
    model = tie(make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    for x in tokens(3):
        fabric.backward(loss_of(model, share_of(fabric, x)))
        optimizer.step()
        optimizer.zero_grad()
    return model.head.weight is model.tokens.weight, [full(parameter) for parameter in model.parameters()]


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 2)])
def test_tied_weights_stay_one_whether_the_plan_has_them_or_not(
    ranks: RankPool, data: int, tensor: int, sequence: bool
) -> None:
    model = tie(make_model()).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in tokens(3):
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    for is_tied, found in ranks.run(train_tied, data, tensor, sequence, ranks=data * tensor):
        assert is_tied
        for one, two in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(one, two.detach(), rtol=0, atol=1e-12)


def tie_that_the_plan_cuts() -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=ModelParallelStrategy({"head": styles()["blocks.*.up"]}))
    with pytest.raises(StrategyError, match=r"tokens\.weight and head\.weight, which are one"):
        fabric.setup(tie(make_model()))


def test_a_plan_that_lays_out_one_of_two_tied_weights_is_refused(ranks: RankPool) -> None:
    ranks.run(tie_that_the_plan_cuts, ranks=2)


def scales_with_a_waiting_gradient(data: int, tensor: int) -> list[float]:
    """The other optimizer holds a scaled gradient of which only rank 0 has an element that is not zero."""
    fabric = planned("function", data, tensor, precision="16-mixed")
    stepped, waiting = make_model(), make_model()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (stepped, waiting)]
    for model, optimizer in zip((stepped, waiting), optimizers, strict=True):
        fabric.setup(model, optimizer)
    x = share_of(fabric, tokens(1)[0])
    fabric.backward(loss_of(waiting, x))
    for parameter in waiting.parameters():
        gradient: Any = parameter.grad
        (gradient.to_local() if hasattr(gradient, "to_local") else gradient).zero_()
    if fabric.global_rank == 0:
        waiting.blocks[0].up.weight.grad.to_local().fill_(1.0)
    counted = []
    for _ in range(2):
        fabric.backward(loss_of(stepped, x))
        optimizers[0].step()
        optimizers[0].zero_grad()
        counted.append(fabric.state_dict()["loss_scaler"]["_growth_tracker"])
    optimizers[1].zero_grad()
    return [*counted, fabric.state_dict()["loss_scaler"]["_growth_tracker"]]


@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 2)])
def test_all_ranks_wait_for_a_scaled_gradient_that_one_of_them_holds(ranks: RankPool, data: int, tensor: int) -> None:
    assert ranks.run(scales_with_a_waiting_gradient, data, tensor, ranks=data * tensor) == [[0, 0, 1]] * (data * tensor)


def set_up_twice(plan: str, data: int, tensor: int) -> list[torch.Tensor]:
    model = make_model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in tokens(2):
        fabric = planned(plan, data, tensor)
        fabric.setup(model, optimizer)
        fabric.backward(loss_of(model, share_of(fabric, x)))
        optimizer.step()
        optimizer.zero_grad()
        fabric.release(model, optimizer)
    return [full(parameter) for parameter in model.parameters()]


@pytest.mark.parametrize(("plan", "data", "tensor"), [("sequence", 1, 2), ("function", 2, 2)])
def test_a_released_model_goes_on_when_it_is_set_up_again(ranks: RankPool, plan: str, data: int, tensor: int) -> None:
    model = make_model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in tokens(2):
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found in ranks.run(set_up_twice, plan, data, tensor, ranks=data * tensor):
        for one, two in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(one, two.detach(), rtol=0, atol=1e-12)


def collectives_of_a_norm_outside_the_plan() -> list[int]:
    """After each of three rounds of setup and release, in a backward that reaches nothing else."""
    model = make_model()
    counts = []
    for _ in range(3):
        fabric = planned("function", 1, 2)
        fabric.setup(model)
        fabric.release(model)
        with CountCollectives() as counter:
            model.norm(torch.linspace(0, 1, WIDTH).expand(2, WIDTH)).square().sum().backward()
        counts.append(counter.count)
        model.zero_grad()
    return counts


def test_a_released_model_watches_its_gradients_no_more(ranks: RankPool) -> None:
    assert ranks.run(collectives_of_a_norm_outside_the_plan, ranks=2) == [[0, 0, 0]] * 2
