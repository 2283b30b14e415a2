"""Exchanging the linear layers of a model for others, which packages have that are extras."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from fabric_lite.errors import FabricImportError

__all__ = ["Exchanged", "check_installed", "check_torchao", "exchange_linear_layers"]


def check_installed(package: str, given: str, fix: str) -> None:
    """Raise FabricImportError unless ``package`` is installed; ``given`` is what asks for it."""
    if importlib.util.find_spec(package) is None:
        raise FabricImportError(
            f"{package}, which has the layers of this precision, is not installed.", given=given, fix=fix
        )


def check_torchao(given: str) -> None:
    """Raise FabricImportError unless torchao is installed; ``given`` is what asks for it."""
    check_installed("torchao", given, "pip install 'fabric-lite[torchao]'")


class Exchanged(NamedTuple):
    """A layer that another stands for, at one of its places."""

    parent: nn.Module
    name: str
    layer: nn.Linear

    def remove(self) -> None:
        """Let the layer take its place again, with the parameters that the other one has then."""
        current = self.parent._modules[self.name]
        assert current is not None
        self.layer._parameters.update(current._parameters)  # sharding makes new ones
        self.layer.train(current.training)
        setattr(self.parent, self.name, self.layer)


def exchange_linear_layers(
    module: nn.Module, is_taken: Callable[[str, nn.Linear], bool], make: Callable[[nn.Linear], nn.Module]
) -> list[Exchanged]:
    """Put another layer in the place of linear layers below ``module``, which is changed in place.

    Args:
        module: The model; a model that is a linear layer itself is not exchanged.
        is_taken: Whether a layer, ``nn.Linear`` itself, is exchanged; given its full name and the layer.
        make: Makes the new layer.

    Returns:
        The layers that were there; ``remove()`` undoes it, where the new layer has parameters of the same names.
    """
    exchanged: list[Exchanged] = []
    new: dict[nn.Module, nn.Module] = {}  # a layer may have two names
    for prefix, parent in list(module.named_modules()):
        for name, child in list(parent.named_children()):
            full_name = f"{prefix}.{name}" if prefix else name
            if child not in new and type(child) is nn.Linear and is_taken(full_name, child):
                new[child] = _carried_over(child, make(child))
            if type(child) is nn.Linear and child in new:
                setattr(parent, name, new[child])
                exchanged.append(Exchanged(parent, name, child))
    return exchanged


def _carried_over(layer: nn.Linear, new: nn.Module) -> nn.Module:
    """``new`` with the hooks of ``layer``, in the same dictionaries, and with what the user has put onto it."""
    for key, value in layer.__dict__.items():
        if "hook" in key or key not in new.__dict__:
            new.__dict__[key] = value
    return new.train(layer.training)
