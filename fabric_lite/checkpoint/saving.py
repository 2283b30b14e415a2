"""``save``: state -> plain values -> one file, on all ranks or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from fabric_lite.checkpoint.archive import write_archive
from fabric_lite.checkpoint.commit import committed_file
from fabric_lite.checkpoint.layout import full_tensors, is_sharded
from fabric_lite.checkpoint.packing import packed
from fabric_lite.checkpoint.plain import Place, plain, stateful_objects, tensors_in
from fabric_lite.collectives import gather_objects, raise_together, rank
from fabric_lite.errors import CheckpointError, FabricTypeError, FabricValueError
from fabric_lite.notices import says_that_it_waits
from fabric_lite.trees import map_leaves

__all__ = ["checked_path", "compare_objects", "on_every_rank", "own_keys", "save", "state_of", "uncompiled"]

_COMPILED = "_orig_mod."

Result = TypeVar("Result")
Filter = Mapping[str, Callable[[str, Any], bool]]


def save(path: str | os.PathLike[str], state: Mapping[str, Any], *, filter: Filter | None = None) -> None:
    """Write ``state`` into one file that plain ``torch.load(path, weights_only=True)`` reads.

    Every rank calls it, with the same objects; rank 0 writes, and its plain values are the ones in the file. When it
    returns, the file is on the disk. When it raises, it raises on every rank, and an earlier file is as it was.

    Args:
        path: A local file. Folders above it are created; an earlier file of this name is replaced at once.
        state: A dict of any nesting of modules, optimizers, schedulers, loaders, the fabric, any object with
            ``state_dict`` and ``load_state_dict``, tensors and plain values. Sharded tensors are written in full.
        filter: For some of the top keys a function ``(key, value) -> bool`` that chooses what is written of them;
            every rank must choose the same.

    Raises:
        FabricTypeError: Something could only be read back by running code, or an argument has the wrong type.
        FabricValueError: ``filter`` names a key that ``state`` has not.
        CheckpointError: The file could not be written, or another rank failed.
    """
    with says_that_it_waits("fabric.save()"):
        target = on_every_rank("save()", _checked, path, state, filter)
    state = dict(state)
    compare_objects(list(stateful_objects(state, Place())), "save()")
    content = on_every_rank("save()", _filtered, _collected(state), filter or {})
    sharded = {str(place): tensor for place, tensor in tensors_in(content, Place()) if is_sharded(tensor)}
    full = on_every_rank("save()", full_tensors, sharded)
    on_every_rank("save()", _write, target, content, full)


def on_every_rank(what: str, function: Callable[..., Result], *args: Any) -> Result:
    """Call ``function`` and raise on every rank if it raised on any. Every rank calls it."""
    error: Exception | None = None
    try:
        result = function(*args)
    except Exception as exception:
        error = exception
    raise_together(error, what, CheckpointError)
    return result


def checked_path(path: Any) -> Path:
    """Return ``path`` as a Path; FabricTypeError if it is none, FabricValueError if it is not local."""
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise FabricTypeError("A checkpoint's path is a string or a Path.", given=f"{type(path).__name__} {path!r:.80}")
    if "://" in str(path):
        raise FabricValueError("Checkpoints are written to local paths.", given=path, fix="a mounted folder")
    return Path(path)


def compare_objects(objects: list[tuple[Place, Any]], what: str) -> None:
    """Raise CheckpointError on every rank if the ranks hold objects at different places. Every rank calls it."""
    mine = [str(place) for place, _ in objects]
    for number, other in enumerate(gather_objects(mine)):
        if other != mine:
            places = sorted(set(other) ^ set(mine))
            raise CheckpointError(
                f"The ranks call {what} with different objects.",
                given=f"rank {rank()} and rank {number} differ in {', '.join(places) or 'their order'}",
                fix="the same keys in the same order on every rank",
            )


def state_of(instance: Any) -> Any:
    """The object's ``state_dict()``, a module's with the keys it would have uncompiled."""
    state = uncompiled(instance).state_dict()
    return own_keys(state) if isinstance(instance, torch.nn.Module) else state


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


def _checked(path: Any, state: Any, filter: Any) -> Path:
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
    return checked_path(path)


def _collected(state: dict[str, Any]) -> dict[str, Any]:
    """``state`` as plain data. Objects give their states one after the other, the same one on all ranks at a time."""
    given: dict[int, Any] = {}
    for place, instance in stateful_objects(state, Place()):
        given[id(instance)] = on_every_rank(f"{place}.state_dict()", _plain_state, instance, place)
    return on_every_rank("save()", plain, state, Place(), lambda _, instance: given[id(instance)])


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


def _write(target: Path, content: dict[str, Any], full: Mapping[str, torch.Tensor | None]) -> None:
    if rank() != 0:
        return
    if full:
        content = _with_full_tensors(content, full)
    written = packed([tensor for _, tensor in tensors_in(content, Place())])
    content = map_leaves(lambda leaf: written[id(leaf)] if isinstance(leaf, torch.Tensor) else leaf, content)
    try:
        with committed_file(target) as file:
            write_archive(file, content)
    except (OSError, RuntimeError) as error:  # torch.save has both for a disk that is full
        if isinstance(error, CheckpointError):
            raise
        cause = _cause(error)
        raise CheckpointError(
            "The checkpoint could not be written; what was there before is as it was.",
            given=f"{target}: {type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause) else ''}",
            fix="a folder that can be written to, on a disk with room for a second copy",
        ) from error


def _cause(error: BaseException) -> BaseException:
    """The system's word behind an error: torch.save hides a full disk under "unexpected pos 704 vs 598"."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__context__
    return link or error


def _with_full_tensors(content: dict[str, Any], full: Mapping[str, torch.Tensor | None]) -> dict[str, Any]:
    by_identity = {id(tensor): full[str(place)] for place, tensor in tensors_in(content, Place()) if str(place) in full}
    return map_leaves(lambda leaf: by_identity.get(id(leaf), leaf) if isinstance(leaf, torch.Tensor) else leaf, content)
