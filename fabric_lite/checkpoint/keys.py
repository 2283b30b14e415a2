"""Names of parameters as the user's model has them, whatever wrapped the model that was saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fabric_lite.checkpoint.saving import own_keys

__all__ = ["matching", "with_keys_of"]

_COMPILED = "_orig_mod."
# DistributedDataParallel and Lightning Fabric put these around a whole model.
_PREFIXES = ("module.", "_forward_module.")
# Around parts of a model also FSDP's first version and activation checkpointing.
_WRAPPERS = {"module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def with_keys_of(current: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """A copy of a saved state dict of a module, with the keys of ``current``, the module's own one."""
    actual = dict(zip(own_keys(current), current, strict=True))
    state = own_keys(saved)
    found = matching(actual, state)
    renamed: Any = type(current)((actual.get(found[key], found[key]), value) for key, value in state.items())
    metadata = getattr(state, "_metadata", None)
    if metadata is not None and all(key == name for key, name in found.items()):
        renamed._metadata = metadata
    return renamed


def matching(wanted: Iterable[str], saved: Iterable[str]) -> dict[str, str]:
    """Return for each saved name the wanted one that it stands for, or else what it is without outer wrappers.

    If the saved names without some outer prefixes are exactly the wanted ones, that is it. Else a name that is there
    as it is stands for itself, and others are compared without the wrappers inside of them. No two saved names stand
    for the same one.
    """
    wanted = list(wanted)
    peeled = {name: name.replace(_COMPILED, "") for name in saved}
    for names in (stages := _stages(peeled)):
        if set(names.values()) == set(wanted):
            return names
    # A model whose own names begin so was not wrapped as a whole.
    names = next((names for names in reversed(stages) if not _begins_as_taken_off(peeled, names, wanted)), peeled)
    wrappers = _WRAPPERS - ({"module"} if any("module" in name.split(".") for name in wanted) else set())
    taken = set(wanted).intersection(names.values())
    free = _by_core((name for name in wanted if name not in taken), wrappers)
    left = _by_core((name for name in names.values() if name not in taken), wrappers)
    inner = {name: free[core] for core, name in left.items() if core in free}
    return {name: inner.get(rest, rest) for name, rest in names.items()}


def _stages(names: dict[str, str]) -> list[dict[str, str]]:
    """The names as they are, and with one prefix after the other taken off, as long as all have it."""
    stages = [names]
    while names:
        prefix = next((prefix for prefix in _PREFIXES if all(rest.startswith(prefix) for rest in names.values())), None)
        if prefix is None:
            break
        names = {name: rest[len(prefix) :] for name, rest in names.items()}
        stages.append(names)
    return stages


def _begins_as_taken_off(before: dict[str, str], after: dict[str, str], wanted: list[str]) -> bool:
    """Whether a wanted name begins with one of the prefixes that were taken off."""
    name = next(iter(before), None)
    if name is None or before == after:
        return False
    off = before[name][: len(before[name]) - len(after[name])].split(".")[:-1]
    return any(one.split(".")[0] in off for one in wanted)


def _by_core(names: Iterable[str], wrappers: set[str]) -> Mapping[str, str]:
    """The names by what is left of them without wrappers; not those that are then the same."""
    by_core: dict[str, list[str]] = {}
    for name in names:
        core = ".".join(part for part in name.split(".") if part not in wrappers)
        by_core.setdefault(core, []).append(name)
    return {core: same[0] for core, same in by_core.items() if len(same) == 1}
