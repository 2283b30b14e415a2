"""Activation checkpointing: bitwise what the model computes without it, with less kept for backward."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from fabric_lite import FabricTypeError, StrategyError
from fabric_lite.activation_checkpointing import checkpoint_activations, release_activations
from fabric_lite.strategies import FSDPStrategy
from fabric_lite.strategies.blocks import choose_blocks


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(8, 64)
        self.narrow = nn.Linear(64, 8)
        self.dropout = nn.Dropout(0.5)
        self.runs = 0

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.runs += 1
        return x + scale * self.dropout(self.narrow(torch.relu(self.wide(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return x


def made() -> Model:
    torch.manual_seed(0)
    return Model()


def run(model: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """One step: output, gradients, and the bytes that are kept for backward."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    model.zero_grad()
    x = torch.randn(16, 8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(x)
    at_forward = sum(kept.values())
    output.pow(2).sum().backward()
    return output.detach(), [parameter.grad for parameter in model.parameters()], at_forward  # type: ignore[misc]


POLICIES: dict[str, Any] = {
    "a class": Layer,
    "classes": {Layer},
    "a tuple of classes": (Layer, nn.Conv2d),
    "a function": lambda module: isinstance(module, Layer),
    "a policy of torch": ModuleWrapPolicy({Layer}),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_values_are_bitwise_those_without_and_less_is_kept(policy: str) -> None:
    plain, model = made(), made()
    keys = list(model.state_dict())
    assert checkpoint_activations(model, POLICIES[policy]) == ["layers.0", "layers.1", "layers.2"]
    output, gradients, kept = run(plain)
    mine, other_gradients, less = run(model)
    assert torch.equal(mine, output)
    assert all(torch.equal(one, two) for one, two in zip(gradients, other_gradients, strict=True))
    assert less < kept / 3
    assert [layer.runs for layer in model.layers] == [2, 2, 2]
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]


def test_nothing_runs_twice_without_gradients_nor_after_release() -> None:
    model = made()
    checkpoint_activations(model, Layer)
    with torch.no_grad():
        model(torch.ones(2, 8))
    release_activations(model)
    run(model)
    assert [layer.runs for layer in model.layers] == [2, 2, 2]
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_of_nested_matches_the_outer_one_is_taken_and_the_root_only_if_it_matches() -> None:
    assert checkpoint_activations(made(), {Layer, nn.Linear}) == ["first", "layers.0", "layers.1", "layers.2"]
    assert checkpoint_activations(made(), lambda _: True) == [""]
    model = made()
    assert checkpoint_activations(model, Layer) != checkpoint_activations(model, Layer) == []


def test_a_forward_of_the_object_is_the_one_that_runs_and_comes_back() -> None:
    model = made()
    layer: Any = model.layers[1]
    layer.forward = own = lambda x, scale: x * scale
    checkpoint_activations(model, Layer)
    torch.manual_seed(0)
    model.layers[0].dropout.p = model.layers[2].dropout.p = 0.0  # type: ignore[union-attr]
    expected = model.layers[2](model.layers[0](model.first(torch.ones(2, 8)), scale=0.5) * 0.5, scale=0.5)
    assert torch.equal(model(torch.ones(2, 8)), expected)
    release_activations(model)
    assert layer.forward is own
    checkpoint_activations(model, Layer)
    layer.forward = late = lambda x, scale: x  # noqa: ARG005
    release_activations(model)
    assert layer.forward is late


def test_copies_and_pickles_checkpoint_their_own_parameters() -> None:
    model = made()
    checkpoint_activations(model, Layer)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        run(other)
        assert [layer.runs for layer in other.layers] == [2, 2, 2]
        assert all(parameter.grad is not None for parameter in other.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert inspect.signature(model.layers[0].forward) == inspect.signature(made().layers[0].forward)


def test_a_model_compiled_whole_computes_the_same() -> None:
    plain, model = made(), made()
    checkpoint_activations(model, Layer)
    model.compile(backend="aot_eager", fullgraph=True)
    output, gradients, _ = run(plain)
    mine, other_gradients, _ = run(model)
    torch._dynamo.reset()
    assert torch.equal(mine, output)
    assert all(torch.equal(one, two) for one, two in zip(gradients, other_gradients, strict=True))


# Dynamo hides this warning of its own look at a non-leaf input, but not where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_repeated_layers_compile_once() -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model = made()
    checkpoint_activations(model, Layer)
    for layer in model.layers:
        layer.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        model(torch.ones(4, 8)).sum().backward()
    torch._dynamo.reset()
    assert counter.frame_count == 1


def test_a_policy_that_matches_nothing_names_the_classes_of_the_model() -> None:
    with pytest.raises(StrategyError, match=r"\{Conv2d\} matches nothing(.|\n)*Dropout, Layer, Linear, Model"):
        checkpoint_activations(made(), {nn.Conv2d})
    for policy in (3, int, {"Layer"}):
        with pytest.raises(FabricTypeError, match=r"policy must be classes of modules or a function"):
            checkpoint_activations(made(), policy)  # type: ignore[arg-type]


def test_a_policy_without_classes_is_about_no_module_wherever_it_is_given() -> None:
    for none in (set(), ()):
        assert checkpoint_activations(made(), none) == []
        assert choose_blocks(made(), none) == []
        FSDPStrategy(auto_wrap_policy=none, activation_checkpointing_policy=none)


@pytest.mark.parametrize(
    "policy", [Layer, {Layer}, lambda module: isinstance(module, Layer), ModuleWrapPolicy({Layer})]
)
def test_a_policy_chooses_the_same_modules_for_sharding_and_for_checkpointing(policy: Any) -> None:
    model = made()
    blocks = {id(block) for block in choose_blocks(model, policy)}
    names = [name for name, module in model.named_modules() if id(module) in blocks]
    assert names == checkpoint_activations(model, policy) == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize("policy", [int, {int}, "Layer", {"Layer"}, 3])
def test_what_is_no_policy_is_refused_alike_by_every_option(policy: Any) -> None:
    for option in ("auto_wrap_policy", "activation_checkpointing_policy"):
        with pytest.raises(FabricTypeError, match=f"^{option} must be classes of modules or a function"):
            FSDPStrategy(**{option: policy})
    with pytest.raises(FabricTypeError, match=r"^activation_checkpointing_policy must be classes of modules or a func"):
        checkpoint_activations(made(), policy)
