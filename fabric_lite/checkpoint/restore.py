"""One object's saved state: checked against the object, laid out as it is, applied, and undone."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch

from fabric_lite.adopt import user_class
from fabric_lite.checkpoint.layout import laid_out_like
from fabric_lite.checkpoint.packing import copied
from fabric_lite.checkpoint.plain import Place
from fabric_lite.checkpoint.saving import own_keys, uncompiled
from fabric_lite.collectives import rank
from fabric_lite.errors import CheckpointError, FabricError, FabricKeyError, FabricValueError

__all__ = ["Restore", "prepare"]

_PREFIXES = ("module.", "_orig_mod.", "_forward_module.")
# LBFGS keeps all parameters in one flat vector, Adafactor rows and columns.
_OTHER_SHAPES = {"LBFGS", "Adafactor"}
_IN_ORDER, _OWN_WAY, _CHECKED = range(3)


@dataclasses.dataclass(frozen=True)
class Restore:
    """A restore that was checked and not yet done.

    Args:
        place: Where the object is in the user's state.
        turn: Lower turns go first: what is the least likely to fail goes last.
        load: Puts the saved state into the object.
        undo: Puts the earlier state back.
    """

    place: Place
    turn: int
    load: Callable[[], Any]
    undo: Callable[[], Any]

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


def prepare(place: Place, instance: Any, saved: Any, strict: bool) -> Restore:
    """Check a saved state against its object, which stays as it is; every rank calls it for the same object.

    Raises:
        FabricKeyError: Under ``strict`` a module and the file have different keys.
        FabricValueError: Under ``strict`` a tensor's shape differs; or an optimizer has other parameters, or is of
            another kind.
        CheckpointError: The file has no state there.
    """
    if isinstance(instance, torch.nn.Module):
        return _prepare_module(place, uncompiled(instance), saved, strict)
    if isinstance(instance, torch.optim.Optimizer):
        return _prepare_optimizer(place, instance, saved)
    state, before = copied(saved), copied(instance.state_dict())
    return Restore(place, _IN_ORDER, lambda: instance.load_state_dict(state), lambda: instance.load_state_dict(before))


def _prepare_module(place: Place, module: torch.nn.Module, saved: Any, strict: bool) -> Restore:
    if not isinstance(saved, dict):
        raise _no_state(place, module, saved)
    current = module.state_dict()
    state = _with_keys_of(current, saved)
    own_way = _loads_in_its_own_way(module)
    if own_way:
        before = copied(current)
    else:
        before = None
        state = _fitting(place, module, current, state, strict)
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and key in current:
            state[key] = laid_out_like(value, current[key])

    def load() -> None:
        try:
            module.load_state_dict(state) if strict else module.load_state_dict(state, strict=False)
        except RuntimeError as error:
            if "key(s) in state_dict" in str(error):
                raise FabricKeyError(f"{place}: {error}") from error
            raise

    def undo() -> None:
        # A module that was checked, and loads the way torch does, takes its state as a whole.
        if before is not None:
            module.load_state_dict(before)

    return Restore(place, _OWN_WAY if own_way else _CHECKED, load, undo)


def _loads_in_its_own_way(module: torch.nn.Module) -> bool:
    """Whether a class or a hook of the user has a part in loading: then keys and shapes are theirs to judge."""
    if getattr(module.load_state_dict, "__func__", None) is not torch.nn.Module.load_state_dict:
        return True
    return any(
        part._load_state_dict_pre_hooks
        or part._load_state_dict_post_hooks
        or type(part).set_extra_state is not torch.nn.Module.set_extra_state
        or not type(part)._load_from_state_dict.__module__.startswith("torch.nn.modules.")
        for part in module.modules()
    )


def _with_keys_of(current: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """A copy of the saved state dict with the module's own keys, whatever wrapped the module that was saved."""
    metadata = getattr(saved, "_metadata", None)
    actual = dict(zip(own_keys(current), current, strict=True))
    state = dict(saved)
    for prefix in _longest_prefix(actual, state):
        state = {key[len(prefix) :]: value for key, value in state.items()}
        metadata = None
    state = own_keys(state)
    renamed: Any = type(current)((actual.get(key, key), value) for key, value in state.items())
    if metadata is not None:
        renamed._metadata = metadata
    return renamed


def _longest_prefix(current: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """The prefixes, outermost first, that all saved keys have and none of the module's."""
    keys, found = list(saved), []
    while keys:
        prefix = next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in keys)), None)
        if prefix is None or any(key.startswith(prefix) for key in current):
            break
        found.append(prefix)
        keys = [key[len(prefix) :] for key in keys]
    return found


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
    if other_shape and rank() == 0:
        warnings.warn(f"Not loaded: {shapes}.", stacklevel=2)
    for key in unexpected + other_shape:
        del state[key]
    return state


def _came_later(key: str, state: Any) -> bool:
    """Whether torch itself fills in this key: batch norm counts its batches since version 2 of its state."""
    name, _, leaf = key.rpartition(".")
    entry = (getattr(state, "_metadata", None) or {}).get(name, {})
    return leaf == "num_batches_tracked" and (entry.get("version") or 0) < 2


def _same_shape(saved: Any, current: Any) -> bool:
    if torch.nn.parameter.is_lazy(current):
        return True
    if not isinstance(saved, torch.Tensor) or not isinstance(current, torch.Tensor):
        return isinstance(saved, torch.Tensor) == isinstance(current, torch.Tensor)
    # torch takes one element for a scalar
    return saved.shape == current.shape or (current.dim() == 0 and saved.shape == (1,))


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else f"of no tensor ({type(value).__name__})"


def _prepare_optimizer(place: Place, optimizer: torch.optim.Optimizer, saved: Any) -> Restore:
    if not isinstance(saved, dict):
        raise _no_state(place, optimizer, saved)
    before = optimizer.state_dict()  # torch's optimizers replace their state at loading, so this needs no copy
    state = copied(saved)
    if "state" in state and "param_groups" in state:
        _check_groups(place, optimizer, state["param_groups"])
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        indices = [index for group in state["param_groups"] for index in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            entry = state["state"].get(index, {})
            _check_entry(place, optimizer, index, entry, parameter)
            for name, value in entry.items():
                if isinstance(value, torch.Tensor) and value.dim() > 0:
                    entry[name] = laid_out_like(value, parameter)
    return Restore(
        place, _IN_ORDER, lambda: optimizer.load_state_dict(state), lambda: optimizer.load_state_dict(before)
    )


def _check_groups(place: Place, optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    here = [len(group["params"]) for group in optimizer.param_groups]
    there = [len(group["params"]) for group in saved]
    if here != there:
        raise FabricValueError(
            f"{place} has other parameters than in the file.",
            given=f"groups of {here} parameters here, of {there} in the file",
            fix="the optimizer as it was built for the run that was saved",
        )

    if not _is_of_torch(optimizer):
        return
    for number, group in enumerate(saved):
        # Flags (False or None by default) came with later versions of torch, which adds them to older files itself.
        lacking = [
            name
            for name, default in optimizer.defaults.items()
            if name not in group and default is not None and not isinstance(default, bool)
        ]
        if lacking:
            raise FabricValueError(
                f"{place} is another kind of optimizer than in the file, where group {number} lacks "
                f"{', '.join(lacking)}.",
                given=f"{user_class(type(optimizer)).__name__} here, a group with "
                f"{', '.join(name for name in group if name != 'params')} in the file",
                fix="the class of optimizer that was saved",
            )


def _check_entry(place: Place, optimizer: torch.optim.Optimizer, index: Any, entry: Any, parameter: Any) -> None:
    """Compare the shapes of one parameter's state, for the classes that are known to keep it in the parameter's."""
    if not _is_of_torch(optimizer) or torch.nn.parameter.is_lazy(parameter):
        return
    for name, value in entry.items():
        if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape != parameter.shape:
            raise FabricValueError(
                f'{place}["state"][{index!r}]["{name}"] has shape {tuple(value.shape)} in the file, '
                f"and the parameter has {tuple(parameter.shape)}.",
                given=f"{user_class(type(optimizer)).__name__} over parameters in another order or of another model",
                fix="the model and the optimizer as they were built for the run that was saved",
            )


def _is_of_torch(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is one of torch's classes whose state tensors have the shape of their parameter, or are scalars."""
    kind = user_class(type(optimizer))
    return kind.__module__.startswith("torch.optim.") and kind.__name__ not in _OTHER_SHAPES


def _no_state(place: Place, instance: Any, saved: Any) -> CheckpointError:
    return CheckpointError(
        f"{place} is a {type(instance).__name__}, and the file has no state dict there.",
        given=f"{type(saved).__name__}: {saved!r:.80}",
        fix="the key under which it was saved",
    )
