"""A module made without memory gets, at the end, the bits that a plain construction under the same seed gives it."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fabric_lite import StrategyError
from fabric_lite.deferred import record, values_of
from fabric_lite.deferred import recording as recording_module
from fabric_lite.init import tensors_on

CPU = torch.device("cpu")


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under every name, and tensors that are plain attributes."""
    found: dict[str, torch.Tensor] = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        for table in (child._parameters, child._buffers, vars(child)):
            found |= {f"{prefix}.{key}": value for key, value in table.items() if isinstance(value, torch.Tensor)}
    return found


def deferred(build: Callable[[], nn.Module]) -> nn.Module:
    with record():
        module = build()
    assert all(tensor.is_meta for tensor in tensors_of(module).values())
    return filled(module)


def filled(module: nn.Module) -> nn.Module:
    values = values_of(module)
    assert values is not None
    values.fill(module, CPU)
    return module


def assert_same(one: nn.Module, two: nn.Module) -> None:
    ones, twos = tensors_of(one), tensors_of(two)
    assert list(ones) == list(twos)
    for name, tensor in ones.items():
        other = twos[name]
        assert (tensor.dtype, tensor.device, tensor.stride()) == (other.dtype, other.device, other.stride()), name
        assert tensor.requires_grad == other.requires_grad or not isinstance(tensor, nn.Parameter), name
        assert type(tensor) is type(other), name
        assert (
            torch.equal(tensor.view(-1).detach(), other.view(-1).detach())
            if tensor.is_contiguous()
            else torch.equal(tensor, other)
        ), name
    shared = {(a, b) for a in ones for b in ones if ones[a] is ones[b]}
    assert shared == {(a, b) for a in twos for b in twos if twos[a] is twos[b]}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("mask", torch.tril(torch.ones(8, 8)).view(1, 1, 8, 8), persistent=False)


class GPT(nn.Module):
    """Tied weights, an ``apply`` over all modules, and a scaled initialization of some weights after it."""

    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, width, padding_idx=0)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 11, bias=False)
        self.apply(self._init_weights)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if name.endswith("down.weight"):
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * layers))

    def _init_weights(self, module: nn.Module) -> None:
        # As transformers writes it.
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()
        elif isinstance(module, nn.LayerNorm):
            module.bias.data.zero_()
            module.weight.data.fill_(1.0)


class Computed(nn.Module):
    """Buffers from arithmetic: rotary frequencies, sines, a window, a mask, tables from data."""

    def __init__(self) -> None:
        super().__init__()
        inverse = 1.0 / (10000 ** (torch.arange(0, 16, 2).float() / 16))
        self.register_buffer("angles", torch.outer(torch.arange(8).float(), inverse))
        self.register_buffer("rotary", torch.polar(torch.ones_like(self.angles), self.angles))
        sines = torch.zeros(8, 16)
        position = torch.arange(8).unsqueeze(1)
        terms = torch.exp(torch.arange(0, 16, 2) * (-math.log(10000.0) / 16))
        sines[:, 0::2] = torch.sin(position * terms)
        sines[:, 1::2] = torch.cos(position * terms)
        self.register_buffer("sines", sines)
        self.register_buffer("window", torch.hann_window(8))
        self.register_buffer("mask", torch.full((8, 8), float("-inf")).triu(1))
        self.register_buffer("ratio", torch.arange(8) / 3)
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1))
        self.register_buffer("table", torch.from_numpy(np.arange(6.0)) * torch.ones(6, dtype=torch.float64))
        self.register_buffer("grid", torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")))
        self.register_buffer("counter", torch.tensor(3))
        self.register_buffer("selected", torch.arange(5)[torch.tensor([True, False, True, True, False])])
        self.scale = torch.full((3,), 2.0)  # no buffer
        self.rates = [rate.item() for rate in torch.linspace(0, 0.2, 4)]
        assert self.rates == torch.linspace(0, 0.2, 4).tolist()
        assert self.rates == list(torch.linspace(0, 0.2, 4).double().numpy())
        assert self.rates[3] == torch.tensor(0.2).item()


class Written(nn.Module):
    """Parameters that are computed, and written in parts and through views."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = nn.Parameter(torch.randn(4, 4) * 0.02)
        self.legacy = nn.Parameter(torch.Tensor(3, 4))
        self.legacy.data.normal_()
        self.rows = nn.Parameter(torch.empty(4, 4))
        with torch.no_grad():
            self.rows.uniform_(-1, 1)
            self.rows[0].fill_(1)
            self.rows[1:3].normal_()
            self.rows[:, 3] = torch.rand(4)
            self.rows.mul_(2).clamp_(-1.5, 1.5)
        self.copied = nn.Parameter(torch.empty(4, 4))
        self.copied.data.copy_(self.rows.data.t())
        self.frozen = nn.Parameter(torch.rand(4), requires_grad=False)
        self.given = nn.Parameter(torch.empty(3))
        with torch.no_grad():
            self.given.copy_(torch.from_numpy(np.array([1.0, 2.0, 3.0], dtype=np.float32)))
        self.permuted = nn.Parameter(torch.randn(8)[torch.randperm(8)])
        self.masked = nn.Parameter(torch.randn(8))
        with torch.no_grad():
            self.masked[self.masked > 0.5] = 0
            self.masked.masked_fill_(self.masked < -0.5, 1.0)
        self.image = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))


INITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "trunc_normal": lambda w: nn.init.trunc_normal_(w, std=0.02),
    "orthogonal": nn.init.orthogonal_,
    "kaiming_uniform": lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)),
    "kaiming_normal": nn.init.kaiming_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "eye": nn.init.eye_,
    "sparse": lambda w: nn.init.sparse_(w, 0.3),
    "constant": lambda w: nn.init.constant_(w, 0.3),
}


def initialized(name: str) -> nn.Module:
    module = nn.Linear(6, 5)
    INITS[name](module.weight)
    return module


def dirac() -> nn.Module:
    module = nn.Conv1d(4, 4, 3)
    nn.init.dirac_(module.weight)
    return module


def copies() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.ModuleList([copy.deepcopy(layer) for _ in range(3)])


def cast() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4).half(), nn.Linear(4, 4).to(torch.bfloat16), nn.Linear(4, 4).to("cpu").double())


def tied_by_data() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight.data = module[0].weight.data
    return module


def seeded_inside() -> nn.Module:
    first = nn.Linear(4, 4)
    torch.manual_seed(0)
    second = nn.Linear(4, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        third = nn.Linear(4, 4)
    return nn.Sequential(first, second, third, nn.Linear(4, 4))


def with_own_generator() -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.normal_(module[0].weight, generator=generator)
    module[1].weight.data.copy_(torch.randn(4, 4, generator=generator))
    return module


def parametrized(name: str) -> nn.Module:
    from torch.nn.utils import parametrizations

    return getattr(parametrizations, name)(nn.Linear(5, 4))


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="deprecated"):
        return nn.utils.weight_norm(nn.Linear(4, 4))


def conjugated() -> nn.Module:
    module = nn.Module()
    module.register_buffer("waves", torch.randn(4, dtype=torch.complex64).conj())
    module.imaginary = nn.Parameter(module.waves.imag.clone())
    return module


def used_while_built() -> nn.Module:
    module = nn.BatchNorm1d(3)
    module(torch.randn(5, 3))  # writes its statistics
    return module


def initialized_lazily() -> nn.Module:
    module = nn.LazyLinear(3)
    module(torch.randn(2, 4))
    return module


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 3),
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose1d(2, 3, 3)),
    "embedding": lambda: nn.Embedding(7, 4, padding_idx=2),
    "embedding_bag": lambda: nn.EmbeddingBag(7, 4),
    "norms": lambda: nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.InstanceNorm1d(4, True)),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "lstm": lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True),
    "bilinear": lambda: nn.Sequential(nn.Bilinear(3, 4, 2), nn.PReLU()),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3),
    "transformer": lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
    "gpt": GPT,
    "computed": Computed,
    "written": Written,
    **{name: lambda name=name: initialized(name) for name in INITS},
    "dirac": dirac,
    "copies": copies,
    "conjugated": conjugated,
    "used_while_built": used_while_built,
    "lazy": initialized_lazily,
    "cast": cast,
    "tied_by_data": tied_by_data,
    "seeded_inside": seeded_inside,
    "own_generator": with_own_generator,
    "weight_norm": lambda: parametrized("weight_norm"),
    "spectral_norm": lambda: parametrized("spectral_norm"),
    "orthogonal_parametrization": lambda: parametrized("orthogonal"),
    "old_weight_norm": old_weight_norm,
}


@pytest.mark.parametrize("name", MODELS)
def test_values_and_the_generator_are_those_of_a_plain_construction(name: str) -> None:
    torch.manual_seed(7)
    plain = MODELS[name]()
    after = torch.rand(3)
    torch.manual_seed(7)
    module = deferred(MODELS[name])
    assert_same(module, plain)
    assert torch.equal(torch.rand(3), after)


def test_plain_constructions_of_different_seeds_differ() -> None:
    """Else the test above could not fail."""
    torch.manual_seed(7)
    plain = GPT()
    torch.manual_seed(8)
    assert not torch.equal(deferred(GPT).tokens.weight, plain.tokens.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("build", [GPT, Computed])
def test_the_default_dtype_is_that_of_the_block(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    with tensors_on(CPU, dtype):
        torch.manual_seed(0)
        plain = build()
    with tensors_on(CPU, dtype, deferred=True):
        torch.manual_seed(0)
        module = build()
    assert all(tensor.is_meta for tensor in module.parameters())
    assert_same(filled(module), plain)


def test_a_module_that_is_cast_after_its_values_were_noted_gets_them_cast() -> None:
    torch.manual_seed(0)
    plain = GPT().to(torch.bfloat16)
    torch.manual_seed(0)
    with record():
        module = GPT()
    values = values_of(module)
    assert values is not None
    module.to(torch.bfloat16)
    values.fill(module, CPU)
    assert_same(module, plain)


def test_parameters_stay_the_same_objects_and_train() -> None:
    with record():
        module = GPT()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = list(module.parameters())
    before[0].is_special = True  # type: ignore[attr-defined]
    filled(module)
    assert all(one is two for one, two in zip(before, module.parameters(), strict=True))
    assert before[0].is_special  # type: ignore[attr-defined]
    value = before[0].detach().clone()
    module.head(module.tokens(torch.tensor([1, 2]))).pow(2).sum().backward()
    optimizer.step()
    assert not torch.equal(before[0].detach(), value)


def test_shared_memory_stays_shared() -> None:
    module = deferred(tied_by_data)
    assert module[0].weight is not module[1].weight
    assert module[0].weight.data_ptr() == module[1].weight.data_ptr()


def test_models_made_one_after_the_other_continue_the_same_random_numbers() -> None:
    torch.manual_seed(3)
    plain = [nn.Linear(4, 4), GPT(), nn.Linear(4, 4)]
    after = torch.rand(3)
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        torch.manual_seed(3)
        modules: list[nn.Module] = []
        for build in (lambda: nn.Linear(4, 4), GPT, lambda: nn.Linear(4, 4)):
            with record():
                modules.append(build())
        for index in order:
            filled(modules[index])
        for module, expected in zip(modules, plain, strict=True):
            assert_same(module, expected)
        if order[0] == 0:
            assert torch.equal(torch.rand(3), after)


def test_two_models_of_one_block() -> None:
    torch.manual_seed(3)
    plain = [nn.Linear(4, 4), GPT()]
    after = torch.rand(3)
    torch.manual_seed(3)
    with record():
        modules = [nn.Linear(4, 4), GPT()]
    for module, expected in zip(modules[::-1], plain[::-1], strict=True):
        assert_same(filled(module), expected)
    assert torch.equal(torch.rand(3), after)


def test_draws_between_the_block_and_the_fill_leave_the_values_and_are_left_alone() -> None:
    torch.manual_seed(3)
    plain = GPT()
    torch.manual_seed(3)
    with record():
        module = GPT()
    torch.rand(5)
    state = torch.get_rng_state()
    assert_same(filled(module), plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.initial_seed() == 3


def test_what_is_drawn_after_the_block_is_the_same_in_each_run_and_not_the_models_numbers() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        with record():
            nn.Linear(4, 4)
        drawn.append(torch.rand(4, 4))
    torch.manual_seed(3)
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], torch.rand(4, 4))


class Deep(nn.Module):
    """Initialized by its layers, and again as a whole."""

    def __init__(self, init: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(20))
        self.apply(lambda child: init(child.weight) if isinstance(child, nn.Linear) else None)


@pytest.mark.parametrize(
    ("init", "most"), [(nn.init.xavier_normal_, 1.1), (nn.init.orthogonal_, 3), (nn.init.trunc_normal_, 4.5)]
)
def test_filling_holds_no_more_than_a_few_tensors_at_a_time(init: Callable[..., Any], most: float) -> None:
    torch.manual_seed(0)
    plain = Deep(init)
    torch.manual_seed(0)
    with record():
        module = Deep(init)
    values = values_of(module)
    assert values is not None
    values.fill(module, CPU)
    assert_same(module, plain)
    largest = 64 * 64 * 4
    assert largest <= values.peak_bytes <= most * largest


def test_weights_that_are_used_again_later_are_kept_until_then() -> None:
    def build() -> nn.Module:
        module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        module[2].weight.data.copy_(module[0].weight.data + 1)
        module[1].weight.data.mul_(module[2].weight.data)
        return module

    torch.manual_seed(0)
    plain = build()
    torch.manual_seed(0)
    assert_same(deferred(build), plain)


def test_real_tensors_that_the_module_holds_stay_as_they_are() -> None:
    given = torch.arange(4.0)
    with record():
        module = nn.Linear(4, 4)
        module.bias = nn.Parameter(given)
    filled(module)
    assert module.bias.data_ptr() == given.data_ptr()
    assert torch.equal(module.bias.detach(), torch.arange(4.0))


def test_code_in_the_block_sees_tensors_on_the_device() -> None:
    with record():
        tensor = torch.empty(3)
        assert tensor.device == CPU
        assert not tensor.is_meta
        assert tensor.is_cpu
        assert tensor.to("cpu") is tensor
        assert tensor.cpu() is tensor
    assert tensor.is_meta


def test_a_block_in_a_block_is_one() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    torch.manual_seed(0)
    with record() as outer:
        first = nn.Linear(4, 4)
        with record() as inner:
            module = nn.Sequential(first, nn.Linear(4, 4))
    assert inner is outer
    assert_same(filled(module), plain)


def test_modules_that_nothing_recorded_have_no_deferred_values() -> None:
    assert values_of(nn.Linear(4, 4)) is None
    assert values_of(nn.Linear(4, 4, device="meta")) is None


def test_a_tensor_made_elsewhere_is_named() -> None:
    with record():
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = nn.Parameter(torch.empty(4, 4, device="meta"))
    with pytest.raises(StrategyError, match=r"1\.weight has no values"):
        values_of(module)


def test_a_tensor_of_another_block_can_not_be_computed_with() -> None:
    with record():
        first = nn.Linear(4, 4)
    with record(), pytest.raises(StrategyError, match="one block"):
        copy.deepcopy(first)


@pytest.mark.parametrize("build", [GPT, copies, MODELS["encoder"]])
def test_writes_after_the_block_are_named(build: Callable[[], nn.Module]) -> None:
    with record():
        module = build()
    module.apply(lambda child: nn.init.ones_(child.weight) if isinstance(child, nn.Linear) else None)
    with pytest.raises(StrategyError, match=r"weight was written after its block"):
        values_of(module)


def test_sparse_tensors_are_an_error() -> None:
    with record(), pytest.raises(StrategyError, match="not strided"):
        torch.eye(3).to_sparse()


def test_tensors_in_lists_are_named() -> None:
    with record():
        module = nn.Linear(4, 4)
        module.tables = [torch.ones(3)]
    with pytest.raises(StrategyError, match="tables holds tensors"):
        values_of(module)


class Decided(nn.Module):
    """What it is like depends on random numbers that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.chance = torch.rand(()).item()
        self.values = torch.rand(3).tolist()
        self.second = nn.Linear(4, 4) if torch.rand(()) > 0.5 else nn.Linear(4, 8)
        self.first_row = self.first.weight.detach()[0].numpy().copy().tolist()
        self.large = [row.tolist() for row in self.second.weight.detach().abs().topk(2)[1].unique(dim=0)]
        self.third = nn.Parameter(torch.randn(8))
        self.positive = nn.Parameter(self.third.detach()[self.third > 0])
        self.order = torch.randperm(5).tolist()
        self.choice = torch.multinomial(torch.ones(6), 3).tolist()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.forked = torch.rand(2).tolist()
        self.last = nn.Linear(3, 3)
        self.sum = sum(parameter.sum().item() for parameter in self.parameters())


@pytest.mark.parametrize("seed", range(6))
def test_code_that_decides_by_random_values_decides_the_same(seed: int) -> None:
    torch.manual_seed(seed)
    plain = Decided()
    after = torch.rand(3)
    torch.manual_seed(seed)
    module = deferred(Decided)
    assert_same(module, plain)
    facts = ("chance", "values", "first_row", "large", "order", "choice", "forked", "sum")
    assert {name: getattr(module, name) for name in facts} == {name: getattr(plain, name) for name in facts}
    assert torch.equal(torch.rand(3), after)


def test_draws_into_real_memory_are_in_order_with_those_that_are_put_off() -> None:
    def build(given: torch.Tensor) -> nn.Module:
        given[0].uniform_()
        first = nn.Linear(4, 4)
        given[1].uniform_()
        given[2].uniform_(generator=torch.Generator().manual_seed(1))
        return nn.Sequential(first, nn.Linear(4, 4))

    expected, given = torch.from_numpy(np.zeros((3, 3))), torch.from_numpy(np.zeros((3, 3)))
    torch.manual_seed(0)
    plain = build(expected)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert_same(deferred(lambda: build(given)), plain)
    assert torch.equal(given, expected)
    assert torch.equal(torch.rand(3), after)


def test_a_large_real_tensor_that_changes_after_its_use_is_an_error() -> None:
    given = torch.from_numpy(np.ones(2**20, dtype=np.float32))
    with record():
        module = nn.Linear(1, 1)
        module.bias = nn.Parameter(torch.empty(2**20))
        module.bias.data.copy_(given)
    given.add_(1)
    with pytest.raises(StrategyError, match="was changed after"):
        filled(module)


def test_a_small_real_tensor_counts_as_it_was() -> None:
    given = torch.from_numpy(np.ones(4, dtype=np.float32))
    with record():
        module = nn.Linear(4, 4)
        module.bias.data.copy_(given)
        given.add_(1)
    assert torch.equal(filled(module).bias.detach(), torch.ones(4))


def test_a_tensor_that_came_after_the_values_were_noted_is_named() -> None:
    with record():
        module = nn.Linear(4, 4)
    values = values_of(module)
    assert values is not None
    module.extra = nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(StrategyError, match="extra has no values"):
        values.fill(module, CPU)


def test_an_error_in_the_block_leaves_nothing_behind() -> None:
    known = len(recording_module._recordings)
    with pytest.raises(ZeroDivisionError), record():
        module = nn.Linear(4, 4)
        raise ZeroDivisionError
    assert len(recording_module._recordings) == known
    assert values_of(module) is None
    assert not torch.empty(1).is_meta


def test_many_models_leak_nothing() -> None:
    gc.collect()
    known = len(recording_module._recordings)
    logs = []
    for number in range(20):
        with record() as recording:
            module = GPT()
        logs.append(weakref.ref(recording))
        if number % 2:
            filled(module)
        del module, recording
    gc.collect()
    assert len(recording_module._recordings) == known
    assert not [log for log in logs if log() is not None]
