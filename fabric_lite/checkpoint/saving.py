"""``save``: state -> plain values -> one file or a folder, on all ranks or not at all, at once or beside the loop."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from fabric_lite.checkpoint import asynchronous
from fabric_lite.checkpoint.asynchronous import SaveHandle
from fabric_lite.checkpoint.file_writing import write_file
from fabric_lite.checkpoint.folder_writing import write_folder
from fabric_lite.checkpoint.layout import Held, ShardPlan, held, is_sharded, shard_plan
from fabric_lite.checkpoint.plain import Place, plain, stateful_objects
from fabric_lite.checkpoint.remote import RemotePath, Target
from fabric_lite.checkpoint.together import Together, lost_ranks_explained
from fabric_lite.collectives import gather_objects, rank
from fabric_lite.errors import CheckpointError, FabricTypeError, FabricValueError
from fabric_lite.notices import says_that_it_waits

__all__ = ["checked_path", "compare_objects", "own_keys", "save", "state_of", "uncompiled"]

_COMPILED = "_orig_mod."
_KINDS = ("full", "sharded")

Filter = Mapping[str, Callable[[str, Any], bool]]


def save(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    filter: Filter | None = None,
    state_dict_type: str = "full",
    origin: Mapping[str, str | None] | None = None,
    async_: bool = False,
) -> SaveHandle | None:
    """Write ``state`` into one file that plain ``torch.load(path, weights_only=True)`` reads, or into a folder.

    Every rank calls it, with the same objects. Rank 0's plain values are the ones that are written. When it returns,
    all is on the disk. When it raises, it raises on every rank, and an earlier checkpoint is as it was.

    Args:
        path: A local path, or a name in a store that fsspec reaches (``s3://bucket/run/last``). Folders above it are
            created; an earlier checkpoint of this name, file or folder, is replaced at once. A folder with
            anything but a checkpoint in it is never touched.
        state: A dict of any nesting of modules, optimizers, schedulers, loaders, the fabric, any object with
            ``state_dict`` and ``load_state_dict``, tensors and plain values.
        filter: For some of the top keys a function ``(key, value) -> bool`` that chooses what is written of them;
            every rank must choose the same.
        state_dict_type: "full": rank 0 writes one file, sharded tensors in full, one after the other in memory.
            "sharded": a folder, into which every rank writes its own part of the sharded tensors.
        origin: Names of the "strategy" and of the "precision", for who looks at the checkpoint later.
        async_: Whether to return as soon as what this rank writes was copied, and to write the copy in a thread. The
            memory for it is kept for the saves to come, until ``fabric.close()``.

    Returns:
        None, or with ``async_`` a handle whose ``result()`` waits until all is on the disk and raises what went wrong.
        A save that follows, of either kind, waits for it first; an error that nobody was told of is raised there.

    Raises:
        FabricTypeError: Something could only be read back by running code, or an argument has the wrong type.
        FabricValueError: ``filter`` names a key that ``state`` has not, or ``state_dict_type`` is neither.
        CheckpointError: The checkpoint could not be written, or another rank failed or has ended.
    """
    failed = asynchronous.wait_for_last()
    together = Together()
    with says_that_it_waits("fabric.save()"):
        asked = together.results("save()", _asked, failed, path, state, filter, state_dict_type, async_)
    _raise_earlier_error(failed, asked)
    _compare_calls(asked)
    target, state = checked_path(path), dict(state)
    states, error = _states_of_objects(state)
    content: dict[str, Any] = {}
    sharded: dict[str, Any] = {}
    error = error or _collect(state, states, filter or {}, content, sharded)
    write_to = write_file if state_dict_type == "full" else write_folder

    def own_held() -> Held:
        if error is not None:
            raise error
        return held(sharded)

    def make_plan() -> ShardPlan:
        by_rank = together.results("save()", own_held)
        with lost_ranks_explained("save()"):
            return shard_plan(sharded, by_rank)

    def write(content: Any, plan: ShardPlan, together: Together) -> None:
        write_to(target, content, plan, dict(origin or {}), together)

    if async_:
        return asynchronous.start(target, content, sharded if error is None else None, make_plan, write)
    write(content, make_plan(), together)
    return None


def checked_path(path: Any) -> Target:
    """Return ``path`` as a Path, or as the name in a store that it is; FabricTypeError if it is none."""
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise FabricTypeError("A checkpoint's path is a string or a Path.", given=f"{type(path).__name__} {path!r:.80}")
    scheme, separator, local = str(path).partition("://")
    if not separator:
        return Path(path)
    return Path(local) if scheme in ("file", "local") else RemotePath(str(path))


def compare_objects(objects: list[tuple[Place, Any]], what: str) -> None:
    """Raise CheckpointError on every rank if the ranks hold objects at different places. Every rank calls it."""
    _compare_places(gather_objects([str(place) for place, _ in objects]), what)


def _compare_places(by_rank: list[list[str]], what: str) -> None:
    mine = by_rank[rank()]
    for number, other in enumerate(by_rank):
        if other != mine:
            places = sorted(set(other) ^ set(mine))
            raise CheckpointError(
                f"The ranks call {what} with different objects.",
                given=f"rank {rank()} and rank {number} differ in {', '.join(places) or 'their order'}",
                fix="the same keys in the same order on every rank",
            )


def state_of(instance: Any) -> Any:
    """The object's ``state_dict()``, a module's with the keys it would have uncompiled.

    Parameters in it may require gradients; of a sharded one the detaching, by DTensor's dispatch, would take longer
    than the copy of its shard.
    """
    if not isinstance(instance, torch.nn.Module):
        return instance.state_dict()
    module = uncompiled(instance)
    return own_keys(module.state_dict(keep_vars=True) if _leaves_detaching_to_us(module) else module.state_dict())


def _leaves_detaching_to_us(module: torch.nn.Module) -> bool:
    """Whether the module is sharded, and nobody else than torch and the caller sees the tensors of its state."""
    return any(map(is_sharded, module.parameters())) and all(map(_has_torchs_state_dict, module.modules()))


def _has_torchs_state_dict(module: torch.nn.Module) -> bool:
    return not module._state_dict_hooks and all(
        getattr(type(module), name) is getattr(torch.nn.Module, name) and name not in vars(module)
        for name in ("state_dict", "_save_to_state_dict")
    )


def uncompiled(instance: Any) -> Any:
    """The user's module inside one that ``torch.compile`` returned; anything else as it is."""
    dynamo = sys.modules.get("torch._dynamo")
    compiled = dynamo is not None and isinstance(instance, dynamo.eval_frame.OptimizedModule)
    return instance._orig_mod if compiled else instance


def own_keys(state: Any) -> Any:
    """A module's state dict with the keys of the user's classes: without the marks of compiled parts."""
    if not any(_COMPILED in key for key in state):
        return state
    renamed = type(state)((key.replace(_COMPILED, ""), value) for key, value in state.items())
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        renamed._metadata = {f"{name}.".replace(_COMPILED, "")[:-1]: entry for name, entry in metadata.items()}
    return renamed


class _Asked(NamedTuple):
    """What a rank asks of ``save``, and where its objects are; what went wrong in the asynchronous save before it."""

    kind: str
    is_async: bool
    places: list[str]
    earlier_error: str | None
    was_told: bool


def _asked(failed: SaveHandle | None, path: Any, state: Any, filter: Any, state_dict_type: Any, async_: Any) -> _Asked:
    """What this rank asks; raises what is wrong with the arguments."""
    _check(path, state, filter, state_dict_type)
    places = [str(place) for place, _ in stateful_objects(dict(state), Place())]
    earlier_error = None if failed is None else str(failed.error)
    return _Asked(state_dict_type, bool(async_), places, earlier_error, failed is not None and failed.is_known)


def _raise_earlier_error(failed: SaveHandle | None, asked: list[_Asked]) -> None:
    """Raise on every rank what went wrong in the asynchronous save before, unless one of them was told."""
    errors = [other.earlier_error for other in asked if other.earlier_error is not None]
    if failed is not None:
        failed.is_known = True
    if errors and not any(other.was_told for other in asked):
        raise CheckpointError(
            "An asynchronous save before this one failed, so this one was not begun.",
            given=errors[0] if failed is None else failed.error,
            fix="see to its cause and save again; handle.result() tells it where it belongs",
        ) from (None if failed is None else failed.error)


def _compare_calls(asked: list[_Asked]) -> None:
    mine = asked[rank()]
    if any((other.kind, other.is_async) != (mine.kind, mine.is_async) for other in asked):
        raise CheckpointError(
            "The ranks ask save() for different kinds of checkpoint.",
            given=f"state_dict_type={mine.kind!r}, async_={mine.is_async} on rank {rank()}",
            fix="the same state_dict_type and async_ on every rank",
        )
    _compare_places([other.places for other in asked], "save()")


def _check(path: Any, state: Any, filter: Any, state_dict_type: Any) -> None:
    if state_dict_type not in _KINDS:
        raise FabricValueError(
            "This kind of checkpoint does not exist.",
            given=f"state_dict_type={state_dict_type!r:.80}",
            fix='"full" for one file, or "sharded" for a folder',
        )
    if not isinstance(state, Mapping):
        raise FabricTypeError(
            "save() takes a dict, so that each part has a name.",
            given=type(state).__name__,
            fix='save(path, {"model": model})',
        )
    if filter is not None and not isinstance(filter, Mapping):
        raise FabricTypeError(
            "filter is a dict of functions.",
            given=type(filter).__name__,
            fix='filter={"model": lambda key, value: "head" not in key}',
        )
    for key, function in (filter or {}).items():
        if not callable(function):
            raise FabricTypeError(
                f"filter[{key!r}] can't be called.",
                given=type(function).__name__,
                fix="a function of key and value that says whether to write it",
            )
        if key not in state:
            raise FabricValueError(
                "filter names a key that the state has not.",
                given=repr(key),
                fix=f"one of {', '.join(map(repr, state))}",
            )
    checked_path(path)


def _states_of_objects(state: dict[str, Any]) -> tuple[dict[int, Any], Exception | None]:
    """By ``id`` of the object, its state as plain data; and the first error, if any.

    After an error the others are asked all the same: they may communicate, and the other ranks ask them too.
    """
    states: dict[int, Any] = {}
    error: Exception | None = None
    for place, instance in stateful_objects(state, Place()):
        states[id(instance)], failure = _state_or_error(instance, place)
        error = error or failure
    return states, error


def _state_or_error(instance: Any, place: Place) -> tuple[Any, Exception | None]:
    try:
        return _plain_state(instance, place), None
    except Exception as error:
        return None, error


def _collect(
    state: dict[str, Any],
    states: dict[int, Any],
    filter: Filter,
    content: dict[str, Any],
    sharded: dict[str, Any],
) -> Exception | None:
    """Fill ``content`` with ``state`` as plain data and ``sharded`` with the DTensors in it; the error, if any."""
    try:
        content |= _filtered(plain(state, Place(), lambda _, instance: states[id(instance)]), filter)
        _find_sharded(content, Place(), sharded)
    except Exception as error:
        return error
    return None


def _find_sharded(content: Any, place: Place, found: dict[str, Any]) -> None:
    """Add the DTensors in plain data by their places; places of other values are not made, since the training waits."""
    for key, item in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(item, (dict, list, tuple)):
            _find_sharded(item, place.at(key), found)
        elif isinstance(item, torch.Tensor) and is_sharded(item):
            found[str(place.at(key))] = item


def _plain_state(instance: Any, place: Place) -> Any:
    def refuse(inner: Place, found: Any) -> NoReturn:
        raise FabricTypeError(
            f"{inner} is an object in the state of another: a {type(found).__name__}.",
            fix=f"found.state_dict() instead, in state_dict() of {type(instance).__name__}",
        )

    return plain(state_of(instance), place, refuse)


def _filtered(content: dict[str, Any], filter: Filter) -> dict[str, Any]:
    for name, chosen in filter.items():
        if isinstance(content[name], dict):
            for key in [key for key, value in content[name].items() if not chosen(key, value)]:
                del content[name][key]
    return content
