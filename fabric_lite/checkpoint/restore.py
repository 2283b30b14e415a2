"""One object's saved state: checked against the object, laid out as it is, applied, and undone."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from fabric_lite.checkpoint.keys import with_keys_of
from fabric_lite.checkpoint.layout import is_sharded
from fabric_lite.checkpoint.packing import copied
from fabric_lite.checkpoint.placing import check_memory, check_part, copy_into, laid_out_like
from fabric_lite.checkpoint.plain import Place
from fabric_lite.checkpoint.restore_optimizer import ParameterNames, fitted_state, is_optimizer_state
from fabric_lite.checkpoint.saving import uncompiled
from fabric_lite.checkpoint.stored import StoredTensor, is_tensor, materialized
from fabric_lite.collectives import rank
from fabric_lite.errors import CheckpointError, FabricError, FabricKeyError, FabricValueError
from fabric_lite.precision_low_bits import LowBitLinear

__all__ = ["LAST", "Restore", "prepare"]

_IN_ORDER, _OWN_WAY, _FILLED, _CHECKED, LAST = range(5)


@dataclasses.dataclass(frozen=True)
class Restore:
    """A restore that was checked and not yet done.

    Args:
        place: Where the object is in the user's state.
        turn: Lower turns go first: what is the least likely to fail goes last.
        load: Puts the saved state into the object.
        undo: Puts the earlier state back, once the tensors that ``load`` overwrites have their old values.
        overwritten: These tensors.
    """

    place: Place
    turn: int
    load: Callable[[], Any]
    undo: Callable[[], Any]
    overwritten: Sequence[Any] = ()

    def apply(self) -> None:
        """Load; what the object itself raises comes as a CheckpointError that names its place."""
        try:
            self.load()
        except FabricError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self.place} did not take the state in the file.", given=f"{type(error).__name__}: {error}"
            ) from error


def prepare(place: Place, instance: Any, saved: Any, strict: bool, names: ParameterNames) -> Restore:
    """Check a saved state against its object, which stays as it is; every rank calls it for the same object.

    Args:
        place: Where the object is in the user's state.
        instance: The object.
        saved: Its state; tensors may still be in the file.
        strict: Whether a module's keys and shapes must be the saved ones.
        names: Of parameters, for the state of an optimizer that was saved by name.

    Raises:
        FabricKeyError: Under ``strict`` a module and the file have different keys.
        FabricValueError: Under ``strict`` a tensor's shape differs; or an optimizer has other parameters, or is of
            another kind.
        CheckpointError: The file has no state there, or could not be read.
    """
    try:
        return _prepared(place, instance, saved, strict, names)
    except FabricError:
        raise
    except Exception as error:  # a state that is not what its class writes fails anywhere
        raise CheckpointError(
            f"{place} can't take the state in the file.", given=f"{type(error).__name__}: {error}"
        ) from error


def _prepared(place: Place, instance: Any, saved: Any, strict: bool, names: ParameterNames) -> Restore:
    if isinstance(instance, torch.nn.Module):
        return _prepare_module(place, uncompiled(instance), saved, strict)
    if isinstance(instance, torch.optim.Optimizer):
        return _prepare_optimizer(place, instance, saved, names)
    return Restore(place, _IN_ORDER, lambda: instance.load_state_dict(materialized(saved)), _way_back(instance))


def _way_back(instance: Any) -> Callable[[], Any]:
    """What undoes a ``load_state_dict``. A set-up loader has one that needs no other rank and keeps a loop's place."""
    own = getattr(type(instance), "_way_back", None)
    if own is not None:
        way_back: Callable[[], Any] = own(instance)
        return way_back
    before = copied(instance.state_dict())
    return lambda: instance.load_state_dict(before)


def _prepare_module(place: Place, module: torch.nn.Module, saved: Any, strict: bool) -> Restore:
    if not isinstance(saved, dict) or not all(isinstance(key, str) for key in saved):
        raise _no_state(place, module, saved)
    current = module.state_dict()
    state = with_keys_of(current, saved)
    live = _live_tensors(module)
    if _loads_in_its_own_way(module) or live.keys() != current.keys():
        return _prepare_own_way(place, module, current, state, strict)
    state = _fitting(place, module, current, state, strict)
    for key, value in state.items():
        check_memory(live[key], f'{place}["{key}"]')
        if isinstance(value, StoredTensor):
            check_part(live[key], value)

    def load() -> None:
        for key, value in state.items():
            copy_into(live[key], value)

    return Restore(place, _CHECKED, load, lambda: None, [live[key] for key in state])


def _prepare_own_way(
    place: Place, module: torch.nn.Module, current: dict[str, Any], state: dict[str, Any], strict: bool
) -> Restore:
    before = copied(current)

    def load() -> None:
        memo: dict[Any, Any] = {}
        for key, value in state.items():
            laid_out = is_tensor(value) and key in current and is_sharded(current[key])
            state[key] = laid_out_like(value, current[key]) if laid_out else materialized(value, memo)
        try:
            module.load_state_dict(state) if strict else module.load_state_dict(state, strict=False)
        except RuntimeError as error:
            if "key(s) in state_dict" in str(error):
                raise FabricKeyError(f"{place}: {error}") from error
            raise
        state.clear()

    return Restore(place, _OWN_WAY, load, lambda: module.load_state_dict(before))


def _live_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters and saved buffers themselves, by the keys that torch gives them in a state dict."""
    live: dict[str, torch.Tensor] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        own = {**part._parameters, **part._buffers}
        for key, value in own.items():
            if value is not None and key not in part._non_persistent_buffers_set:
                live[f"{name}.{key}" if name else key] = value
    return live


def _loads_in_its_own_way(module: torch.nn.Module) -> bool:
    """Whether a class or a hook of the user has a part in loading: then keys and shapes are theirs to judge."""
    if getattr(module.load_state_dict, "__func__", None) is not torch.nn.Module.load_state_dict:
        return True
    return any(
        not all(
            map(_is_of_fsdp, [*part._load_state_dict_pre_hooks.values(), *part._load_state_dict_post_hooks.values()])
        )
        or type(part).set_extra_state is not torch.nn.Module.set_extra_state
        or not type(part)._load_from_state_dict.__module__.startswith(("torch.nn.modules.", LowBitLinear.__module__))
        for part in module.modules()
    )


def _is_of_fsdp(hook: Any) -> bool:
    """Whether it is one of the hooks with which FSDP puts a sharded parameter back: it stays where it is here."""
    function = getattr(hook, "hook", hook)  # torch keeps some in an object that calls them
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.fsdp.")


def _fitting(
    place: Place, module: torch.nn.Module, current: dict[str, Any], state: dict[str, Any], strict: bool
) -> dict[str, Any]:
    """The part of ``state`` that fits the module; all of it, or an error, under ``strict``."""
    missing = [key for key in current if key not in state and not _came_later(key, state)]
    unexpected = [key for key in state if key not in current]
    other_shape = [key for key in state if key in current and not _same_shape(state[key], current[key])]
    shapes = "; ".join(
        f'{place}["{key}"] has shape {_shape(state[key])} in the file and {_shape(current[key])} in the model'
        for key in other_shape
    )
    if strict and (missing or unexpected):
        lacks = [f"lacks {', '.join(missing)}"] if missing else []
        adds = [f"has {', '.join(unexpected)} besides"] if unexpected else []
        raise FabricKeyError(
            f"{place}: the file {' and '.join(lacks + adds)}.",
            given=f"{type(module).__name__} with {len(current)} keys, a file with {len(state)}",
            fix="the model that was saved, or strict=False to load what fits",
        )
    if strict and other_shape:
        raise FabricValueError(f"{shapes}.", fix="the model that was saved, or strict=False to pass over these")
    _check_bits(place, module, unexpected)
    if other_shape and rank() == 0:
        warnings.warn(f"Not loaded: {shapes}.", stacklevel=2)
    for key in unexpected + other_shape:
        del state[key]
    return state


def _check_bits(place: Place, module: torch.nn.Module, unexpected: Collection[str]) -> None:
    """Raise where a frozen weight of few bits would be passed over, since in the file it is plain or of other bits."""
    if not unexpected:
        return
    for name, part in module.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(part, LowBitLinear) and (others := part.others_among(unexpected, prefix)):
            raise FabricValueError(
                f"{place}: {name or 'the layer'} has a weight in {part.mode}, but the file has {', '.join(others)}.",
                given=f"a file without the weight of {name or 'the layer'} in {part.mode}",
                fix="load a plain checkpoint before setup, and one of few bits under the same precision",
            )


def _came_later(key: str, state: Any) -> bool:
    """Whether torch itself fills in this key: batch norm counts its batches since version 2 of its state."""
    name, _, leaf = key.rpartition(".")
    entry = (getattr(state, "_metadata", None) or {}).get(name, {})
    return leaf == "num_batches_tracked" and (entry.get("version") or 0) < 2


def _same_shape(saved: Any, current: Any) -> bool:
    if torch.nn.parameter.is_lazy(current):
        return True
    if not is_tensor(saved) or not is_tensor(current):
        return is_tensor(saved) == is_tensor(current)
    # torch takes one element for a scalar
    return saved.shape == current.shape or (current.dim() == 0 and saved.shape == (1,))


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if is_tensor(value) else f"of no tensor ({type(value).__name__})"


def _prepare_optimizer(place: Place, optimizer: torch.optim.Optimizer, saved: Any, names: ParameterNames) -> Restore:
    if not isinstance(saved, dict) or not is_optimizer_state(saved):
        raise _no_state(place, optimizer, saved)
    state, to_fill = fitted_state(place, optimizer, saved, names)
    before = optimizer.state_dict()  # torch's optimizers replace their state at loading, so this needs no copy

    def load() -> None:
        for live, value in to_fill:
            copy_into(live, value)
        optimizer.load_state_dict(state)

    turn = _FILLED if to_fill else _IN_ORDER
    return Restore(place, turn, load, lambda: optimizer.load_state_dict(before), [live for live, _ in to_fill])


def _no_state(place: Place, instance: Any, saved: Any) -> CheckpointError:
    return CheckpointError(
        f"{place} is a {type(instance).__name__}, and the file has no state dict there.",
        given=f"{type(saved).__name__}: {saved!r:.80}",
        fix="the key under which it was saved",
    )
