"""``transformer-engine`` without its GPUs: layers changed into a stand-in's, and what forward runs in."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_lite import Fabric, Precision
from fabric_lite.errors import FabricImportError, FabricTypeError, FabricValueError
from fabric_lite.precision_transformer_engine import in_transformer_engine, to_transformer_engine

# What is used of the package, with its arguments; the real one begins with loading CUDA's libraries.
STAND_IN = """
import contextlib, torch
entered = []

class Linear(torch.nn.Linear):
    def __init__(self, in_features, out_features, bias=True, params_dtype=None, device="cuda"):
        super().__init__(in_features, out_features, bias, device, params_dtype)

@contextlib.contextmanager
def autocast(enabled=True, recipe=None):
    entered.append(enabled)
    yield
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "pytorch.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    import transformer_engine.pytorch

    yield transformer_engine.pytorch
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        del sys.modules[name]


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="it is installed")
def test_without_the_package_the_error_names_it() -> None:
    with pytest.raises(FabricImportError, match=r"transformer-engine\[pytorch\]"):
        Fabric(accelerator="cpu", precision="transformer-engine")


def test_it_is_refused_where_there_is_no_cuda(stand_in: Any) -> None:
    with pytest.raises(FabricValueError, match="cpu has no transformer-engine"):
        Fabric(accelerator="cpu", devices=1, precision="transformer-engine")
    assert stand_in.entered == []


def test_layers_are_changed_with_their_parameters_and_back(stand_in: Any) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 3), nn.Linear(32, 16, bias=False, dtype=torch.bfloat16))
    layers, parameters = list(model), dict(model.named_parameters())
    handles = to_transformer_engine(model)
    assert [type(layer) is stand_in.Linear for layer in model] == [True, False, True]
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(parameters)
    for handle in handles:
        handle.remove()
    assert list(model) == layers
    assert {type(layer) for layer in model} == {nn.Linear}
    with pytest.raises(FabricValueError, match="1 linear layers"):
        to_transformer_engine(nn.Sequential(nn.Linear(3, 3)))
    with in_transformer_engine():
        assert stand_in.entered == [True]


def test_where_one_layer_fails_none_is_changed(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: nn.Linear, in_features: int, *_: Any, **__: Any) -> None:
        nn.Module.__init__(self)
        if in_features == 32:
            raise MemoryError

    monkeypatch.setattr(stand_in.Linear, "__init__", init)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    with pytest.raises(MemoryError):
        to_transformer_engine(model)
    assert [type(layer) for layer in model] == [nn.Linear] * 2
    assert model(torch.ones(1, 16)).shape == (1, 16)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_forward_runs_in_the_context_of_its_precision(compute_dtype: torch.dtype | None) -> None:
    inside: list[str] = []

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        inside.append("in")
        yield
        inside.append("out")

    class Model(nn.Linear):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            inside.append(f"autocast {torch.is_autocast_enabled('cpu')}")
            return super().forward(batch)

    fabric = Fabric(
        accelerator="cpu", devices=1, precision=Precision("own", compute_dtype=compute_dtype, context=context)
    )
    model = fabric.setup(Model(2, 2))
    model(torch.ones(1, 2))
    in_forward = ["in", f"autocast {compute_dtype is not None}", "out"]
    assert inside == in_forward
    with fabric.autocast():
        inside.append(f"autocast {torch.is_autocast_enabled('cpu')}")
    assert inside == in_forward * 2
    fabric.close()


def test_what_changes_layers_or_makes_a_context_is_a_function_and_may_return_nothing_to_undo() -> None:
    for given in ({"convert": 3}, {"context": contextlib.nullcontext()}):
        with pytest.raises(FabricTypeError, match=f"{next(iter(given))} of a Precision is a function"):
            Precision("own", **given)  # type: ignore[arg-type]

    def halve(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_parameter("weight").mul_(0.5)

    fabric = Fabric(accelerator="cpu", devices=1, precision=Precision("own", convert=halve))
    model = nn.Linear(1, 1, bias=False)
    weight = model.weight.item()
    fabric.release(fabric.setup(model))
    assert model.weight.item() == weight / 2
    fabric.close()


def test_layers_are_changed_back_where_the_model_does_not_fit_on_the_device() -> None:
    class TooLarge(nn.Linear):
        def _apply(self, *args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError

    class Changed:
        def remove(self) -> None:
            removed.append(self)

    removed: list[Changed] = []
    changed = Changed()
    precision = Precision("own", param_dtype=torch.bfloat16, convert=lambda _: [changed])
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    with pytest.raises(torch.OutOfMemoryError):
        fabric.setup(TooLarge(1, 1))
    assert removed == [changed]
    fabric.close()
