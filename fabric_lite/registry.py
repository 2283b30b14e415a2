"""What one Fabric has set up: held weakly, checked before anything new is changed, released all or none."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fabric_lite.adopt import extension_of
from fabric_lite.data import release_loader
from fabric_lite.errors import FabricTypeError, FabricValueError
from fabric_lite.extension import ModuleExtension
from fabric_lite.notices import rank_zero_info
from fabric_lite.optim import LossScaler, release_optimizer
from fabric_lite.route import compiled_from, release_module
from fabric_lite.strategies import Strategy

__all__ = ["Registry", "release_from_others"]


class Registry:
    """The modules, optimizers and loaders of one Fabric, which live no longer than the user holds them.

    Args:
        owner: The Fabric, as it stands in the extension of each object.
        strategy: Takes off what it put on a module.
        scaler: Takes its hooks off an optimizer.
    """

    def __init__(self, owner: Any, strategy: Strategy, scaler: LossScaler | None) -> None:
        self._owner = owner
        self._strategy = strategy
        self._scaler = scaler
        self._objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def add(self, target: Any) -> None:
        """Remember what has been set up."""
        self._objects[id(target)] = target

    def has(self, target: Any) -> bool:
        """Whether it is one of them."""
        return self._objects.get(id(target)) is target

    def modules(self) -> list[nn.Module]:
        """The modules among them."""
        return [target for target in self._objects.values() if isinstance(target, nn.Module)]

    def optimizers(self) -> list[Optimizer]:
        """The optimizers among them."""
        return [target for target in self._objects.values() if isinstance(target, Optimizer)]

    def movement(self) -> list[Any]:
        """Counts that change while what was set up is used; from any thread."""
        return [_movement_of(reference()) for reference in self._objects.valuerefs()]

    def check_new(self, targets: Sequence[Any], kind: type) -> None:
        """Raise unless every one of ``targets`` is a ``kind`` that is not set up yet; another Fabric's is released.

        Raises:
            FabricTypeError: One is no ``kind``.
            FabricValueError: One is set up already, or given twice.
        """
        for target in targets:
            if not isinstance(target, kind):
                raise FabricTypeError(
                    f"setup takes a module and its optimizers; this is no {kind.__name__}.",
                    given=f"{type(target).__name__}: {target!r:.80}",
                    fix="fabric.setup(model, optimizer)",
                )
            if _owner_of(target) is self._owner or sum(other is target for other in targets) > 1:
                raise FabricValueError(
                    f"This {type(target).__name__} is set up already, or given twice.",
                    given=type(target).__name__,
                    fix="call setup() once per object; fabric.release(obj) gives the plain object back",
                )
        release_from_others(targets)

    def release(self, targets: Sequence[Any]) -> tuple[Any, ...]:
        """Take off all that was added; return the plain objects.

        Raises:
            FabricValueError: One was not set up by this Fabric, or is given twice; then none is released.
        """
        for target in targets:
            if not self.has(target) or sum(other is target for other in targets) > 1:
                raise FabricValueError(
                    f"This {type(target).__name__} was not set up by this Fabric, or is given twice.",
                    given=f"release({type(target).__name__})",
                    fix="release what setup() returned, once, on the same Fabric",
                )
        return tuple(self._release_one(target) for target in targets)

    def release_all(self) -> None:
        """Release everything that is still there."""
        self.release(tuple(self._objects.values()))

    def _release_one(self, target: Any) -> Any:
        del self._objects[id(target)]
        if isinstance(target, Optimizer):
            release_optimizer(target, self._scaler)
        elif isinstance(target, nn.Module):
            release_module(target)
            self._strategy.unwrap(target)
        else:
            return release_loader(target)
        return target


def release_from_others(targets: Sequence[Any]) -> None:
    """Release those of ``targets`` that some Fabric has set up, with one line each."""
    for target in targets:
        owner = _owner_of(target)
        if owner is not None:
            owner.release(target)
            rank_zero_info(f"a {type(target).__name__} that another Fabric had set up was released first")


def _movement_of(target: Any) -> Any:
    """The forwards of a module through its engine, the batches of a loader; None for others."""
    extension = extension_of(target)
    if isinstance(extension, ModuleExtension):
        return extension.entries
    return getattr(target if extension is None else getattr(extension, "progress", None), "movement", None)


def _owner_of(target: Any) -> Any:
    """The Fabric that set ``target`` up, or the module that ``torch.compile`` made ``target`` from."""
    original = compiled_from(target) if isinstance(target, nn.Module) else None
    return getattr(extension_of(target), "owner", None) or getattr(extension_of(original), "owner", None)
