"""Checkpoints as a callback."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fabric_lite.callbacks.monitoring import check_mode, monitored
from fabric_lite.checkpoints import Checkpoints
from fabric_lite.errors import FabricTypeError, FabricValueError, unknown_arguments

__all__ = ["ModelCheckpoint"]


# What Lightning's has.
_INSTEAD = {
    "dirpath": "folder",
    "filename": "leave it out, a checkpoint is called by its step",
    "every_n_train_steps": "every_n_steps",
    "every_n_epochs": "leave it out, or every_n_steps",
    "save_on_train_epoch_end": "check_on_train_epoch_end",
}


class ModelCheckpoint:
    """Saves after validations, epochs or steps, keeps the best and the last, and resumes. ::

        checkpoint = ModelCheckpoint("runs/a", monitor="val_loss", save_top_k=3)
        fabric = Fabric(callbacks=checkpoint)
        fabric.call("on_train_start", state=state)  # resumes from the newest checkpoint, if there is one
        ...
            fabric.call("on_train_batch_end", state=state)  # after each step: saves when the run is asked to leave
        ...
        fabric.call("on_validation_end", state=state, metrics={"val_loss": loss})

    What is saved, and how, is as for :class:`fabric_lite.Checkpoints`, on which it stands (:attr:`checkpoints`). Every
    rank calls each hook. Give it last: what other callbacks know is saved as they know it when its turn comes.

    Args:
        folder: Of this run alone.
        monitor: The metric that tells the best. None: the newest are the best.
        mode: Whether the best is the ``"min"`` or the ``"max"``.
        save_top_k: How many of the best to keep; -1: all; 0: none.
        save_last: Whether to keep the newest besides, from which a run that was killed goes on with the least loss.
        every_n_steps: Save after each so many steps: besides validations, and instead of after epochs.
        check_on_train_epoch_end: Whether a watched metric is looked at, and saved with, after epochs instead of after
            validations.
        async_: Whether saves are written beside the loop.
        others: There are none; names of Lightning's arguments are told what they are called here.

    Raises:
        FabricTypeError: There is no such argument, or no folder.
        FabricValueError: A value is not allowed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        monitor: str | None = None,
        mode: str = "min",
        save_top_k: int = 1,
        save_last: bool = True,
        every_n_steps: int | None = None,
        async_: bool = False,
        check_on_train_epoch_end: bool = False,
        **others: Any,
    ) -> None:
        if others:
            raise unknown_arguments("ModelCheckpoint", others, inspect.signature(ModelCheckpoint).parameters, _INSTEAD)
        if folder is None:
            raise FabricTypeError(
                "A ModelCheckpoint has a folder of its own.", given="none", fix='ModelCheckpoint("runs/a/checkpoints")'
            )
        check_mode(mode)
        if not isinstance(save_last, bool):
            raise FabricValueError("The newest is kept, or it is not.", given=f"{save_last=}", fix="save_last=True")
        if save_top_k < -1 or (save_top_k == 0 and not save_last):
            raise FabricValueError(
                "A ModelCheckpoint keeps at least one checkpoint.",
                given=f"save_top_k={save_top_k}, save_last={save_last}",
                fix="save_top_k=1, or -1 for all",
            )
        by_value = monitor is not None
        last = int(save_last) if by_value else max(save_top_k, int(save_last))
        self.monitor, self.mode = monitor, mode
        self.waits_for_validation = by_value and not check_on_train_epoch_end
        self._saves_after_epochs = check_on_train_epoch_end if by_value else every_n_steps is None
        self.checkpoints = Checkpoints(
            folder,
            every=every_n_steps,
            keep_last=None if save_top_k == -1 else last,
            keep_best=max(save_top_k, 0) if by_value else 0,
            monitor=monitor,
            mode=mode,
            async_=async_,
        )

    def on_train_start(self, *, state: dict[str, Any] | None = None) -> None:
        """Restore ``state`` from the newest checkpoint, if there is one; nothing without a state."""
        if state is not None:
            self.checkpoints.resume(state)

    def on_train_batch_end(self, *, state: Mapping[str, Any], metrics: Mapping[str, Any] | None = None) -> None:
        """Save after every n-th step, and when the run is asked to leave, which ends the process."""
        self.checkpoints.step(state, metrics)

    def on_validation_end(
        self, *, state: Mapping[str, Any], metrics: Mapping[str, Any] | None = None, is_fitting: bool = True
    ) -> None:
        """Save with these metrics after a validation of a training, if one is watched and not after epochs."""
        if self.waits_for_validation and is_fitting:
            self._save(state, metrics)

    def on_train_epoch_end(self, *, state: Mapping[str, Any], metrics: Mapping[str, Any] | None = None) -> None:
        """Save, if no metric of validations is watched and no number of steps was given."""
        if self._saves_after_epochs:
            self._save(state, metrics)

    def _save(self, state: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> None:
        if self.monitor is not None:
            monitored(metrics or {}, self.monitor)  # raises, on all ranks, where it is missing
        self.checkpoints.save(state, metrics)

    @property
    def best_model_path(self) -> Path | None:
        """The best checkpoint that is whole, which is read for that: by its value, or the newest if none is watched."""
        return self.checkpoints.latest() if self.monitor is None else self.checkpoints.best()

    @property
    def best_model_score(self) -> float | None:
        """The value of the best checkpoint; none of it is read for that."""
        ranked = self.checkpoints.ranked()
        return None if self.monitor is None or not ranked else ranked[0].metrics[self.monitor]

    @property
    def last_model_path(self) -> Path | None:
        """The newest checkpoint that is whole."""
        return self.checkpoints.latest()
