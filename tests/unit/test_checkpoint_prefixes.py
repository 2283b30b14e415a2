"""States whose keys carry what wrapped the model load: DDP, torch.compile, FSDP, Lightning Fabric, and any nesting."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from fabric_lite.checkpoint import load, load_raw, save
from fabric_lite.checkpoint.keys import matching
from fabric_lite.errors import FabricKeyError


class Net(nn.Module):
    """A module, a list of modules, a buffer and a parameter of its own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.ModuleList([nn.Linear(3, 3), nn.BatchNorm1d(3)])
        self.head = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.randn(2))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        for part in self.body:
            batch = part(batch)
        return self.head(batch) * self.scale


def trained(seed: int) -> tuple[Net, torch.optim.Optimizer]:
    net = Net(seed)
    optimizer = torch.optim.AdamW(
        [{"params": [net.scale], "lr": 0.5}, {"params": [*net.body.parameters(), *net.head.parameters()]}]
    )
    net(torch.arange(6.0).reshape(2, 3)).square().sum().backward()
    optimizer.step()
    return net, optimizer


def tensors(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[float]]:
    moments = [optimizer.state[one][name] for one in net.parameters() for name in ("exp_avg", "exp_avg_sq", "step")]
    return [tensor.flatten().tolist() for tensor in [*net.state_dict().values(), *moments]]


def outside(prefix: str) -> Any:
    return lambda key: prefix + key


def inside(key: str) -> str:
    """As FSDP's first version, checkpointed activations and compiled parts put marks into the middle."""
    return key.replace("body.0.", "body._orig_mod.0._fsdp_wrapped_module._checkpoint_wrapped_module.").replace(
        "head.", "head.module._orig_mod."
    )


WRAPPINGS = {
    "ddp": outside("module."),
    "compile": outside("_orig_mod."),
    "compiled ddp": outside("_orig_mod.module."),
    "ddp of compiled": outside("module._orig_mod."),
    "lightning": outside("_forward_module.module."),
    "all of them": outside("_forward_module._orig_mod.module."),
    "only parts": inside,
    "all and parts": lambda key: "module._orig_mod." + inside(key),
}


def renamed(state: dict[str, Any], wrap: Any) -> Any:
    new = collections.OrderedDict((wrap(key), value) for key, value in state.items())
    if hasattr(state, "_metadata"):
        new._metadata = state._metadata  # type: ignore[attr-defined]
    return new


def by_name(net: nn.Module, optimizer: torch.optim.Optimizer, wrap: Any) -> dict[str, Any]:
    """The form of ``get_optimizer_state_dict``, its groups and names in another order than the optimizer's."""
    names = {id(parameter): wrap(name) for name, parameter in net.named_parameters()}
    state = {names[id(parameter)]: optimizer.state[parameter] for parameter in net.parameters()}
    groups = [
        {**group, "params": [names[id(one)] for one in group["params"]][::-1]} for group in optimizer.param_groups
    ]
    return {"state": state, "param_groups": groups[::-1]}


@pytest.mark.parametrize("form", ["torch.save", "save", "folder", "dcp"])
@pytest.mark.parametrize("wrapping", list(WRAPPINGS))
@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed", "ignore::FutureWarning")
def test_keys_with_what_wrapped_the_model_load(tmp_path: Path, wrapping: str, form: str) -> None:
    net, optimizer = trained(0)
    wrap = WRAPPINGS[wrapping]
    content = {"model": renamed(net.state_dict(), wrap), "optimizer": by_name(net, optimizer, wrap)}
    if form == "dcp":
        dcp.save(content, checkpoint_id=tmp_path / "a", no_dist=True)
    elif form == "torch.save":
        torch.save(content, tmp_path / "a")
    else:
        save(tmp_path / "a", content, state_dict_type="sharded" if form == "folder" else "full")
    other, fresh = trained(1)
    load(tmp_path / "a", {"model": other, "optimizer": fresh})
    assert tensors(other, fresh) == tensors(net, optimizer)
    assert [group["lr"] for group in fresh.param_groups] == [0.5, 0.001]


@pytest.mark.parametrize("wrapping", list(WRAPPINGS))
def test_a_bare_state_dict_with_wrapped_keys_loads(tmp_path: Path, wrapping: str) -> None:
    net = Net(0)
    torch.save(renamed(net.state_dict(), WRAPPINGS[wrapping]), tmp_path / "a")
    other = Net(1)
    load_raw(tmp_path / "a", other)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("target", ["compiled", "a compiled part"])
def test_a_compiled_model_takes_keys_of_any_wrapping(tmp_path: Path, target: str) -> None:
    net = Net(0)
    torch.save({"model": renamed(net.state_dict(), WRAPPINGS["all and parts"])}, tmp_path / "a")
    other = Net(1)
    if target == "a compiled part":
        other.head = torch.compile(other.head, backend="eager")  # type: ignore[assignment]
    load(tmp_path / "a", {"model": torch.compile(other, backend="eager") if target == "compiled" else other})
    assert torch.equal(other.scale, net.scale)
    assert torch.equal(other.head.weight, net.head.weight)


class Twins(nn.Module):
    """Its own names differ only by what a wrapper would be called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.module = nn.ModuleDict({"inner": nn.Linear(2, 2)})


def test_a_models_own_names_are_never_taken_for_wrappers(tmp_path: Path) -> None:
    saved, other, third = Twins(), Twins(), Twins()
    for path, content in {"own": saved.state_dict(), "ddp": renamed(saved.state_dict(), outside("module."))}.items():
        torch.save({"model": content}, tmp_path / path)
    for path, model in (("own", other), ("ddp", third)):
        load(tmp_path / path, {"model": model})
        assert torch.equal(model.inner.weight, saved.inner.weight)
        assert torch.equal(model.module["inner"].weight, saved.module["inner"].weight)
    # With something missing it can't be told which is which: said, not guessed.
    part = {key: value for key, value in saved.state_dict().items() if key != "inner.bias"}
    torch.save({"model": renamed(part, outside("module."))}, tmp_path / "part")
    with pytest.raises(FabricKeyError, match=r"lacks inner\.weight"):
        load(tmp_path / "part", {"model": Twins()})


def test_names_are_matched_exactly_first_and_never_twice() -> None:
    assert matching(["a", "module.a"], ["a", "module.a"]) == {"a": "a", "module.a": "module.a"}
    assert matching(["a.b", "d"], ["module.a._orig_mod.b", "c"]) == {"module.a._orig_mod.b": "a.b", "c": "c"}
    assert matching(["a"], ["module.a", "_forward_module.a"]) == {
        "module.a": "module.a",
        "_forward_module.a": "_forward_module.a",
    }
    assert matching(["a"], ["a", "module.a"]) == {"a": "a", "module.a": "module.a"}
    assert matching(["a", "b"], ["module.c", "module.a"]) == {"module.c": "c", "module.a": "a"}
    assert matching(["x.module.a"], ["x.a"]) == {"x.a": "x.a"}
    assert matching(["a"], []) == {}
