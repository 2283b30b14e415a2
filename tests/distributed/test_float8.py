"""``fp8-mixed``: which layers multiply in float8, and that training with them is torchao's own."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fabric_lite import Fabric
from fabric_lite.errors import FabricImportError, FabricValueError, StrategyError
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
def test_layers_are_changed_at_setup_and_back_at_release() -> None:
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
def test_what_hangs_on_a_layer_hangs_on_the_changed_one() -> None:
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


@needs_torchao
def test_a_failed_setup_leaves_the_layers_as_they_were() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, strategy="fsdp", precision="fp8-mixed")
    model = nn.Sequential(nn.Linear(16, 16))
    model[0].weight.grad = torch.ones(16, 16)
    with pytest.raises(StrategyError, match="Gradients from before setup"):
        fabric.setup(model)
    assert type(model[0]) is nn.Linear
    assert "config" not in model[0].__dict__
    fabric.close()


@needs_torchao
def test_what_the_user_has_put_in_the_place_of_a_layer_stays_at_release() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="fp8-mixed")
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    fabric.setup(model)
    mine, last = nn.Identity(), model[3]
    model[1] = mine
    del model[2]
    fabric.release(model)
    assert (len(model), model[1], model[2]) == (3, mine, last)
    assert in_float8(model) == set()
    fabric.close()


@needs_torchao
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_layers_whose_weight_is_made_from_others_stay() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="fp8-mixed")
    own: Any = nn.Linear(16, 16)
    own.forward = lambda batch: batch
    normed, pruned = nn.utils.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 16)
    prune.l1_unstructured(pruned, "weight", 0.5)
    parametrized = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
    model = nn.Sequential(normed, pruned, parametrized, own, nn.Linear(16, 16))
    fabric.setup(model)
    assert in_float8(model) == {"4"}
    fabric.backward(model(torch.randn(16, 16)).sum())
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name[0] != "3")
    fabric.close()


@needs_torchao
def test_copies_and_parts_that_multiply_in_float8_already_are_set_up() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="fp8-mixed")
    part = nn.Sequential(nn.Linear(16, 16))
    fabric.setup(part)
    batch = torch.randn(16, 16)
    for other in (copy.deepcopy(part), pickle.loads(pickle.dumps(part)), nn.Sequential(part)):
        fabric.setup(other)
        assert torch.equal(other(batch), part(batch))
    fabric.close()


@needs_torchao
@pytest.mark.parametrize("rows", [(3,), (), (0,), (2, 5), (16,)], ids=str)
def test_any_number_of_rows_multiplies_in_float8_and_in_inference_mode(rows: tuple[int, ...]) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="fp8-mixed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32))
    plain = copy.deepcopy(model)
    fabric.setup(model)
    batch = torch.randn(*rows, 16)
    output = model(batch)
    fabric.backward(output.sum())
    plain(batch).sum().backward()
    assert output.shape == (*rows, 32)
    pairs = [
        (output, plain(batch)),
        *((model[0].get_parameter(name).grad, its.grad) for name, its in plain[0].named_parameters()),
    ]
    # A number of float8 has 4 bits.
    assert all((mine - its).norm() <= 0.06 * its.norm() for mine, its in pairs)
    with torch.inference_mode():
        assert torch.equal(model(batch), output)
    assert torch.equal(model(batch), output)
    fabric.close()


@needs_torchao
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # inside torch.compile
def test_a_compiled_model_multiplies_as_it_does_otherwise() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="fp8-mixed")
    model = fabric.setup(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)))
    batch = torch.randn(16, 16)
    expected = model(batch)
    model.compile(backend="aot_eager", fullgraph=True)
    assert torch.equal(model(batch), expected)
    fabric.close()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = batch + self.two(self.one(batch).relu())
        return result


def set_up_again(policy: Any, is_released: bool) -> tuple[set[str], list[float]]:
    """The layers in float8, and losses of two steps and, with a release and a setup between, of two more."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=FSDPStrategy(auto_wrap_policy=policy), precision="fp8-mixed")
    fabric.setup(model, optimizer)
    losses = []
    for step in range(4):
        if step == 2 and is_released:
            fabric.release(model, optimizer)
            assert in_float8(model) == set()
            model(torch.ones(16, 16))
            fabric.setup(model, optimizer)
        loss = model(torch.full((16, 16), 1.0 + step)).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    found = in_float8(model)
    fabric.close()
    return found, losses


@needs_torchao
@pytest.mark.parametrize("policy", [{Block}, {nn.Linear}], ids=["blocks", "layers"])
def test_a_sharded_model_that_was_released_and_set_up_again_goes_on(ranks: RankPool, policy: Any) -> None:
    expected = ranks.run(set_up_again, policy, False)
    assert ranks.run(set_up_again, policy, True) == expected
    assert expected[0][0] == {"0.one", "0.two", "1.one", "1.two"}


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
