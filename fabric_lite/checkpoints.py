"""``Checkpoints``: a run that saves itself, goes on where it stopped, and leaves when it is asked to."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from fabric_lite.checkpoint.archive import CheckpointNotFoundError
from fabric_lite.checkpoint.asynchronous import SaveHandle, wait_for_last
from fabric_lite.checkpoint.commit import remove
from fabric_lite.checkpoint.formats import checked_content
from fabric_lite.checkpoint.together import Together, on_every_rank
from fabric_lite.checkpointing import Checkpointing
from fabric_lite.collectives import broadcast_object, rank, world_size
from fabric_lite.data import is_extended_loader, place_of
from fabric_lite.errors import CheckpointDamagedError, CheckpointError, FabricTypeError, FabricValueError
from fabric_lite.kept import MARK, Entry, Rule, by_step, own_entries, path_of
from fabric_lite.loggers.scalars import scalars
from fabric_lite.notices import rank_zero_info
from fabric_lite.run_config import EXIT_PREEMPTED, redirected
from fabric_lite.run_record import write_record

__all__ = ["Checkpoints"]

Result = TypeVar("Result")


class _Pending(NamedTuple):
    """The latest save: after how many steps; its handle, if it is written and read back beside the loop; whether it
    stays until the next one whatever the rule says."""

    step: int
    handle: SaveHandle | None
    stays: bool


class Checkpoints:
    """The checkpoints of one run in one folder, ``step-0001200`` and so on. ::

        checkpoints = Checkpoints("runs/a", every=100)
        state = {"fabric": fabric, "model": model, "optimizer": optimizer, "loader": loader, "epoch": 0}
        checkpoints.resume(state)
        while state["epoch"] < epochs:
            for batch in loader:
                ...
                optimizer.step()
                checkpoints.step(state)
            state["epoch"] += 1

    Started again, such a script goes on after the step that its last checkpoint was saved at. Each checkpoint is what
    ``fabric.save`` writes: one file, or a folder where the strategy says so. An older one is deleted only when the new
    one is on the disk and has been read back; what is damaged or not this run's is never deleted.

    Args:
        folder: Where they are; made by the first save. A run has its own.
        every: How many steps lie between two saves of :meth:`step`. None: it saves when the run is asked to leave.
        keep_last: How many of the newest to keep; None: all. The second newest is what a damaged newest one costs
            least with. With ``keep_best`` it may be 0: then what :meth:`step` saves stays until the next save.
        keep_best: How many of the best to keep as well.
        monitor: Which of the ``metrics`` tells the best.
        mode: Whether the best has the ``"min"`` or the ``"max"``. NaN is never the best.
        async_: Whether saves are written, and read back, beside the loop: ``fabric.save(..., async_=True)``. Then
            older ones are deleted at the next save.

    Raises:
        FabricValueError: A value is not allowed.
        FabricTypeError: A value has the wrong type.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int | None = None,
        keep_last: int | None = 2,
        keep_best: int = 0,
        monitor: str | None = None,
        mode: str = "min",
        async_: bool = False,
    ) -> None:
        if not isinstance(folder, (str, os.PathLike)):
            raise FabricTypeError("The folder of Checkpoints is a path.", given=f"{folder!r:.80}", fix='"runs/a"')
        if "://" in str(folder):
            raise FabricValueError(
                "The folder of Checkpoints is a local one.",
                given=folder,
                fix='a folder that all ranks see; a copy for elsewhere with fabric.save("s3://...", state)',
            )
        least_last = 0 if keep_best else 1
        for name, value, least in (
            ("every", every, 1),
            ("keep_best", keep_best, 0),
            ("keep_last", keep_last, least_last),
        ):
            _check_count(name, value, least, may_be_none=name != "keep_best")
        if mode not in ("min", "max"):
            raise FabricValueError("The best value is the least or the greatest.", given=f"mode={mode!r}", fix='"min"')
        if keep_best and monitor is None:
            raise FabricValueError(
                "To keep the best checkpoints, the value that tells them has to be named.",
                given=f"keep_best={keep_best} without monitor",
                fix='monitor="val_loss", and checkpoints.save(state, metrics={"val_loss": loss})',
            )
        self.folder = Path(redirected(folder))
        self._every = every
        self._rule = Rule(keep_last, keep_best, monitor, mode)
        self._async = async_
        self._known: dict[Path, tuple[Any, Entry | None]] = {}
        self._own_steps: set[int] = set()  # what is there by the right of this run, though it may be of later steps
        self._counted: int | None = None  # the steps at the latest step()
        self._saved: int | None = None
        self._pending: _Pending | None = None
        self._has_written_record = False

    def resume(self, state: dict[str, Any]) -> Path | None:
        """Restore ``state`` from the newest checkpoint that is whole, and say so in one line; every rank calls.

        One that is damaged is passed over, on all ranks alike and with a line that names it; not one that could not be
        read, which may be whole. From here on SIGTERM and SIGUSR1 let the run leave at its next :meth:`step`.

        Returns:
            Where it is; None when there is none and the run starts fresh.

        Raises:
            FabricValueError: There is no Fabric in ``state``; only with its random states and steps a run goes on.
            FabricError: The checkpoint is whole, but not of these objects, as ``fabric.load`` says.
            CheckpointError: One could not be read on some rank, or there are some and all are damaged.
            OSError: As for CheckpointError, on the rank that could not even look for it.
        """
        fabric = _fabric_in(state)
        _ = fabric.should_stop
        self._settle()
        found = _of_rank_zero("resume()", lambda: by_step(self.folder))
        damaged: list[str] = []
        for step, path in found.items():
            self._own_steps.add(step)
            try:
                rest = fabric.load(path, state)
            except Exception:  # any: what one rank raises is a CheckpointError on the others
                damage = _damage(path)
                if damage is None:
                    raise
                damaged.append(f"{path}: {damage}")
                rank_zero_info(f"skipped {path}, which is damaged: {damage}")
                continue
            self._counted = self._saved = fabric.steps
            _say(f"resumed from step {step}{_places(state)}{_changes(rest, fabric)}")
            return path
        if damaged:
            raise CheckpointError(
                "There are checkpoints of this run, and none of them can be loaded.",
                given="; ".join(damaged),
                fix="another folder, or delete them to start the run afresh",
            )
        _say("starting fresh")
        return None

    def step(self, state: Mapping[str, Any], metrics: Mapping[str, Any] | None = None) -> None:
        """Save when it is time to; to be called on every rank after ``optimizer.step()``, or once in each micro step.

        When the run was asked to leave (SIGTERM or SIGUSR1 to any rank), it saves after the step that all ranks have
        agreed on, and the process ends.

        Args:
            state: As for :meth:`resume`.
            metrics: As for :meth:`save`; looked at only when it saves.

        Raises:
            SystemExit: With ``EXIT_PREEMPTED``, after the save.
            CheckpointError: As for :meth:`save`; that another run has got further here is seen by the first step.
        """
        fabric = _fabric_in(state)
        steps = fabric.steps
        if steps == self._counted or (steps == 0 and self._counted is None):
            return  # inside a window of accumulation
        if self._counted is None:
            _of_rank_zero("step()", lambda: self._check_place(steps))
        self._counted = steps
        if fabric.should_stop:
            self._leave(fabric, state, metrics)
        if self._every is not None and steps % self._every == 0 and self._saved != steps:
            self._save(fabric, state, metrics, beside=self._async, stays=True)

    def save(self, state: Mapping[str, Any], metrics: Mapping[str, Any] | None = None) -> Path:
        """Save now, named by the steps made so far; every rank calls.

        Args:
            state: What ``fabric.save`` takes, the Fabric among it.
            metrics: Values by name, kept with the checkpoint; rank 0's count.

        Returns:
            Where it is.

        Raises:
            FabricValueError: There is no Fabric in ``state``.
            CheckpointError: It could not be written, and the earlier ones are as they were. Or the folder has
                checkpoints of a run that has got further.
        """
        return self._save(_fabric_in(state), state, metrics, beside=self._async)

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole, all of which is read for that; any rank may ask."""
        return next((path for path in by_step(self.folder).values() if _is_whole(path)), None)

    def best(self) -> Path | None:
        """The checkpoint with the best value that is whole; any rank may ask."""
        ranked = self._rule.ranked(own_entries(self.folder, self._known))
        return next((entry.path for entry in ranked if _is_whole(entry.path)), None)

    def go_on_at(self, steps: int) -> None:
        """What is here until that step is this run's, which was resumed from elsewhere; every rank calls."""
        self._own_steps |= {step for step in by_step(self.folder) if step <= steps}
        self._counted = steps

    def ranked(self) -> list[Entry]:
        """Those that were saved with the monitored value, the best first; any rank may ask."""
        return self._rule.ranked(self.entries())

    def entries(self) -> list[Entry]:
        """All of this run's checkpoints, the newest first, with their steps and metrics; any rank may ask."""
        return own_entries(self.folder, self._known)

    def _leave(self, fabric: Checkpointing, state: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> NoReturn:
        """Save and end the process. What went wrong in an earlier save does not cost this one."""
        errors: list[BaseException] = []
        try:
            self._settle()
        except Exception as error:  # any, as in resume()
            errors.append(error)
        last = wait_for_last()  # the script's own asynchronous save
        if last is not None and not last.is_known:
            last.is_known = True
            errors += [last.error] if last.error is not None else []
        for each in errors:
            rank_zero_info(f"an earlier save failed: {_in_one_line(each)}")
        path = path_of(self.folder, fabric.steps)
        if self._saved != fabric.steps or not _of_rank_zero("step()", path.exists):  # it was not among the best
            self._save(fabric, state, metrics, beside=False, stays=True)
        _say(f"saved {path}; started again, this run goes on from there")
        raise SystemExit(EXIT_PREEMPTED)

    def _save(
        self,
        fabric: Checkpointing,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any] | None,
        *,
        beside: bool,
        stays: bool = False,
    ) -> Path:
        self._settle()
        _ = fabric.should_stop
        step = fabric.steps
        values = _of_rank_zero("save()", lambda: scalars(metrics or {}))
        _of_rank_zero("save()", lambda: self._check_place(step))
        mark = {"step": step, "metrics": values, "world_size": fabric.world_size}
        path = path_of(self.folder, step)
        handle = fabric.save(path, {**state, MARK: mark}, async_=beside)
        self._own_steps.add(step)
        self._saved = step
        if handle is not None:
            handle.then(functools.partial(checked_content, path, (rank(), world_size())))
        self._pending = _Pending(step, handle, stays)
        self._write_record(fabric)
        if not beside:
            self._settle()
        return path

    def _write_record(self, fabric: Checkpointing) -> None:
        """Say beside the first checkpoint of this process what its run is; that it can't be written costs no run."""
        if self._has_written_record or rank() != 0:
            return
        self._has_written_record = True
        try:
            write_record(self.folder, fabric.run_record())
        except (OSError, CheckpointError) as error:
            rank_zero_info(f"what this run is could not be written beside its checkpoints: {error}")

    def _check_place(self, step: int) -> None:
        """Raise if another run has been here and has got further: which of the two is the newest, nobody could tell."""
        others = [other for other in by_step(self.folder) if other >= step and other not in self._own_steps]
        if others:
            raise CheckpointError(
                "This folder has checkpoints of a run that has got further.",
                given=f"{path_of(self.folder, max(others))}, and this run is at step {step}",
                fix="checkpoints.resume(state) before the first step, or another folder",
            )

    def _settle(self) -> None:
        """See the latest save through, and delete what it makes superfluous. Every rank calls it."""
        if self._pending is None:
            return
        (step, handle, stays), self._pending = self._pending, None
        saved, self._saved = self._saved, None
        if handle is not None:
            on_every_rank("save()", handle.result)
        outdated = _of_rank_zero(
            "save()", lambda: self._rule.outdated(own_entries(self.folder, self._known), newest=step)
        )
        if stays:
            outdated = [entry for entry in outdated if entry.step != step]
        if outdated and handle is None:
            share = rank(), world_size()
            on_every_rank("reading the new checkpoint back", checked_content, path_of(self.folder, step), share)
        self._saved = saved
        if rank() == 0:
            for entry in outdated:
                self._delete(entry.path)

    def _delete(self, path: Path) -> None:
        try:
            if not remove(path):
                rank_zero_info(f"{path} is not needed any more and stays: it holds other files than a checkpoint's")
        except OSError as error:
            rank_zero_info(f"{path} is not needed any more and could not be deleted: {error}")


def _check_count(name: str, value: Any, least: int, *, may_be_none: bool) -> None:
    if value is None and may_be_none:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise FabricTypeError(f"{name} is a whole number.", given=f"{name}={value!r:.80}", fix=f"{name}={least}")
    if value < least:
        raise FabricValueError(f"{name} is {least} at least.", given=f"{name}={value}", fix=f"{name}={least}")


def _fabric_in(state: Mapping[str, Any]) -> Checkpointing:
    if not isinstance(state, Mapping):
        raise FabricTypeError(
            "The state of a run is a dict, so that each part has a name.",
            given=type(state).__name__,
            fix='{"fabric": fabric, "model": model, "optimizer": optimizer, "loader": loader}',
        )
    fabric = next((value for value in state.values() if isinstance(value, Checkpointing)), None)
    if fabric is None:
        raise FabricValueError(
            "The Fabric is not in the state; without its steps and random states a run can't go on as it was.",
            given=f"keys {', '.join(map(repr, state))}",
            fix='{"fabric": fabric, ...}',
        )
    if MARK in state:
        raise FabricValueError("Checkpoints has this key for itself.", given=f"state[{MARK!r}]", fix="another key")
    return fabric


def _of_rank_zero(what: str, function: Callable[[], Result]) -> Result:
    """What ``function`` returns on rank 0; what it raises there, raised on every rank. Every rank calls it."""
    result: Result = broadcast_object(on_every_rank(what, lambda: function() if rank() == 0 else None))
    return result


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in one line, on every rank; None if nothing is. Every rank calls it.

    Raises:
        CheckpointError: It could not be read on some rank, which says nothing of what is in it; OSError likewise.
    """

    def damage_of_share() -> str | None:
        try:
            checked_content(path, (rank(), world_size()))
        except CheckpointDamagedError as error:
            return _in_one_line(error)
        return None

    by_rank: list[str | None] = Together().results("resume()", damage_of_share)
    return next((damage for damage in by_rank if damage is not None), None)


def _is_whole(path: Path) -> bool:
    try:
        checked_content(path)
    except (CheckpointDamagedError, CheckpointNotFoundError):  # deleted since it was listed
        return False
    return True


def _in_one_line(error: BaseException) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:2])


def _places(state: Mapping[str, Any]) -> str:
    """Where the loaders go on."""
    loaders = {name: value for name, value in state.items() if is_extended_loader(value)}
    if len(loaders) == 1:
        return f", {place_of(*loaders.values())}"
    return "".join(f"; {name}: {place_of(loader)}" for name, loader in loaders.items())


def _changes(rest: Mapping[str, Any], fabric: Checkpointing) -> str:
    """What is not as it was."""
    mark = rest.get(MARK)
    ranks = mark.get("world_size") if isinstance(mark, Mapping) else None
    if ranks in (None, fabric.world_size):
        return ""
    return f"; saved by {ranks} rank{'s' * (ranks > 1)}, now {fabric.world_size}: random states begin anew"


def _say(line: str) -> None:
    if rank() == 0:
        print(line, flush=True)
