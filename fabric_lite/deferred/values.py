"""The values that a module's tensors have after a plain construction, and giving them to it."""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fabric_lite.deferred.log import Piece
from fabric_lite.deferred.recording import Recording, recording_of
from fabric_lite.deferred.replay import Replay
from fabric_lite.errors import StrategyError

__all__ = ["DeferredValues", "values_of"]

_MODULE_TABLES = ("_parameters", "_buffers", "_modules")
_FIX = "make the whole model in one block of fabric.init_module(), or leave out empty_init"
_FIX_WRITTEN = (
    "weights from a file by fabric.load_raw(path, model) or fabric.load() after setup, or by "
    "model.load_state_dict(..., assign=True) before it; other values inside the block of fabric.init_module()"
)


def values_of(module: nn.Module) -> DeferredValues | None:
    """Note which values the tensors of ``module`` have to get; None if no tensor of it was made by :func:`record`.

    Called before the module's tensors are exchanged, sharded or cast. Communicates nothing.

    Raises:
        StrategyError: A tensor has no values and was made elsewhere, was written after the block, or is kept where
            it can't be exchanged.
    """
    on_meta = {name: tensor for name, tensor in _named_tensors(module) if tensor.is_meta}
    found = {name: recording_of(tensor) for name, tensor in on_meta.items()}
    if not any(found.values()):
        return None
    _raise_for(
        [name for name, recording in found.items() if recording is None],
        "has no values, and was not made in a block of fabric.init_module(empty_init=True), or was cast or copied "
        "after it",
    )
    recordings = {name: recording for name, recording in found.items() if recording is not None}
    _raise_for(
        [name for name, recording in recordings.items() if recording.was_written_since(on_meta[name])],
        "was written after its block of fabric.init_module(empty_init=True), when it had no values",
        _FIX_WRITTEN,
    )
    _check_containers(module, on_meta)
    return DeferredValues({name: (recordings[name], Piece.of(tensor)) for name, tensor in on_meta.items()})


class DeferredValues:
    """What the tensors of a module are to hold.

    Args:
        places: By name, the recording that makes the value, and where it is found there.
    """

    def __init__(self, places: dict[str, tuple[Recording, Piece]]) -> None:
        self.peak_bytes = 0  # the most memory that `fill` held at a time, the module's own tensors not counted
        self._places = places

    def fill(self, module: nn.Module, device: torch.device) -> None:
        """Give every tensor of ``module`` memory on ``device``, and those without values theirs.

        Parameters stay the same objects, and what is tied stays tied. Of a DTensor each rank keeps its shard; nothing
        is communicated, so the ranks must have had the same random state when the module was made. Every rank that
        holds a part of the module calls it.

        Raises:
            StrategyError: The module has a tensor without values that was not there at :func:`values_of`.
        """
        pieces = {name: piece for name, (_, piece) in self._places.items()}
        on_meta = [(name, tensor) for name, tensor in _named_tensors(module) if tensor.is_meta]
        _raise_for([name for name, _ in on_meta if name not in pieces], "has no values, and came after setup began")
        for recording in self._recordings():
            for _, tensor in on_meta:
                recording.forget(tensor)
        names = [name for name, _ in on_meta]
        _Memory(device, pieces).give(module)
        targets = {name: tensor for name, tensor in _named_tensors(module) if name in set(names)}
        for recording in self._recordings():
            self._fill_from(recording, targets)

    def _recordings(self) -> list[Recording]:
        return list({id(recording): recording for recording, _ in self._places.values()}.values())

    def _fill_from(self, recording: Recording, targets: dict[str, torch.Tensor]) -> None:
        by_storage: dict[int, dict[tuple[int, Piece], torch.Tensor]] = {}
        for name, target in targets.items():
            source, piece = self._places[name]
            if source is recording:
                # Tied tensors are written once.
                by_storage.setdefault(piece.storage, {})[id(target), piece] = target

        def receive(storage: int, replay: Replay) -> None:
            for (_, piece), target in by_storage[storage].items():
                _write(target, replay.tensor(piece))

        self.peak_bytes = max(self.peak_bytes, recording.replay(by_storage, receive))


class _Memory:
    """Exchanges tensors without values for real ones, whose values are not set yet.

    What shared memory shares it again, as long as nobody cast or sharded it.
    """

    def __init__(self, device: torch.device, pieces: dict[str, Piece]) -> None:
        self._device = device
        self._pieces = pieces
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._exchanged: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by identity: the old one, the new one

    def give(self, module: nn.Module) -> None:
        """Exchange all tensors of ``module``, and move those that have values."""
        for prefix, child in module.named_modules(remove_duplicate=False):
            start = f"{prefix}." if prefix else ""
            for table in (vars(child), child._buffers):
                for key, tensor in list(table.items()):
                    if isinstance(tensor, torch.Tensor) and not isinstance(tensor, nn.Parameter):
                        table[key] = self._other(start + key, tensor)
            for key in child._parameters:
                self._exchange(start + key, child)

    def _other(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor if name not in self._pieces and _is_sharded(tensor) else tensor.to(self._device)
        if id(tensor) not in self._exchanged:
            # The old one is held: its identity must not be given to another.
            self._exchanged[id(tensor)] = tensor, self._real(name, tensor)
        return self._exchanged[id(tensor)][1]

    def _exchange(self, name: str, module: nn.Module) -> None:
        key = name.rpartition(".")[2]
        parameter = module._parameters[key]
        if parameter is None:
            return
        if not parameter.is_meta:
            if parameter.device != self._device and not _is_sharded(parameter):
                parameter.data = parameter.data.to(self._device)
            return
        new = nn.Parameter(self._real(name, parameter), parameter.requires_grad)
        # Identity stays: optimizers and the engine hold this object. As torch.utils.swap_tensors does it, which refuses
        # what has weak references; nn.LSTM keeps such.
        for slot in copyreg._slotnames(type(parameter)):  # type: ignore[attr-defined]
            if hasattr(new, slot):
                setattr(parameter, slot, getattr(new, slot))
        torch._C._swap_tensor_impl(parameter, new)

    def _real(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        piece = self._pieces[name]
        as_noted = (tensor.dtype, tuple(tensor.shape)) == (piece.dtype, piece.size) and not _is_sharded(tensor)
        if not as_noted:
            return torch.empty_like(tensor.detach(), device=self._device)
        if piece.storage not in self._storages:
            size = tensor.untyped_storage().nbytes()
            self._storages[piece.storage] = torch.UntypedStorage(size, device=self._device)
        return piece.within(self._storages[piece.storage])


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers and plain attributes that are tensors, under each of their names."""
    for prefix, child in module.named_modules(remove_duplicate=False):
        for table in (child._parameters, child._buffers, vars(child)):
            for key, value in table.items():
                if isinstance(value, torch.Tensor):
                    yield (f"{prefix}.{key}" if prefix else key), value


def _check_containers(module: nn.Module, on_meta: dict[str, torch.Tensor]) -> None:
    # Parameters may be listed too, as nn.LSTM does: they stay the same objects.
    known = {id(tensor) for tensor in on_meta.values() if isinstance(tensor, nn.Parameter)}
    lost = []
    for prefix, child in module.named_modules():
        for key, value in vars(child).items():
            if key in _MODULE_TABLES or isinstance(value, torch.Tensor):
                continue
            leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            if any(leaf.is_meta and id(leaf) not in known for leaf in leaves):
                lost.append(f"{prefix}.{key}" if prefix else key)
    _raise_for(lost, "holds tensors without values in a list or dict; register them as buffers")


def _write(target: Any, value: torch.Tensor) -> None:
    with torch.no_grad():
        if not _is_sharded(target):
            target.copy_(value)
            return
        from torch.distributed.tensor import distribute_tensor

        whole = value.contiguous()
        shard: Any = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(shard.to_local())


def _is_sharded(value: Any) -> bool:
    """Whether ``value`` is a DTensor; asks without importing torch.distributed.tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _raise_for(names: list[str], what: str, fix: str = _FIX) -> None:
    if names:
        others = f", and {len(names) - 5} more" if len(names) > 5 else ""
        raise StrategyError(f"{names[0]} {what}.", given=", ".join(names[:5]) + others, fix=fix)
