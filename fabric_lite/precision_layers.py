"""Changing the linear layers of a model, in place, into others, which packages have that are extras."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from fabric_lite.errors import FabricImportError

__all__ = ["Changed", "change_layers", "check_installed", "check_torchao", "linear_layers", "named_parts"]

# The name of what was compiled, in what torch.compile() returns for it.
_COMPILED = "_orig_mod"


def check_installed(package: str, given: str, fix: str) -> None:
    """Raise FabricImportError unless ``package`` is installed; ``given`` is what asks for it."""
    if importlib.util.find_spec(package) is None:
        raise FabricImportError(
            f"{package}, which has the layers of this precision, is not installed.", given=given, fix=fix
        )


def check_torchao(given: str) -> None:
    """Raise FabricImportError unless torchao is installed; ``given`` is what asks for it."""
    check_installed("torchao", given, "pip install 'fabric-lite[torchao]'")


def named_parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``module.named_modules()`` with all names of each, which are those from before ``torch.compile(module)``."""
    for name, child in module.named_modules(remove_duplicate=False):
        yield ".".join(part for part in name.split(".") if part != _COMPILED), child


def linear_layers(module: nn.Module) -> Iterator[tuple[set[str], nn.Linear]]:
    """Each linear layer below ``module`` that can be changed, with all its full names.

    ``nn.Linear`` itself with a weight of its own and torch's ``forward``: not a subclass, not one whose weight is made
    from others before each forward (``weight_norm``, pruning), and not ``module`` itself.
    """
    names: dict[nn.Module, set[str]] = {}
    for name, child in named_parts(module):
        if name:
            names.setdefault(child, set()).add(name)
    for child, its_names in names.items():
        is_plain = nn.Linear in (type(child), *_sharded_bases(type(child)))
        if is_plain and child._parameters.get("weight") is not None and "forward" not in child.__dict__:
            assert isinstance(child, nn.Linear)
            yield its_names, child


class Changed(NamedTuple):
    """A linear layer that is of another class for now."""

    layer: nn.Module
    kind: type[nn.Module]
    added: frozenset[str]  # its attributes that the class has put there

    def remove(self) -> None:
        """Let the layer be ``nn.Linear`` again."""
        if self.kind in (type(self.layer), *_sharded_bases(type(self.layer))):
            self.layer.__class__ = _rebased(type(self.layer), nn.Linear)
            for key in self.added:
                self.layer.__dict__.pop(key, None)


def change_layers(
    layers: Iterable[nn.Linear], kind: type[nn.Module], arguments: Callable[[nn.Linear], Mapping[str, Any]]
) -> list[Changed]:
    """Make each of ``layers`` a ``kind``, as ``fully_shard`` does: by its class; all of them, or none with an error.

    Whoever refers to a layer has the changed one, in whatever way: another name, a list, another model, FSDP's
    state. Its parameters, hooks and attributes are untouched; ``kind`` must have parameters of the same names.

    Args:
        layers: Changed in place.
        kind: Their class from now on.
        arguments: Those by name of a new ``kind``, for a layer; before them it gets the layer's sizes.
    """
    changed: list[Changed] = []
    try:
        for layer in layers:
            changed.append(_changed(layer, kind, arguments(layer)))  # noqa: PERF401 - those before a failure are undone
    except BaseException:
        for one in changed:
            one.remove()
        raise
    return changed


def _changed(layer: nn.Linear, kind: type[nn.Module], arguments: Mapping[str, Any]) -> Changed:
    before = dict(layer.__dict__)
    former: type[nn.Module] = type(layer)
    layer.__class__ = _rebased(former, kind)  # type: ignore[assignment]
    try:
        kind.__init__(layer, before["in_features"], before["out_features"], **arguments)
    except BaseException:
        layer.__class__ = former  # type: ignore[assignment]
        layer.__dict__.clear()
        layer.__dict__.update(before)
        raise
    added = frozenset(layer.__dict__) - frozenset(before)
    layer.__dict__.update(before)
    return Changed(layer, kind, added)


def _rebased(former: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """``kind``, or for a layer that is sharded by itself the class that ``fully_shard`` would make of ``kind``."""
    if not _sharded_bases(former):
        return kind
    namespace = {key: value for key, value in vars(former).items() if key not in ("__dict__", "__weakref__")}
    namespace["__qualname__"] = kind.__qualname__
    return type(kind.__name__, (former.__bases__[0], kind), namespace)


def _sharded_bases(kind: type) -> tuple[type, ...]:
    """The class that ``fully_shard`` has extended; empty for others. FSDP is not imported for it."""
    is_sharded = kind.__bases__[0].__name__ == "FSDPModule" and kind.__bases__[0].__module__.startswith("torch.")
    return kind.__bases__[1:] if is_sharded else ()
