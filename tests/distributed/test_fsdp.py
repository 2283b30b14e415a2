"""FSDP2 behind the same two lines: equal to one process, to hand-written ``fully_shard``, and safe to interrupt."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffload,
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy

import fabric_lite.checkpoint
from fabric_lite import Fabric, FabricTypeError, FabricValueError, StrategyError
from fabric_lite.precision import parse_precision
from fabric_lite.strategies import FSDPStrategy, Placement
from fabric_lite.strategies.blocks import choose_blocks
from fabric_lite.testing import RankPool
from tests.models import Block, Net, Normed, RecordCollectives, Stack, batches, full, make_net, make_stack

LEARNING_RATE = 0.1


def one_process(steps: int = 3, accumulate: int = 1, model: nn.Module | None = None) -> list[torch.Tensor]:
    model = make_stack() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    data = iter(batches(steps * accumulate))
    for _ in range(steps):
        for _ in range(accumulate):
            (model(next(data)).pow(2).mean() / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def set_up(strategy: Any, model: nn.Module | None = None, **options: Any) -> tuple[Fabric, Any, torch.optim.Optimizer]:
    fabric = Fabric(accelerator="cpu", strategy=strategy, **options)
    model = make_stack() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    fabric.setup(model, optimizer)
    return fabric, model, optimizer


def share(fabric: Fabric, batch: torch.Tensor) -> torch.Tensor:
    return batch.chunk(fabric.world_size)[fabric.global_rank]


def train(strategy: Any, accumulate: int = 1, steps: int = 3) -> list[torch.Tensor]:
    fabric, model, optimizer = set_up(strategy)
    data = iter(batches(steps * accumulate))
    for _ in range(steps):
        for number in range(accumulate):
            with fabric.no_backward_sync(model, enabled=number < accumulate - 1):
                fabric.backward(model(share(fabric, next(data))).pow(2).mean() / accumulate)
        optimizer.step()
        optimizer.zero_grad()
    return [full(parameter) for parameter in model.parameters()]


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor], atol: float = 1e-6) -> None:
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=atol)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload", FSDPStrategy(reshard_after_forward=False)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_sharded_training_equals_one_process(ranks: RankPool, strategy: Any, accumulate: int) -> None:
    expected = one_process(accumulate=accumulate)
    for result in ranks.run(train, strategy, accumulate):
        assert_equal(result, expected)


@pytest.mark.parametrize("strategy", ["hsdp", FSDPStrategy(replicas=2, reshard_after_forward=False)])
def test_two_groups_of_two_ranks_equal_one_process(ranks: RankPool, strategy: Any) -> None:
    for result in ranks.run(train, strategy, 2, ranks=4):
        assert_equal(result, one_process(accumulate=2))


def blocks_of(model: nn.Module, policy: Any) -> list[str]:
    chosen = choose_blocks(model, policy)
    return [name for name, child in model.named_modules() if any(child is block for block in chosen)]


def test_blocks_are_the_repeated_layers_or_what_the_policy_says() -> None:
    layers = ["blocks.0", "blocks.1", "blocks.2"]
    assert blocks_of(Stack(), None) == layers
    assert blocks_of(Stack(), {Block}) == layers
    assert blocks_of(Stack(), Block) == layers
    assert blocks_of(Stack(), ModuleWrapPolicy({Block})) == layers
    assert blocks_of(Stack(), lambda module: isinstance(module, nn.LayerNorm)) == [f"{name}.norm" for name in layers]
    by_size = functools.partial(size_based_auto_wrap_policy, min_num_params=70)
    assert blocks_of(Stack(), by_size) == [f"{name}.mix" for name in layers]  # their norms are left to the root
    by_size = functools.partial(size_based_auto_wrap_policy, min_num_params=100)
    assert blocks_of(nn.TransformerEncoderLayer(8, 2, 16), by_size) == ["linear1", "linear2"]  # attention is one piece
    assert blocks_of(Net(), None) == []
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 3)
    assert blocks_of(encoder, None) == ["layers.0", "layers.1", "layers.2"]
    assert blocks_of(Stack(), ()) == []


def test_small_repeated_layers_are_left_to_the_root() -> None:
    small = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(3))
    assert blocks_of(nn.Sequential(nn.Linear(100, 100), small), None) == []
    assert blocks_of(nn.Sequential(nn.Linear(4, 4), small), None) == ["1.0", "1.1", "1.2"]


def test_layers_without_modules_in_them_are_left_to_the_root() -> None:
    perceptron = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    assert blocks_of(perceptron, None) == []
    assert blocks_of(perceptron, {nn.Linear}) == ["0", "2"]


def test_blocks_whose_weights_are_tied_to_others_are_left_to_the_root() -> None:
    model = Stack()
    model.blocks[1].mix.weight = nn.Parameter(torch.zeros(8, 8))
    model.register_parameter("tied", model.blocks[1].mix.weight)
    assert blocks_of(model, None) == ["blocks.0", "blocks.2"]


def test_a_policy_that_finds_nothing_says_what_there_is() -> None:
    with pytest.raises(StrategyError, match=r"found no Net in the model[^G]*Given: Stack made of Block, LayerNorm"):
        choose_blocks(Stack(), {Net})


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (FabricTypeError, "auto_wrap_policy must be classes", {"auto_wrap_policy": "Block"}),
        (FabricTypeError, "auto_wrap_policy must be classes", {"auto_wrap_policy": {int}}),
        (FabricValueError, "replicas is the number", {"replicas": 0}),
        (FabricValueError, "replicas is the number", {"replicas": True}),
        (FabricValueError, "over how many ranks", {"reshard_after_forward": "no"}),
        (FabricValueError, "kind of checkpoint", {"state_dict_type": "local"}),
        (FabricValueError, "strategy='ddp' for NO_SHARD", {"sharding_strategy": "NO_SHARD"}),
        (FabricTypeError, "True or False", {"cpu_offload": "cpu"}),
    ],
)
def test_wrong_options_are_refused(error: type[Exception], match: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=match):
        FSDPStrategy(**options)


def test_the_words_of_fsdp1_and_lightning_mean_what_they_meant() -> None:
    for given in (False, CPUOffload(offload_params=False), OffloadPolicy()):
        assert FSDPStrategy(cpu_offload=given).cpu_offload is False, given
    for given in (True, CPUOffload(offload_params=True), CPUOffloadPolicy()):
        assert FSDPStrategy(cpu_offload=given).cpu_offload is True, given
    for word in ("HYBRID_SHARD", "hybrid_shard", ShardingStrategy.HYBRID_SHARD):
        assert FSDPStrategy(sharding_strategy=word).replicas == "auto"
    one, same = FSDPStrategy(auto_wrap_policy={Block}), FSDPStrategy(auto_wrap_policy={Block})
    assert one == same
    assert hash(one) == hash(same)


def test_the_mesh_follows_nodes_and_options() -> None:
    assert FSDPStrategy().mesh_axes(4, 4) == {"shard": 4}
    assert FSDPStrategy(replicas=2).mesh_axes(6, 6) == {"replicate": 2, "shard": 3}
    assert FSDPStrategy(replicas="auto").mesh_axes(16, 8) == {"replicate": 2, "shard": 8}
    assert FSDPStrategy(replicas="auto").mesh_axes(8, 8) == {"replicate": 2, "shard": 4}
    assert FSDPStrategy(replicas="auto").mesh_axes(2, 2) == {"shard": 2}
    assert FSDPStrategy(sharding_strategy="SHARD_GRAD_OP").reshard_after_forward is False
    with pytest.raises(FabricValueError, match=r"4 ranks, replicas=3"):
        FSDPStrategy(replicas=3).mesh_axes(4, 4)


def collectives(reshard_after_forward: bool | None, precision: str) -> tuple[Any, Any]:
    """Those of a window of three micro-steps: by Fabric, and by hand."""
    strategy = FSDPStrategy(reshard_after_forward=reshard_after_forward)
    fabric, model, optimizer = set_up(strategy, precision=precision)
    by_hand = make_stack()
    mixed = MixedPrecisionPolicy(fabric.precision.compute_dtype, fabric.precision.reduce_dtype)
    for part in [*by_hand.blocks, by_hand]:
        fully_shard(part, mesh=fabric.device_mesh, mp_policy=mixed, reshard_after_forward=reshard_after_forward)
    data = batches(3)
    with RecordCollectives() as ours:
        for number, batch in enumerate(data):
            with fabric.no_backward_sync(model, enabled=number < 2):
                fabric.backward(model(batch).mean())
        optimizer.step()
        optimizer.zero_grad()
    with RecordCollectives() as theirs:
        for number, batch in enumerate(data):
            by_hand.set_requires_gradient_sync(number == 2)  # type: ignore[attr-defined]
            by_hand(batch).float().mean().backward()
    return ours.calls, theirs.calls


@pytest.mark.parametrize("reshard_after_forward", [None, True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_collectives_are_those_of_fully_shard_by_hand(
    ranks: RankPool, reshard_after_forward: bool | None, precision: str
) -> None:
    ours, theirs = ranks.run(collectives, reshard_after_forward, precision)[0]
    assert ours == theirs
    names = [name for name, _ in ours]
    groups, micro_steps = 4, 3
    gathers = {None: 2 * groups - 1, True: 2 * groups, False: groups}[reshard_after_forward]
    assert sum("reduce_scatter" in name for name in names) == groups  # once, at the end of the window
    assert sum("gather" in name for name in names) == micro_steps * gathers


def give_up_windows() -> list[bool]:
    fabric, model, optimizer = set_up("fsdp")
    first, second = (share(fabric, batch) for batch in batches(2))
    reference = make_stack()
    reference(batches(2)[1]).pow(2).mean().backward()
    expected = [parameter.grad for parameter in reference.parameters()]

    def gradients_of_a_good_step() -> bool:
        fabric.backward(model(second).pow(2).mean())
        good = [full(parameter.grad) for parameter in model.parameters()]
        optimizer.zero_grad()
        return all(torch.allclose(one, two, atol=1e-6) for one, two in zip(good, expected, strict=True))

    def half_a_window() -> None:
        with fabric.no_backward_sync(model):
            fabric.backward(model(first).pow(2).mean())

    right = []
    for clear in (optimizer.zero_grad, model.zero_grad):
        half_a_window()
        clear()
        right.append(gradients_of_a_good_step())
    with pytest.raises(KeyError), fabric.no_backward_sync(model):
        fabric.backward(model(first).pow(2).mean())
        raise KeyError
    right.append(gradients_of_a_good_step())
    with fabric.no_backward_sync(model, enabled=False):
        right.append(gradients_of_a_good_step())
    with fabric.no_backward_sync(model):
        with fabric.no_backward_sync(model):
            fabric.backward(model(first).pow(2).mean())
        fabric.backward(model(first).pow(2).mean())
        right.append(all(parameter.grad is None for parameter in model.parameters()))
    model.zero_grad()
    half_a_window()
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    fabric.setup_optimizers(other)
    other.zero_grad()  # has no part in this model
    right.append(not gradients_of_a_good_step())
    return right


def test_a_window_that_is_given_up_leaves_nothing_behind(ranks: RankPool) -> None:
    assert ranks.run(give_up_windows) == [[True] * 6] * 2


class Fragile(Stack):
    """Raises in its second block, or in the backward of its output, when told to."""

    broken: str | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](self.first(x))
        if self.broken == "forward":
            raise KeyError("forward")
        x = self.blocks[1](x)
        if self.broken == "backward":
            x.register_hook(self.fail)
        return self.last(self.blocks[2](x))

    def fail(self, _: torch.Tensor) -> None:
        raise KeyError("backward")


def interrupted(where: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    fabric, model, optimizer = set_up("fsdp", Fragile())
    for batch in batches(3):
        model.broken = where
        with pytest.raises(KeyError, match=where):
            fabric.backward(model(share(fabric, batch)).pow(2).mean())
        optimizer.zero_grad()
        model.broken = None
        fabric.backward(model(share(fabric, batch)).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    return [full(parameter) for parameter in model.parameters()]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_training_goes_on_after_an_exception_in_the_middle_of_a_step(ranks: RankPool, where: str) -> None:
    for result in ranks.run(interrupted, where):
        assert_equal(result, one_process())


def interleaved() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    fabric, one, first = set_up("fsdp")
    two = make_stack()
    second = torch.optim.SGD(two.parameters(), lr=LEARNING_RATE, momentum=0.9)
    fabric.setup(two, second)
    for batch in batches(3):
        x = share(fabric, batch)
        with fabric.no_backward_sync(one, enabled=False):
            a, b = one(x), two(x)
        fabric.backward(b.pow(2).mean())
        fabric.backward(a.pow(2).mean())
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    return [full(p) for p in one.parameters()], [full(p) for p in two.parameters()]


def test_two_interleaved_models_stay_synchronized(ranks: RankPool) -> None:
    expected = one_process()
    for one, two in ranks.run(interleaved):
        assert_equal(one, expected)
        assert_equal(two, expected)


def without_a_seed() -> list[torch.Tensor]:
    torch.manual_seed(100 + torch.distributed.get_rank())
    _, model, _ = set_up("fsdp", Stack())
    return [full(parameter) for parameter in model.parameters()]


def test_ranks_start_from_the_values_of_rank_zero(ranks: RankPool) -> None:
    for result in ranks.run(without_a_seed):
        assert_equal(result, [parameter.detach() for parameter in make_stack(100).parameters()], atol=0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head.weight = self.embed.weight
        self.head.requires_grad_(True)
        self.blocks[0].norm.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed((x.abs() * 5).long().clamp(max=15))))


def train_tied() -> tuple[bool, list[torch.Tensor]]:
    torch.manual_seed(0)
    fabric, model, optimizer = set_up("fsdp", Tied())
    for batch in batches(3):
        fabric.backward(model(share(fabric, batch)).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    return model.head.weight is model.embed.weight, [full(parameter) for parameter in model.parameters()]


def test_tied_weights_stay_tied_and_frozen_ones_frozen(ranks: RankPool) -> None:
    torch.manual_seed(0)
    expected = one_process(model=Tied())
    for tied, result in ranks.run(train_tied):
        assert tied
        assert_equal(result, expected)


def odd_models() -> list[Any]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp")
    teacher = make_net().requires_grad_(False)
    fabric.setup(teacher)
    found = [torch.equal(teacher(batches(1)[0]), make_net()(batches(1)[0]))]
    nothing = fabric.setup(nn.Sequential(nn.ReLU(), nn.Flatten()))
    found.append(nothing(torch.tensor([[-1.0, 2.0]])).tolist() == [[0.0, 2.0]])
    by_hand = make_stack()
    for part in [*by_hand.blocks, by_hand]:
        fully_shard(part)
    found.append(isinstance(fabric.setup(by_hand), FSDPModule))
    scalar = nn.Linear(2, 2)
    scalar.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    with pytest.raises(StrategyError, match=r"without dimensions(.|\n)*scale in Linear"):
        fabric.setup(scalar)
    with pytest.raises(StrategyError, match="has no forward"):
        fabric.setup(nn.ModuleList([nn.Linear(2, 2)]))
    return [*found, type(by_hand).__name__, type(teacher).__name__, isinstance(teacher, Net)]


def test_odd_models_are_set_up_or_refused_clearly(ranks: RankPool) -> None:
    assert ranks.run(odd_models) == [[True, True, True, "Stack", "Net", True]] * 2


def state_before_setup() -> list[torch.Tensor]:
    model = make_stack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(batches(1)[0]).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp")
    fabric.setup(model, optimizer)
    for batch in batches(2, seed=5):
        fabric.backward(model(share(fabric, batch)).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    return [full(parameter) for parameter in model.parameters()]


def test_an_optimizer_that_has_stepped_before_setup_keeps_its_state(ranks: RankPool) -> None:
    model = make_stack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for batch in [*batches(1), *batches(2, seed=5)]:
        model(batch).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for result in ranks.run(state_before_setup):
        assert_equal(result, [parameter.detach() for parameter in model.parameters()], atol=1e-5)


def optimizer_set_up_apart(order: str) -> list[list[torch.Tensor]]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp")
    models = [make_stack(), make_stack()]
    optimizer = torch.optim.AdamW([p for model in models for p in model.parameters()], lr=0.01)
    for model in models:
        model(batches(1)[0]).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if order == "optimizer with the first model":
        fabric.setup(models[0], optimizer)
        fabric.setup(models[1])
    else:
        if order == "optimizer first":
            fabric.setup_optimizers(optimizer)
        for model in models:
            fabric.setup_module(model)
        if order == "optimizer last":
            fabric.setup_optimizers(optimizer)
    for batch in batches(2, seed=5):
        for model in models:
            fabric.backward(model(share(fabric, batch)).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    return [[full(parameter) for parameter in model.parameters()] for model in models]


@pytest.mark.parametrize("order", ["optimizer last", "optimizer first", "optimizer with the first model"])
def test_an_optimizer_of_two_models_is_set_up_in_any_order(ranks: RankPool, order: str) -> None:
    model = make_stack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for batch in [*batches(1), *batches(2, seed=5)]:
        model(batch).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for models in ranks.run(optimizer_set_up_apart, order):
        for result in models:
            assert_equal(result, [parameter.detach() for parameter in model.parameters()], atol=1e-5)


def overflow_on_one_rank() -> list[Any]:
    fabric, model, optimizer = set_up("fsdp", precision="16-mixed")
    x = share(fabric, batches(1)[0])
    start = [full(parameter) for parameter in model.parameters()]
    scale = fabric.state_dict()["loss_scaler"]["scale"]
    fabric.backward(model(x).mean() * (float("inf") if fabric.global_rank == 1 else 1.0))
    optimizer.step()
    optimizer.zero_grad()
    untouched = all(torch.equal(one, full(two)) for one, two in zip(start, model.parameters(), strict=True))
    fabric.backward(model(x).mean())
    halved = fabric.state_dict()["loss_scaler"]["scale"] == scale / 2
    optimizer.step()
    moved = not all(torch.equal(one, full(two)) for one, two in zip(start, model.parameters(), strict=True))
    with pytest.raises(RuntimeError, match=r"fabric\.backward"):
        model(x).mean().backward()
    return [untouched, halved, moved, model(x).dtype]


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: RankPool) -> None:
    assert ranks.run(overflow_on_one_rank) == [[True, True, True, torch.float32]] * 2


def nan_on_one_rank() -> bool:
    fabric, model, optimizer = set_up("fsdp")
    start = [full(parameter) for parameter in model.parameters()]
    fabric.backward(model(batches(1)[0]).mean() * (float("nan") if fabric.global_rank == 1 else 1.0))
    with pytest.raises(RuntimeError, match="non-finite"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    return all(torch.equal(one, full(two)) for one, two in zip(start, model.parameters(), strict=True))


def test_a_norm_that_is_not_finite_raises_on_all_ranks_before_anything_changes(ranks: RankPool) -> None:
    assert ranks.run(nan_on_one_rank) == [True, True]


def with_checkpointing(policy: Any) -> tuple[list[torch.Tensor], int]:
    strategy = FSDPStrategy(activation_checkpointing_policy=policy)
    fabric, model, optimizer = set_up(strategy)
    kept: list[int] = []
    for batch in batches(3):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = model(share(fabric, batch)).pow(2).mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return [full(parameter) for parameter in model.parameters()], sum(kept)


def test_activation_checkpointing_changes_memory_and_nothing_else(ranks: RankPool) -> None:
    plain, checkpointed = ranks.run(with_checkpointing, None)[0], ranks.run(with_checkpointing, {Block})[0]
    assert all(torch.equal(one, two) for one, two in zip(plain[0], checkpointed[0], strict=True))
    assert checkpointed[1] < plain[1] / 2


class Initialized(Stack):
    """Has values from its constructors, from its own function, and a computed buffer; two weights are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Linear(8, 4)
        self.tied.weight = self.last.weight
        self.register_buffer("scale", torch.linspace(1, 2, 4))
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


def without_memory(strategy: Any, precision: str, seeded: bool) -> Any:
    fabric = Fabric(
        accelerator="cpu", devices=torch.distributed.get_world_size(), strategy=strategy, precision=precision
    )
    torch.manual_seed(7 if seeded else 7 + fabric.global_rank)
    with fabric.init_module(empty_init=True):
        model = Initialized()
    on_meta = all(parameter.is_meta for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    fabric.setup(model, optimizer)
    values = {key: full(value) for key, value in model.state_dict().items()}
    after = torch.rand(1).item()
    fabric.backward(model(batches(1)[0]).pow(2).mean())
    optimizer.step()
    moved = not torch.equal(full(model.first.weight), values["first.weight"])
    return on_meta, values, after, moved, model.tied.weight is model.last.weight


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload"])
@pytest.mark.parametrize(("precision", "seeded"), [("32-true", True), ("64-true", True), ("bf16-mixed", False)])
def test_a_model_made_without_memory_has_the_values_of_the_plain_construction(
    ranks: RankPool, strategy: str, precision: str, seeded: bool
) -> None:
    torch.manual_seed(7)
    with Fabric(accelerator="cpu", devices=1, precision=precision).init_module():
        expected = Initialized()
    drawn = torch.rand(1).item()
    for on_meta, values, after, moved, tied in ranks.run(without_memory, strategy, precision, seeded):
        assert (on_meta, moved, tied) == (True, True, True)
        assert after == drawn
        assert list(values) == list(expected.state_dict())
        for key, value in expected.state_dict().items():
            assert torch.equal(values[key], value)


def normed(strategy: str) -> tuple[list[torch.Tensor], int]:
    fabric, model, optimizer = set_up(strategy, nn.Sequential(Normed(), Normed()))
    with RecordCollectives() as calls:
        for number, batch in enumerate(batches(4)):
            with fabric.no_backward_sync(model, enabled=number % 2 == 0):
                fabric.backward(model(share(fabric, batch)).pow(2).mean())
    optimizer.step()
    sent = sum("broadcast" in name for name, _ in calls.calls)
    model.eval()
    with torch.no_grad():
        return [model(batches(1)[0]), *(buffer.clone() for buffer in model.buffers())], sent


def test_batch_norm_evaluates_alike_on_all_ranks_and_as_under_ddp(ranks: RankPool) -> None:
    (first, sent), (second, _) = ranks.run(normed, "fsdp")
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert_equal(first[1:], ranks.run(normed, "ddp")[0][0][1:], atol=1e-5)
    assert sent == 2 * 2  # per synchronizing forward, floats and counters


def batch_norm_in(precision: str) -> float:
    """The largest difference to whole models under autocast, of outputs and gradients; all ranks have one batch."""
    x = batches(1)[0]
    runs = []
    for strategy in ("ddp", "fsdp"):
        torch.manual_seed(0)
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, precision=precision)
        model = fabric.setup(nn.Sequential(nn.BatchNorm1d(4), Normed(), Normed(), nn.Linear(4, 4)))
        output = model(x)
        fabric.backward(output.pow(2).mean())
        scale = fabric.state_dict()["loss_scaler"]["scale"] if precision == "16-mixed" else 1.0
        runs.append([output.detach(), *(full(parameter.grad) / scale for parameter in model.parameters())])
    return max(float((one - two).abs().max()) for one, two in zip(*runs, strict=True))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_batch_norm_runs_in_mixed_precision(ranks: RankPool, precision: str) -> None:
    # One rounding of the last layer's weights and gradients to half; the norms are as exact as under autocast.
    assert max(ranks.run(batch_norm_in, precision)) <= 2e-2


def test_buffers_come_to_the_device_when_parameters_stay_with_the_host() -> None:
    model = Normed()
    placement = Placement(torch.device("meta"), parse_precision(None))
    FSDPStrategy(cpu_offload=True).materialize(model, placement, lambda _: None)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}


def evaluates_between_backward_and_step() -> list[bool]:
    """A sharded model on one rank, where nothing else would gather it anew."""
    fabric, model, optimizer = set_up("fsdp")
    raw = make_stack()
    by_hand = torch.optim.SGD(raw.parameters(), lr=LEARNING_RATE, momentum=0.9)
    same = []
    for batch in batches(3):
        fabric.backward(model(batch).pow(2).mean())
        raw(batch).pow(2).mean().backward()
        with torch.no_grad():
            same.append(torch.equal(model(batch), raw(batch)))
        for step in (optimizer, by_hand):
            step.step()
            step.zero_grad()
    return same


def test_a_forward_between_backward_and_step_leaves_nothing_stale(ranks: RankPool) -> None:
    assert ranks.run(evaluates_between_backward_and_step, ranks=1) == [[True] * 3]


def two_dtypes() -> str:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp")
    model = make_stack()
    model.last.double()
    with pytest.raises(StrategyError, match="must have one dtype") as error:
        fabric.setup(model)
    return str(error.value)


def refused_setup() -> list[Any]:
    """Blocks come before the root in order, and it is the root that has two dtypes."""
    model = make_stack()
    model.last.double()
    strategy = FSDPStrategy(activation_checkpointing_policy={Block})
    with pytest.raises(StrategyError, match=r"float32 and last\.weight of torch\.float64 in Stack"):
        Fabric(accelerator="cpu", devices=2, strategy=strategy).setup(model)
    return [type(model.blocks[0]), "forward" in model.blocks[0].__dict__, type(model.blocks[0].mix.weight)]


def test_a_setup_that_is_refused_leaves_the_model_as_it_was(ranks: RankPool) -> None:
    assert ranks.run(refused_setup) == [[Block, False, nn.Parameter]] * 2


def test_a_group_of_two_dtypes_is_refused_with_their_names(ranks: RankPool) -> None:
    assert "first.weight of torch.float32 and last.weight of torch.float64" in ranks.run(two_dtypes)[0]


def step_before_synchronizing() -> list[str]:
    fabric, model, optimizer = set_up("fsdp")
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    fabric.setup_optimizers(other)
    messages = []
    for call in (optimizer.step, lambda: fabric.clip_gradients(model, optimizer, max_norm=1.0)):
        with fabric.no_backward_sync(model):
            fabric.backward(model(batches(1)[0]).mean())
        other.step()  # has no part in this model
        with pytest.raises(StrategyError, match="still wait") as error:
            call()
        messages.append(str(error.value))
        optimizer.zero_grad()
        optimizer.step()  # nothing waits any more, and there is nothing to step on
    fabric.backward(model(batches(1)[0]).mean())
    optimizer.step()
    return messages


def test_a_step_on_gradients_that_still_wait_is_refused(ranks: RankPool) -> None:
    for step, clip in ranks.run(step_before_synchronizing):
        assert "step() after micro-steps" in step
        assert "clip_gradients() after micro-steps" in clip


def exchanged_parameters() -> list[Any]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp")
    calls: list[str] = []
    model = make_stack()
    model.first.weight.learning_rate = 3  # type: ignore[attr-defined]
    model.first.weight.register_post_accumulate_grad_hook(lambda parameter: calls.append(type(parameter).__name__))
    fabric.setup(model)
    fabric.backward(model(batches(1)[0]).mean())
    found: list[Any] = [model.first.weight.learning_rate, calls]
    hooked = make_stack()
    hooked.last.weight.register_hook(lambda gradient: gradient)
    with pytest.raises(StrategyError, match="hook on a parameter's gradient"):
        fabric.setup(hooked)
    used = make_stack()
    used(batches(1)[0]).mean().backward()
    with pytest.raises(StrategyError, match="Gradients from before setup"):
        fabric.setup(used)
    used.zero_grad()
    fabric.setup(used)
    for refused, match in ((nn.Embedding(4, 4, sparse=True), "Sparse gradients"), (Empty(), "without elements")):
        with pytest.raises(StrategyError, match=match):
            fabric.setup(refused)
    return found


class Empty(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.nothing = nn.Parameter(torch.ones(0, 4))


def test_parameters_keep_attributes_and_hooks_or_setup_says_which_are_lost(ranks: RankPool) -> None:
    assert ranks.run(exchanged_parameters) == [[3, ["DTensor"]]] * 2


def orthogonal() -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), nn.Linear(8, 4))
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp", precision="bf16-mixed")
    torch.manual_seed(0)
    raw = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), nn.Linear(8, 4))
    fabric.setup(model)
    x = torch.randn(4, 8)
    return float((model(x) - raw(x)).abs().max())


def test_parametrized_weights_are_computed_in_their_own_dtype(ranks: RankPool) -> None:
    assert max(ranks.run(orthogonal)) < 0.02


def save_while_inferring(folder: str) -> bool:
    fabric, model, _ = set_up(FSDPStrategy(precision="bf16-mixed"))  # type: ignore[arg-type]
    with torch.inference_mode():
        model(batches(1)[0])
        fabric.save(folder, {"model": model})
    fabric.backward(model(batches(1)[0]).mean())
    return fabric.precision.name == "bf16-mixed"


def test_a_checkpoint_may_be_saved_in_inference_mode(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(save_while_inferring, str(tmp_path / "ckpt")) == [True, True]
    assert set(fabric_lite.checkpoint.load(tmp_path / "ckpt")["model"]) == set(make_stack().state_dict())
