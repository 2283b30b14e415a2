"""``fp8-mixed``: which layers multiply in float8, and that training with them is torchao's own."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from fabric_lite import Fabric
from fabric_lite.errors import FabricImportError, FabricValueError
from fabric_lite.strategies import FSDPStrategy
from fabric_lite.testing import RankPool
from tests.distributed.layouts import GPT, loss_of, make_gpt, token_batches
from tests.models import full

is_installed = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not is_installed, reason="torchao is not installed: pip install -e '.[torchao]'")


@pytest.mark.skipif(is_installed, reason="torchao is installed")
def test_without_torchao_the_error_names_the_extra() -> None:
    with pytest.raises(FabricImportError, match=r"fabric-lite\[torchao\]"):
        Fabric(accelerator="cpu", precision="fp8-mixed")


def in_float8(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}


@needs_torchao
def test_layers_are_exchanged_at_setup_and_put_back_at_release() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="fp8-mixed")
    model: Any = make_gpt()
    model.odd, model.frozen, model.twice = nn.Linear(16, 3), nn.Linear(16, 16), model.layers[0].up
    model.frozen.requires_grad_(False)
    layers, parameters, keys = dict(model.named_modules()), list(model.parameters()), list(model.state_dict())
    fabric.setup(model)
    expected = {name for name, layer in layers.items() if isinstance(layer, nn.Linear)} - {"odd", "frozen"}
    assert in_float8(model) == expected
    assert model.twice is model.layers[0].up
    assert all(mine is its for mine, its in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    fabric.release(model)
    assert dict(model.named_modules()) == layers
    with pytest.raises(FabricValueError, match="multiple of 16"):
        fabric.setup(nn.Sequential(nn.Linear(4, 4)))
    for model in (
        nn.Sequential(nn.Linear(4, 4)).requires_grad_(False),
        nn.Conv1d(4, 4, 1),
    ):  # nothing to exchange
        assert fabric.setup(model) is model
    fabric.close()


@needs_torchao
def test_what_hangs_on_a_layer_hangs_on_the_one_in_its_place() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="fp8-mixed")
    model: Any = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    seen: list[Any] = []
    handle = model[0].register_forward_hook(lambda layer, *_: seen.append(layer))
    model[0].note = "mine"
    fabric.setup(model)
    model(torch.ones(2, 16))
    assert seen == [model[0]]
    assert (type(model[0]).__name__, model[0].note) == ("Float8Linear", "mine")
    handle.remove()
    model(torch.ones(2, 16))
    assert len(seen) == 1
    fabric.close()


def train(strategy: Any, devices: int) -> tuple[set[str], list[torch.Tensor]]:
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy, precision="fp8-mixed")
    model = make_gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    for tokens, targets in token_batches(3):
        tokens, targets = (part.chunk(devices)[fabric.global_rank] for part in (tokens, targets))
        fabric.backward(loss_of(model(tokens), targets))
        optimizer.step()
        optimizer.zero_grad()
    result = [full(parameter) for parameter in model.parameters()]
    found = in_float8(model)
    fabric.close()
    return found, result


def train_by_hand() -> list[torch.Tensor]:
    from torchao.float8 import convert_to_float8_training

    model: GPT = copy.deepcopy(make_gpt())
    convert_to_float8_training(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for tokens, targets in token_batches(3):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens)
        loss_of(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


@needs_torchao
def test_training_on_one_device_is_torchaos_own(ranks: RankPool) -> None:
    (expected,) = ranks.run(train_by_hand, ranks=1)
    ((found, values),) = ranks.run(train, "single_device", 1, ranks=1)
    assert len(found) == 13  # six in each layer, and the head
    assert all(torch.equal(mine, its) for mine, its in zip(values, expected, strict=True))


@needs_torchao
@pytest.mark.parametrize("strategy", ["ddp", FSDPStrategy()], ids=["ddp", "fsdp"])
def test_training_on_two_ranks_stays_near_one(ranks: RankPool, strategy: Any) -> None:
    ((_, expected),) = ranks.run(train, "single_device", 1, ranks=1)
    for found, values in ranks.run(train, strategy, 2):
        assert len(found) == 13
        for mine, its in zip(values, expected, strict=True):
            # A tensor of half a batch is scaled by another largest value, and float8 has 4 bits.
            torch.testing.assert_close(mine, its, rtol=0, atol=2e-2)
            assert not torch.equal(mine, its) or mine.numel() < 64
