"""Names of parameters as the user's model has them, whatever wrapped the model that was saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fabric_lite.checkpoint.saving import own_keys

__all__ = ["matching", "with_keys_of"]

# DistributedDataParallel, torch.compile and Lightning Fabric put these around a whole model.
_PREFIXES = ("module.", "_orig_mod.", "_forward_module.")
# Around parts of a model also FSDP's first version and activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def with_keys_of(current: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """A copy of a saved state dict of a module, with the keys of ``current``, the module's own one."""
    metadata = getattr(saved, "_metadata", None)
    actual = dict(zip(own_keys(current), current, strict=True))
    state = dict(saved)
    for prefix in _outer_prefixes(actual, state):
        state = {key[len(prefix) :]: value for key, value in state.items()}
        metadata = None
    state = own_keys(state)
    found = matching(actual, state)
    renamed: Any = type(current)((actual.get(found.get(key, key), key), value) for key, value in state.items())
    if metadata is not None:
        renamed._metadata = metadata
    return renamed


def matching(wanted: Iterable[str], saved: Iterable[str]) -> dict[str, str]:
    """Return, for each saved name that is found among the wanted ones, with or without wrappers, the wanted name.

    A name that is there as it is means that one. No two saved names get the same.
    """
    wanted, saved = list(wanted), list(saved)
    found = {name: name for name in set(wanted).intersection(saved)}
    free = _by_core(name for name in wanted if name not in found)
    left = _by_core(name for name in saved if name not in found)
    found.update({name: free[core] for core, name in left.items() if core in free})
    return found


def _by_core(names: Iterable[str]) -> Mapping[str, str]:
    """The names by what is left of them without wrappers; not those that are then the same."""
    by_core: dict[str, list[str]] = {}
    for name in names:
        core = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        by_core.setdefault(core, []).append(name)
    return {core: same[0] for core, same in by_core.items() if len(same) == 1}


def _outer_prefixes(current: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """The prefixes, outermost first, that all saved keys have and none of the module's."""
    keys, found = list(saved), []
    while keys:
        prefix = next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in keys)), None)
        if prefix is None or any(key.startswith(prefix) for key in current):
            break
        found.append(prefix)
        keys = [key[len(prefix) :] for key in keys]
    return found
