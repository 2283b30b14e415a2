"""``load`` and ``load_raw``: everything is checked first, then all objects change or none does."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from fabric_lite.checkpoint.formats import StoredCheckpoint, opened
from fabric_lite.checkpoint.layout import is_sharded
from fabric_lite.checkpoint.placing import check_memory, check_part, copy_into, laid_out_like
from fabric_lite.checkpoint.plain import Place, is_stateful, stateful_objects, values_where
from fabric_lite.checkpoint.restore import LAST, Restore, prepare
from fabric_lite.checkpoint.restore_optimizer import parameter_names
from fabric_lite.checkpoint.saving import checked_path, compare_objects
from fabric_lite.checkpoint.stored import StoredTensor, is_tensor, materialized
from fabric_lite.checkpoint.together import on_every_rank
from fabric_lite.checkpoint.way_back import WayBack, mixed
from fabric_lite.collectives import rank, world_size
from fabric_lite.errors import CheckpointError, FabricKeyError, FabricTypeError, FabricValueError
from fabric_lite.notices import says_that_it_waits

__all__ = ["load", "load_raw"]


def load(
    path: str | os.PathLike[str],
    state: dict[str, Any] | None = None,
    *,
    strict: bool = True,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Put what a checkpoint holds back into ``state``, and return the rest.

    Every rank calls it, with the same objects. Objects are restored in place: parameters keep their memory, their
    dtype (the saved values are cast) and their layout over the ranks, whichever they were saved under; so does an
    ``nn.Parameter`` that ``state`` itself holds. Plain values are replaced in ``state``, plain tensors among them, in
    nested dicts too. Modules are restored last, the others in order. When it
    raises, it raises on every rank, and objects and ``state`` are as they were.

    A rank reads what it keeps: of a sharded tensor its own part, straight into a parameter's memory. Only what is
    returned, and the states of objects that are neither plain modules nor optimizers, is whole on every rank.

    Args:
        path: A file or folder of :func:`save`, a file of plain ``torch.save`` or of Lightning Fabric, a
            ``.safetensors`` file, or a folder of ``torch.distributed.checkpoint``, also as Lightning Fabric writes it.
            Or what :func:`save` wrote into a store, of which each rank then fetches a copy.
        state: What to restore. None returns everything.
        strict: Whether the checkpoint must have all that ``state`` asks for, and modules all that it has. If not,
            what fits is loaded; a tensor of another shape is passed over with a warning.
        weights_only: None and True: no code of the checkpoint runs. False: any code of a ``torch.save`` file does;
            only for files that you trust, and for no other kind of checkpoint.

    Returns:
        The content under keys that ``state`` has not.

    Raises:
        FabricKeyError: Something is missing under ``strict``.
        FabricTypeError: ``state`` is not a dict.
        FabricValueError: A shape or the number of parameters differs.
        CheckpointNotFoundError: There is nothing of this name.
        CheckpointError: The checkpoint is damaged, unfinished or unsafe, an object refused its state, or another rank
            failed.
    """
    if state is not None and not isinstance(state, dict):
        raise FabricTypeError(
            "load() takes a dict of what to restore.",
            given=type(state).__name__,
            fix='load(path, {"model": model}), or load_raw(path, model) for a file with a bare state dict',
        )
    saved = _read("load()", path, weights_only)
    if not isinstance(saved, dict):
        raise CheckpointError(
            "This file does not hold a dict.", given=f"{path}: {type(saved).__name__}", fix="load_raw(path, object)"
        )
    if state is None:
        return on_every_rank("load()", materialized, saved)
    compare_objects(list(stateful_objects(state, Place())), "load()")
    match = _Match(strict)
    remainder = on_every_rank("load()", match.top, state, saved)
    _restore(match.objects, strict, match)
    return remainder


def load_raw(path: str | os.PathLike[str], obj: Any, *, strict: bool = True) -> None:
    """Put one bare state dict back into a module, an optimizer or any object with ``load_state_dict``.

    Every rank calls it. ``path`` may be whatever :func:`load` takes; no code of it runs. Raises what :func:`load`
    raises, and leaves ``obj`` as it was then.
    """
    if not is_stateful(obj):
        raise FabricTypeError(
            "load_raw() takes an object with state_dict and load_state_dict.",
            given=type(obj).__name__,
            fix="load(path, state) for a dict of several",
        )
    saved = _read("load_raw()", path, None)
    _restore([(Place(), obj, saved)], strict)


def _read(call: str, path: Any, weights_only: bool | None) -> Any:
    # The ranks meet before they read: one whose disk is slow is no rank that does not call.
    with says_that_it_waits(f"fabric.{call}"):
        file = on_every_rank(call, checked_path, path)
    checkpoint: StoredCheckpoint = on_every_rank(call, opened, file, weights_only)
    on_every_rank(call, checkpoint.verify, (rank(), world_size()))
    return on_every_rank(call, checkpoint.content)


def _restore(objects: list[tuple[Place, Any, Any]], strict: bool, match: _Match | None = None) -> None:
    """Restore all objects and assign all values, or none. Every rank calls it."""
    names = parameter_names([obj for _, obj, _ in objects])
    prepared = [
        on_every_rank(f"loading {place}", prepare, place, obj, saved, strict, names) for place, obj, saved in objects
    ]
    if match is not None:
        prepared.append(Restore(Place(), LAST, match.assign, match.take_back, match.overwritten))
    begun: list[tuple[Restore, list[tuple[torch.Tensor, Any]] | None]] = []
    with WayBack([tensor for restore in prepared for tensor in restore.overwritten]) as way_back:
        try:
            for restore in sorted(prepared, key=lambda restore: restore.turn):
                on_every_rank(f"loading {restore.place}", _begin, restore, way_back, begun)
        except Exception as error:
            broken = [str(earlier.place) for earlier, old in reversed(begun) if not _undone(earlier, old)]
            if broken:
                raise mixed(broken, error) from error
            raise


def _begin(
    restore: Restore, way_back: WayBack, begun: list[tuple[Restore, list[tuple[torch.Tensor, Any]] | None]]
) -> None:
    """Keep what an object has, and load it."""
    begun.append((restore, way_back.kept(restore.overwritten)))
    restore.apply()


def _undone(restore: Restore, old: list[tuple[torch.Tensor, Any]] | None) -> bool:
    """Whether the object is as it was before; what went wrong is already being raised."""
    try:
        if old is not None:
            WayBack.put_back(old)
        restore.undo()
    except Exception:
        return False
    return old is not None


def _kept(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    """What is restored in place inside ``value``, with its place."""
    return values_where(lambda leaf: is_stateful(leaf) or isinstance(leaf, torch.nn.Parameter), value, place)


def _laid_out(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    """What is restored in place inside ``value``, or as it is laid out, with its place."""
    return values_where(
        lambda leaf: is_stateful(leaf) or isinstance(leaf, torch.nn.Parameter) or is_sharded(leaf), value, place
    )


@dataclasses.dataclass
class _Match:
    """What of a file goes where in the user's state; nothing is changed before all of it is known.

    Args:
        strict: Whether a missing key is an error.
        objects: Place, object and saved state, in order.
        assignments: Calls that put plain values into the user's containers, and return a call that takes it back.
        overwritten: The parameters in these containers, whose memory the assignments fill.
        missing: Places that the file has not.
        memo: Keeps memory that is shared in the file shared in the copies.
    """

    strict: bool
    objects: list[tuple[Place, Any, Any]] = dataclasses.field(default_factory=list)
    assignments: list[Callable[[], Callable[[], Any]]] = dataclasses.field(default_factory=list)
    overwritten: list[torch.nn.Parameter] = dataclasses.field(default_factory=list)
    missing: list[Place] = dataclasses.field(default_factory=list)
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict)
    _assigned: list[Callable[[], Any]] = dataclasses.field(default_factory=list)

    def top(self, state: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        """Match all of ``state``, and return what of ``saved`` it has no key for."""
        remainder = self._entries(state, saved, Place())
        remainder.update({key: self._own(value) for key, value in saved.items() if key not in state})
        if self.missing and self.strict:
            raise FabricKeyError(
                f"The file does not have {', '.join(map(str, self.missing))}.",
                given=f"its keys are {', '.join(map(repr, saved))}",
                fix="take it out of the state, or strict=False",
            )
        return remainder

    def assign(self) -> None:
        """Put the values into the user's containers, and into the parameters that these hold."""
        for assignment in self.assignments:
            self._assigned.append(assignment())

    def take_back(self) -> None:
        """Give the containers what they had before :meth:`assign`, whether or not it came to its end."""
        while self._assigned:
            self._assigned.pop()()

    def _entries(self, current: dict[Any, Any], saved: dict[Any, Any], place: Place) -> dict[Any, Any]:
        remainder = {}
        for key, value in current.items():
            if key not in saved:
                self.missing.append(place.at(key))
                continue
            new, rest = self._value(value, saved[key], place.at(key))
            if new is not value:
                self.assignments.append(functools.partial(_updated, current, {key: new}))
            if rest:
                remainder[key] = rest
        return remainder

    def _value(self, current: Any, saved: Any, place: Place) -> tuple[Any, dict[Any, Any]]:
        """What to put in the place of ``current`` (itself, if it changes in place), and what is left of ``saved``."""
        if is_stateful(current):
            self.objects.append((place, current, saved))
            return current, {}
        if isinstance(current, dict) and isinstance(saved, dict):
            return current, self._dict(current, saved, place)
        if isinstance(current, torch.nn.Parameter):
            self._parameter(current, saved, place)
            return current, {}
        if isinstance(current, (list, tuple)) and next(_laid_out(current, place), None) is not None:
            return self._sequence(current, saved, place), {}
        if isinstance(current, torch.Tensor) and is_tensor(saved):
            return self._laid_out(saved, current), {}
        self._refuse_if_objects(current, saved, place)
        return self._own(saved), {}

    def _laid_out(self, saved: Any, current: torch.Tensor) -> torch.Tensor:
        if not is_sharded(current):
            return cast(torch.Tensor, self._own(saved).to(current.device))
        return laid_out_like(saved if isinstance(saved, StoredTensor) else self._own(saved), current)

    def _parameter(self, current: torch.nn.Parameter, saved: Any, place: Place) -> None:
        """An optimizer and the user's own variables hold this very parameter: it changes in place."""
        if is_tensor(saved) and torch.nn.parameter.is_lazy(current):
            self.assignments.append(functools.partial(_materialized, current, saved.shape))
        elif not is_tensor(saved) or saved.shape != current.shape:
            found = f"shape {tuple(saved.shape)}" if is_tensor(saved) else f"no tensor ({saved!r:.80})"
            what = f"{place} has {found} in the file and shape {tuple(current.shape)} here."
            if self.strict:
                raise FabricValueError(what, fix="the parameter as it was saved, or strict=False to pass over it")
            if rank() == 0:
                warnings.warn(f"Not loaded: {what}", stacklevel=2)
            return
        else:
            check_memory(current, place)
            if isinstance(saved, StoredTensor):
                check_part(current, saved)
        if not torch.nn.parameter.is_lazy(current):
            self.overwritten.append(current)
        self.assignments.append(functools.partial(_filled, current, saved))

    def _dict(self, current: dict[Any, Any], saved: dict[Any, Any], place: Place) -> dict[Any, Any]:
        remainder = self._entries(current, saved, place)
        unasked = {key: self._own(value) for key, value in saved.items() if key not in current}
        if next(_kept(current, place), None) is None:
            # Plain data (a history, say) takes on all that the file has.
            self.assignments.append(functools.partial(_updated, current, unasked))
            return remainder
        return remainder | unasked

    def _sequence(self, current: Any, saved: Any, place: Place) -> Any:
        if not isinstance(saved, (list, tuple)) or len(saved) != len(current):
            found = f"{len(saved)} entries" if isinstance(saved, (list, tuple)) else f"a {type(saved).__name__}"
            raise CheckpointError(
                f"{place} has {len(current)} entries, some of them objects, and the file has {found}.",
                fix="the same number of objects as when it was saved",
            )
        pairs = enumerate(zip(current, saved, strict=True))
        new = [self._value(old, value, place.at(index))[0] for index, (old, value) in pairs]
        if all(item is old for item, old in zip(new, current, strict=True)):
            return current
        if isinstance(current, list):
            self.assignments.append(functools.partial(_replaced, current, new))
            return current
        return tuple(new)

    def _refuse_if_objects(self, current: Any, saved: Any, place: Place) -> None:
        first = next(_kept(current, place), None)
        if first is not None:
            raise CheckpointError(
                f"{place} holds objects, and the file has a {type(saved).__name__} there.",
                given=f"{first[0]} is a {type(first[1]).__name__}",
                fix="the state with the shape that was saved",
            )

    def _own(self, value: Any) -> Any:
        """A copy in memory: what was read is still in the file, or mapped from it."""
        return materialized(value, self.memo)


def _updated(current: dict[Any, Any], new: dict[Any, Any]) -> Callable[[], Any]:
    """Put values into a dict; return what takes them out again."""
    before = {key: current[key] for key in new if key in current}

    def take_back() -> None:
        for key in new:
            if key in before:
                current[key] = before[key]
            else:
                current.pop(key, None)

    current.update(new)
    return take_back


def _replaced(current: list[Any], new: list[Any]) -> Callable[[], Any]:
    before = list(current)
    current[:] = new
    return lambda: _replaced(current, before)


def _filled(current: torch.nn.Parameter, saved: Any) -> Callable[[], Any]:
    """Fill a parameter, whose old values are kept elsewhere."""
    copy_into(current, saved)
    return lambda: None


def _materialized(current: Any, shape: torch.Size) -> Callable[[], Any]:
    """Give a lazy parameter its memory; it does not become lazy again."""
    current.materialize(shape)
    return lambda: None
