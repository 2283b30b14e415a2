"""Frozen weights of 4 or 8 bits: which layers have them, and that what trains beside them is a plain loop's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_lite import Fabric
from fabric_lite.errors import FabricImportError, FabricValueError
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
def test_frozen_layers_are_exchanged_at_setup_for_good(name: str, bits: float) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=name)
    model: Any = make()
    model.same = model.adapted.base
    layers, weight = dict(model.named_modules()), model.back.weight
    fabric.setup(model)
    exchanged = {key for key, layer in model.named_modules() if layer is not layers[key]}
    assert exchanged == {"adapted.base", "back"}
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
def test_what_cannot_be_in_few_bits_is_an_error() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="nf4-weights")
    with pytest.raises(FabricValueError, match=r"2 linear layers, 0 frozen[\s\S]*requires_grad_\(False\)"):
        fabric.setup(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    with pytest.raises(FabricValueError, match="0 on the meta device"):
        fabric.setup(model, move_to_device=False)
    fabric.setup(nn.Sequential(nn.Conv1d(4, 4, 1)))  # has no linear layers, and stays
    fabric.close()
    for mode, dtype in (("fp4", None), ("nf4", torch.int8)):
        with pytest.raises(FabricValueError, match=r"nf4, nf4-dq, int8[\s\S]*bfloat16"):
            BitsandbytesPrecision(mode, dtype=dtype)
