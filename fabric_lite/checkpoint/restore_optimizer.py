"""An optimizer's saved state: matched with its parameters, checked, and laid out as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fabric_lite.adopt import user_class
from fabric_lite.checkpoint.keys import matching
from fabric_lite.checkpoint.placing import check_part, laid_out_like
from fabric_lite.checkpoint.plain import Place
from fabric_lite.checkpoint.saving import own_keys, uncompiled
from fabric_lite.checkpoint.stored import StoredTensor, is_tensor, materialized
from fabric_lite.errors import FabricValueError

__all__ = ["ParameterNames", "fitted_state", "is_optimizer_state", "parameter_names"]

# LBFGS keeps all parameters in one flat vector, Adafactor rows and columns.
_OTHER_SHAPES = {"LBFGS", "Adafactor"}

# By the id of a parameter, its names in the modules that are loaded together with its optimizer.
ParameterNames = dict[int, list[str]]


def parameter_names(objects: Iterable[Any]) -> ParameterNames:
    """The names of the parameters of the modules among ``objects``, without the marks of compiled parts."""
    names: ParameterNames = {}
    for instance in objects:
        if isinstance(instance, torch.nn.Module):
            named = dict(uncompiled(instance).named_parameters(remove_duplicate=False))
            for name, parameter in own_keys(named).items():
                names.setdefault(id(parameter), []).append(name)
    return names


def is_optimizer_state(saved: dict[str, Any]) -> bool:
    """Whether this has the form of a state of torch's optimizers, or a form of a user's own."""
    if "param_groups" not in saved:
        return True
    groups, state = saved["param_groups"], saved.get("state", {})
    proper = isinstance(groups, list) and all(isinstance(one, dict) and "params" in one for one in groups)
    if not proper or not isinstance(state, dict) or not all(isinstance(one["params"], list) for one in groups):
        return False
    # Keys are numbers or names.
    return all(isinstance(key, (int, str)) for one in groups for key in one["params"])


def fitted_state(
    place: Place, optimizer: torch.optim.Optimizer, saved: dict[str, Any], names: ParameterNames
) -> tuple[dict[str, Any], list[tuple[torch.Tensor, StoredTensor]]]:
    """Return a saved state for ``optimizer.load_state_dict``: in memory, each tensor laid out like its parameter.

    Of a sharded parameter a rank reads its own part. A tensor of another shape than its parameter is whole. Where the
    optimizer has a tensor of the same kind already, that one stands in the state, and is still to be filled: no rank
    holds moments twice.

    Args:
        place: Where the optimizer is in the user's state, for the errors.
        optimizer: It stays as it is.
        saved: Its state, keyed by number as torch's optimizers give it, or by the names of parameters, as
            ``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`` does.
        names: Of the parameters. Where they are not known, a state by name is taken in its order.

    Returns:
        The state, and pairs of a tensor in it that the optimizer has now and what is to be read into it.

    Raises:
        FabricValueError: The optimizer has other parameters, or is of another kind.
    """
    if "param_groups" not in saved:
        return dict(materialized(saved)), []  # its own form, and its own to check
    saved = {"state": {}, **saved}  # DCP drops empty dicts
    groups = _as_here(place, optimizer, saved["param_groups"], names)
    _check_groups(place, optimizer, groups)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    keys = [key for group in groups for key in group["params"]]
    entries = _entries(saved["state"])
    for key, parameter in zip(keys, parameters, strict=True):
        _check_entry(place, optimizer, key, entries.get(key, {}), parameter)
    number_of = {key: number for number, key in enumerate(keys)}
    state = {}
    to_fill: list[tuple[torch.Tensor, StoredTensor]] = []
    for key, entry in entries.items():
        if key in number_of:
            state[number_of[key]] = _laid_out(optimizer, entry, parameters[number_of[key]], to_fill)
        else:
            state[key] = materialized(entry)  # not of a parameter
    counter = iter(range(len(keys)))
    numbered = [{**materialized(group), "params": [next(counter) for _ in group["params"]]} for group in groups]
    fitted = {
        **materialized({k: v for k, v in saved.items() if k not in ("state", "param_groups")}),
        "state": state,
        "param_groups": numbered,
    }
    return fitted, to_fill


def _entries(state: Any) -> dict[Any, Any]:
    """The state by key. DCP makes numbers strings."""
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: entry for key, entry in state.items()}


def _as_here(
    place: Place, optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]], names: ParameterNames
) -> list[dict[str, Any]]:
    """The saved groups in the optimizer's order, if both know the names of all parameters."""
    keys = [key for group in saved for key in group["params"]]
    if not all(isinstance(key, str) for key in keys):
        return saved
    here = [[names.get(id(parameter), []) for parameter in group["params"]] for group in optimizer.param_groups]
    if not all(known for group in here for known in group):
        return saved
    found = {
        wanted: key
        for key, wanted in matching((name for group in here for known in group for name in known), keys).items()
    }
    lacking = [known[0] for group in here for known in group if not any(name in found for name in known)]
    if lacking:
        raise FabricValueError(
            f"{place} has other parameters than in the file, which has no state of {', '.join(lacking)}.",
            given=f"{sum(map(len, here))} parameters here, {len(keys)} in the file",
            fix="the optimizer as it was built for the run that was saved",
        )
    group_of = {key: number for number, group in enumerate(saved) for key in group["params"]}
    groups = []
    for known_of_group in here:
        params = [next(found[name] for name in known if name in found) for known in known_of_group]
        source = saved[group_of[params[0]]] if params else {}
        if any(saved[group_of[key]] is not source for key in params):
            raise FabricValueError(
                f"{place} has its parameters in other groups than in the file.",
                given=f"{', '.join(params)} in one group here",
                fix="the optimizer as it was built for the run that was saved",
            )
        groups.append({**source, "params": params})
    return groups


def _laid_out(
    optimizer: torch.optim.Optimizer, entry: Any, parameter: Any, to_fill: list[tuple[torch.Tensor, StoredTensor]]
) -> Any:
    if not isinstance(entry, dict):
        return materialized(entry)
    # A hook that raises would leave the optimizer filled: then a second copy is the way back.
    can_fill = (
        not optimizer._optimizer_load_state_dict_pre_hooks and not optimizer._optimizer_load_state_dict_post_hooks
    )
    # torch would cast these itself, but all at once, beside the ones that were read.
    cast = _is_of_torch(optimizer) and parameter.is_floating_point()
    new = {}
    for name, value in entry.items():
        if not is_tensor(value) or len(value.shape) == 0:
            new[name] = materialized(value)
            continue
        own_shape = not torch.nn.parameter.is_lazy(parameter) and value.shape == parameter.shape
        dtype = parameter.dtype if cast and own_shape and name != "step" else None
        live: Any = optimizer.state[parameter].get(name) if can_fill and parameter in optimizer.state else None
        if dtype is not None and isinstance(value, StoredTensor) and _is_alike(live, parameter):
            check_part(live, value)
            to_fill.append((live, value))
            new[name] = live
            continue
        new[name] = laid_out_like(value if isinstance(value, StoredTensor) else materialized(value), parameter, dtype)
    return new


def _is_alike(live: Any, parameter: torch.Tensor) -> bool:
    """Whether this is a tensor as ``load_state_dict`` would make it for ``parameter``."""
    return (
        type(live) in (torch.Tensor, type(parameter.detach()))
        and (live.shape, live.dtype, live.device) == (parameter.shape, parameter.dtype, parameter.device)
        and getattr(live, "placements", None) == getattr(parameter, "placements", None)
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
        if is_tensor(value) and len(value.shape) > 0 and value.shape != parameter.shape:
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
