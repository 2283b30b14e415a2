"""Frozen weights of 4 or 8 bits: which layers have them, and that what trains beside them is a plain loop's."""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_lite import Fabric
from fabric_lite.errors import FabricImportError, FabricKeyError, FabricTypeError, FabricValueError
from fabric_lite.plugins import BitsandbytesPrecision
from fabric_lite.testing import RankPool
from tests.models import full

is_installed = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not is_installed, reason="torchao is not installed: pip install -e '.[torchao]'")
MODES = ["nf4", "int8"]


@pytest.mark.skipif(is_installed, reason="torchao is installed")
@pytest.mark.parametrize("name", ["nf4-weights", "int8-weights"])
def test_without_torchao_the_error_names_the_extra(name: str) -> None:
    with pytest.raises(FabricImportError, match=r"fabric-lite\[torchao\]"):
        Fabric(accelerator="cpu", precision=name)


def frozen(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs)).requires_grad_(False)


class Adapted(nn.Module):
    """A layer that is kept, with a small one beside it that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(64, 96), nn.Linear(64, 4, bias=False), nn.Linear(4, 96, bias=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(batch) + self.up(self.down(batch))
        return result


class Net(nn.Module):
    """A frozen layer, one whose bias trains, and one tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(32, 64), nn.Linear(64, 32, bias=False)
        self.adapted, self.back = Adapted(), nn.Linear(96, 64)
        self.head.weight = self.embedding.weight
        self.embedding.requires_grad_(False)
        self.adapted.base.requires_grad_(False)
        self.back.weight.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.embedding(tokens)
        result: torch.Tensor = self.head(hidden + self.back(self.adapted(hidden).relu()))
        return result


def in_few_bits(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ == "LowBitLinear"}


def make() -> Net:
    torch.manual_seed(0)
    return Net()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, backward: Callable[[Any], Any], part: slice) -> None:
    for seed in range(3):
        tokens = torch.randint(0, 32, (8, 5), generator=torch.Generator().manual_seed(seed))[part]
        backward(nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), (7 * tokens.flatten() + 3) % 32))
        optimizer.step()
        optimizer.zero_grad()


def trained(strategy: str, devices: int, mode: str, dtype: torch.dtype, path: Path | None) -> tuple[Any, ...]:
    """All parameters and the two weights; the parameters once more, loaded into another model, if there is a path."""
    fabric = Fabric(
        accelerator="cpu", devices=devices, strategy=strategy, plugins=BitsandbytesPrecision(mode, dtype=dtype)
    )

    def begin() -> tuple[Any, Any]:
        model = make()
        return fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))

    def values(model: Any) -> dict[str, torch.Tensor]:
        return {name: full(parameter) for name, parameter in model.named_parameters()}

    model, optimizer = begin()
    size = 8 // devices
    train(model, optimizer, fabric.backward, slice(fabric.global_rank * size, (fabric.global_rank + 1) * size))
    result = values(model)
    loaded = None
    if path is not None:
        fabric.save(path, {"model": model, "optimizer": optimizer})
        other, its = begin()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        fabric.load(path, {"model": other, "optimizer": its})
        loaded = values(other)
    fabric.release(model)
    weights = [model.adapted.base.weight, model.back.weight]
    fabric.close()
    return result, weights, loaded


def by_hand(weights: list[torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = make().to(dtype)
    model.adapted.base.weight.data, model.back.weight.data = weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, lambda loss: loss.backward(), slice(None))
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_training_beside_them_is_that_beside_a_layer_with_their_values(mode: str, dtype: torch.dtype) -> None:
    result, weights, _ = trained("single_device", 1, mode, dtype, None)
    expected = by_hand(weights, dtype)
    assert sorted(expected) == ["adapted.down.weight", "adapted.up.weight", "back.bias"]
    assert all(torch.equal(result[name], value) for name, value in expected.items())
    original = make()
    # Half of the widest step between two neighbors, of a block's largest value; 127 steps in 8 bits, and bfloat16.
    bound = {"nf4": 0.16, "int8": 0.01}[mode]
    for weight, layer in zip(weights, (original.adapted.base, original.back), strict=True):
        error = (weight.float() - layer.weight).abs().max() / layer.weight.abs().max()
        assert 0 < error < bound


@needs_torchao
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_train_as_one_and_what_they_save_is_loaded(
    mode: str, strategy: str, ranks: RankPool, tmp_path: Path
) -> None:
    ((expected, kept, _),) = ranks.run(trained, "single_device", 1, mode, torch.float32, None, ranks=1)
    for result, weights, loaded in ranks.run(trained, strategy, 2, mode, torch.float32, tmp_path / "saved"):
        assert list(result) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(result[name], value, rtol=0, atol=2e-6)
            assert torch.equal(loaded[name], result[name])
        assert all(torch.equal(mine, its) for mine, its in zip(weights, kept, strict=True))


@needs_torchao
@pytest.mark.parametrize(("name", "bits"), [("nf4-weights", 4.4), ("int8-weights", 8.7)])
def test_frozen_layers_are_changed_at_setup_for_good(name: str, bits: float) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=name)
    model: Any = make()
    model.same = model.adapted.base
    layers, weight = dict(model.named_modules()), model.back.weight
    fabric.setup(model)
    assert dict(model.named_modules()) == layers
    assert in_few_bits(model) == {"adapted.base", "back"}
    assert model.same is model.adapted.base
    assert model.adapted.down.weight.dtype == torch.bfloat16
    assert model.head.weight is model.embedding.weight
    assert weight.nbytes == 0
    stored = [part for key, part in model.adapted.base.named_parameters() if key != "bias"]
    assert 8 * sum(part.nbytes for part in stored) / (64 * 96) < bits
    assert not any(part.requires_grad for part in stored)
    before = model(torch.arange(5))
    fabric.release(model)
    assert torch.equal(model(torch.arange(5)), before)
    fabric.setup(model)
    assert model.back.weight.shape == (64, 96)
    fabric.close()


@needs_torchao
@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 3, 64)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_inputs_of_any_shape_have_the_gradients_of_a_layer(mode: str, shape: tuple[int, ...]) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, plugins=BitsandbytesPrecision(mode, dtype=torch.float32))
    model: Any = nn.Sequential(nn.Linear(64, 8))
    model[0].weight.requires_grad_(False)
    fabric.setup(model)
    plain = nn.Linear(64, 8)
    plain.weight.data, plain.bias.data = model[0].weight, model[0].bias.detach().clone()
    mine, other = (torch.linspace(-1, 1, math.prod(shape)).view(shape).requires_grad_() for _ in range(2))
    model(mine).square().sum().backward()
    plain(other).square().sum().backward()
    torch.testing.assert_close(mine.grad, other.grad)
    torch.testing.assert_close(model[0].bias.grad, plain.bias.grad)
    fabric.close()


@needs_torchao
def test_what_is_ignored_stays() -> None:
    model = make()
    with torch.no_grad():
        before = model.adapted.base.weight.clone()
    fabric = Fabric(
        accelerator="cpu", devices=1, plugins=BitsandbytesPrecision("nf4", torch.float32, ignore_modules={"adapted"})
    )
    fabric.setup(model)
    assert torch.equal(model.adapted.base.weight, before)
    assert type(model.back) is not nn.Linear
    fabric.close()


@needs_torchao
def test_a_layer_is_ignored_by_any_of_its_names_and_wrong_names_are_an_error() -> None:
    model: Any = frozen(64, 64)
    model.back, model.same = nn.Linear(64, 64).requires_grad_(False), model[0]
    fabric = Fabric(accelerator="cpu", devices=1, plugins=BitsandbytesPrecision("nf4", ignore_modules=["same"]))
    fabric.setup(model)
    assert in_few_bits(model) == {"back"}
    with pytest.raises(FabricValueError, match=r"ignore_modules=\['same'\][\s\S]*full names: 0$"):
        fabric.setup(frozen(64, 64))
    fabric.close()
    for wrong in ("back", [nn.Linear]):
        with pytest.raises(FabricTypeError, match="ignore_modules="):
            BitsandbytesPrecision("nf4", ignore_modules=wrong)


class Listed(nn.Module):
    """A layer in two places of one parent, with a parameter, a buffer and a hook of the user's own, and in a list."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(64, 64)
        layer.scale = nn.Parameter(torch.full((1,), 2.0))
        layer.register_buffer("shift", torch.ones(1))
        layer.register_forward_hook(lambda layer, _, output: output * layer.scale + layer.shift)
        layer.weight.requires_grad_(False)
        self.both = nn.Sequential(layer, nn.ReLU(), layer)
        self.listed = [layer]

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.listed[0](self.both(batch))
        return result


@needs_torchao
# Both come from inside torch.compile: of an autograd.Function, and of a layer that is given another's output.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mode", MODES)
def test_all_who_refer_to_a_layer_have_its_few_bits_and_what_hangs_on_it(mode: str, is_compiled: bool) -> None:
    model = Listed()
    plain = copy.deepcopy(model)
    other = nn.Sequential(model.both[0])
    if is_compiled:
        model.both[0].compile(backend="eager")
    fabric = Fabric(accelerator="cpu", devices=1, plugins=BitsandbytesPrecision(mode, dtype=torch.float32))
    fabric.setup(model)
    fabric.setup(other)
    assert in_few_bits(model) == {"both.0"}
    plain.both[0].weight.data = model.both[0].weight
    for batch in (torch.randn(3, 64), torch.randn(64), torch.randn(0, 2, 64)):
        expected = plain(batch)
        expected.sum().backward()
        fabric.backward(model(batch).sum())
        torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-5)
        named = dict(model.named_parameters())
        for name in ("both.0.bias", "both.0.scale"):
            # The hook's factor adds 64 columns up in one order, the bias its rows.
            torch.testing.assert_close(named[name].grad, plain.get_parameter(name).grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other(torch.ones(2, 64)), plain.both[0](torch.ones(2, 64)), rtol=0, atol=1e-5)
    fabric.close()


@needs_torchao
@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_weight_is_as_exact_in_half_precision_as_in_float32(mode: str, source: torch.dtype) -> None:
    torch.manual_seed(0)
    model = frozen(1024, 64).to(source)
    original = model[0].weight.double()
    copies = {dtype: copy.deepcopy(model) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    for dtype, its in copies.items():
        fabric = Fabric(accelerator="cpu", devices=1, plugins=BitsandbytesPrecision(mode, dtype=dtype))
        fabric.setup(its)
        scales = [part for name, part in its.named_parameters() if part.is_floating_point() and "bias" not in name]
        assert {scale.dtype for scale in scales} == {torch.float32}
        assert all(scale.isfinite().all() for scale in scales)
        assert its[0].weight.dtype == (source if dtype == torch.float32 else dtype)
        error = (its[0].weight.double() - original).square().mean().sqrt() / original.square().mean().sqrt()
        # Of a uniform weight: 127 steps of 8 bits, and of two roundings to bfloat16, 2 ** -9 / sqrt(3) each.
        assert error < {"nf4": 0.0920, "int8": 0.0047}[mode]
        fabric.close()


@needs_torchao
@pytest.mark.parametrize(
    ("rows", "columns", "is_taken"), [(17, 31, True), (1, 64, True), (64, 1, False), (0, 64, False)]
)
def test_layers_of_odd_sizes_are_in_8_bits_or_stay(rows: int, columns: int, is_taken: bool) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, plugins=BitsandbytesPrecision("int8", dtype=torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of a layer without elements
        model = nn.Sequential(nn.Linear(columns, rows), nn.Linear(4, 4)).requires_grad_(False)
    fabric.setup(model)
    assert in_few_bits(model) == ({"0", "1"} if is_taken else {"1"})
    batch = torch.randn(2, columns)
    assert torch.equal(model[0](batch), nn.functional.linear(batch, model[0].weight, model[0].bias))
    fabric.close()


@needs_torchao
@pytest.mark.parametrize("strategy", ["single_device", "fsdp"])
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_without_these_bits_is_an_error_also_if_not_strict(
    mode: str, strategy: str, tmp_path: Path
) -> None:
    def of(mode: str) -> Fabric:
        precision = BitsandbytesPrecision(mode, dtype=torch.float32)
        return Fabric(accelerator="cpu", devices=1, strategy=strategy, plugins=precision)

    fabric = of(mode)
    (other,) = {*MODES} - {mode}
    model, plain, others = (nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(3))
    for one in (model, plain, others):
        one[0].requires_grad_(False)
    states = {r"0\.weight\b": copy.deepcopy(plain.state_dict())}
    fabric.setup(model)
    its = of(other)
    states[r"0\.weight_"] = its.setup(others).state_dict()
    weight, trained = model[0].weight, full(model[1].weight).clone()
    for name, state in states.items():
        its.save(tmp_path / "other", {"model": state})
        with pytest.raises(FabricValueError, match=rf"0 has a weight in {mode}, but the file has {name}"):
            fabric.load(tmp_path / "other", {"model": model}, strict=False)
        with pytest.raises(FabricKeyError, match=r"the file lacks 0\.weight_.* and has 0\.weight.* besides"):
            fabric.load(tmp_path / "other", {"model": model})
        assert torch.equal(model[0].weight, weight)
        assert torch.equal(full(model[1].weight), trained)
    if strategy == "single_device":
        for name, state in states.items():
            with pytest.raises(RuntimeError, match=rf"0 has a weight in {mode}, but the checkpoint has {name}"):
                model.load_state_dict(state, strict=False)
        with pytest.raises(RuntimeError, match=rf"the layer has a weight in {mode}, but the checkpoint has weight\."):
            model[0].load_state_dict(plain[0].state_dict(), strict=False)
        model.load_state_dict({"1.bias": torch.ones(64)}, strict=False)  # of the layers that train alone
        # The layer alone, which has no name of its own.
        its.save(tmp_path / "layer", {"layer": plain[0]})
        with pytest.raises(FabricValueError, match=rf"the layer has a weight in {mode}, but the file has weight\."):
            fabric.load(tmp_path / "layer", {"layer": model[0]}, strict=False)
    assert torch.equal(model[0].weight, weight)
    its.close()
    fabric.close()


@needs_torchao
@pytest.mark.parametrize("mode", MODES)
def test_the_bits_of_a_layer_of_another_shape_are_not_loaded(mode: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, plugins=BitsandbytesPrecision(mode, torch.float32))
    wide, tall = (nn.Sequential(nn.Linear(*sizes, bias=False)).requires_grad_(False) for sizes in ((64, 96), (96, 64)))
    states = [fabric.setup(model).state_dict() for model in (wide, tall)]
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight_"):
        tall.load_state_dict(states[0])
    fabric.close()


@needs_torchao
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # inside torch.compile
def test_a_compiled_model_has_the_names_that_it_had_before() -> None:
    precision = BitsandbytesPrecision("nf4", torch.float32, ignore_modules={"0"})
    fabric = Fabric(accelerator="cpu", devices=1, plugins=precision)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).requires_grad_(False)
    model[2] = torch.compile(model[2], backend="eager")
    compiled = fabric.setup(torch.compile(model, backend="eager"))
    assert in_few_bits(model) == {"1", "2._orig_mod"}
    batch = torch.randn(2, 64)
    expected = batch
    for layer in model:
        expected = nn.functional.linear(expected, layer.weight, layer.bias)
    torch.testing.assert_close(compiled(batch), expected, rtol=0, atol=1e-5)
    fabric.close()


@needs_torchao
def test_what_cannot_be_in_few_bits_is_an_error() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="nf4-weights")
    with pytest.raises(FabricValueError, match=r"2 linear layers; 0: not frozen; 1: not[\s\S]*requires_grad_\(False\)"):
        fabric.setup(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    with pytest.raises(FabricValueError, match=r"0: \(31, 17\) is not a multiple of 64 values"):
        fabric.setup(frozen(17, 31))
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, device="meta")).requires_grad_(False)
    with pytest.raises(FabricValueError, match="1 on the meta device"):
        fabric.setup(model, move_to_device=False)
    assert type(model[0]) is nn.Linear  # nothing is changed before all is checked
    model = frozen(64, 64)
    fabric.release(fabric.setup(model))
    with pytest.raises(FabricValueError, match=r"nf4 can't be put into int8[\s\S]*0 in Sequential"):
        Fabric(accelerator="cpu", devices=1, precision="int8-weights").setup(model)
    fabric.setup(nn.Sequential(nn.Conv1d(4, 4, 1)))  # has no linear layers, and stays
    fabric.close()
    for mode, dtype in (("fp4", None), ("nf4", torch.int8)):
        with pytest.raises(FabricValueError, match=r"nf4, nf4-dq, int8[\s\S]*bfloat16"):
            BitsandbytesPrecision(mode, dtype=dtype)


@needs_torchao
@pytest.mark.parametrize("strategy", ["single_device", "fsdp"])
def test_an_optimizer_of_all_parameters_at_once_has_no_part_in_weights_of_few_bits(strategy: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy, precision="nf4-weights")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, foreach=True)
    fabric.setup(model, optimizer)
    before, trained = model[0].weight, full(model[1].weight).clone()
    fabric.backward(model(torch.ones(2, 64)).float().sum())
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(full(model[1].weight), trained)
    fabric.close()
