"""Linear layers that multiply in float8, by torchao, which is an extra."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

from torch import nn

from fabric_lite.errors import FabricImportError, FabricValueError

__all__ = ["check_float8", "to_float8"]

# The kernels take matrices of which both sides are a multiple of it.
_SIDE = 16


def check_float8() -> None:
    """Raise FabricImportError unless torchao is installed."""
    if importlib.util.find_spec("torchao") is None:
        raise FabricImportError(
            "torchao, which multiplies in float8, is not installed.",
            given="precision='fp8-mixed'",
            fix="pip install 'fabric-lite[fp8]'",
        )


def to_float8(module: nn.Module) -> list[Any]:
    """Let the linear layers of ``module`` multiply in float8, scaled by each tensor's largest value; changed in place.

    Layers are exchanged and their parameters stay the same objects, in their own dtype, under the same names. Taken are
    ``nn.Linear`` itself, trainable, with both sides a multiple of 16; a model that is such a layer itself is not.

    Returns:
        Handles whose ``remove()`` puts the layers back, with the parameters that are there then.

    Raises:
        FabricImportError: torchao is not installed.
        FabricValueError: There is no such layer.
    """
    check_float8()
    from torchao.float8.float8_linear import Float8Linear

    handles: list[Any] = []
    new: dict[nn.Module, nn.Module] = {}  # a layer may have two names
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if child not in new and _is_taken(child):
                new[child] = Float8Linear.from_float(child).train(child.training)
            if child in new:
                setattr(parent, name, new[child])
                handles.append(_Exchanged(parent, name, child))
    if not handles:
        raise FabricValueError(
            f"No layer of {type(module).__name__} can multiply in float8.",
            given=f"{sum(isinstance(child, nn.Linear) for child in module.modules())} linear layers",
            fix="trainable nn.Linear below the model, both sides a multiple of 16; or precision='bf16-mixed'",
        )
    return handles


def _is_taken(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Linear
        and layer.in_features % _SIDE == 0
        and layer.out_features % _SIDE == 0
        and layer.weight.requires_grad
    )


@dataclasses.dataclass(frozen=True)
class _Exchanged:
    """A layer that another stands for, at one of its places."""

    parent: nn.Module
    name: str
    layer: nn.Module

    def remove(self) -> None:
        """Put it back."""
        current = self.parent._modules[self.name]
        assert current is not None
        self.layer._parameters.update(current._parameters)  # sharding makes new ones
        self.layer.train(current.training)
        setattr(self.parent, self.name, self.layer)
