"""Stopping at a batch that the loss jumps at, on all ranks, and noting which it was."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fabric_lite.callbacks.monitoring import check_mode
from fabric_lite.checkpoint.together import on_every_rank
from fabric_lite.collectives import broadcast_object, rank
from fabric_lite.errors import FabricRuntimeError, FabricValueError
from fabric_lite.whole_file import write_whole

__all__ = ["SpikeDetection", "TrainingSpikeError"]


class TrainingSpikeError(FabricRuntimeError):
    """The loss has jumped at a batch."""


class SpikeDetection:
    """Raises on all ranks when the loss of any jumps: in the wrong direction, far from the mean of the last ones. ::

        spikes = SpikeDetection(rtol=2.0, exclude_batches_path="runs/a/skip.json")
        fabric = Fabric(callbacks=spikes)
        for number, batch in enumerate(loader):
            loss = ...
            fabric.call("on_train_batch_end", fabric=fabric, loss=loss, batch_idx=number)

    Numbers of such batches go to a file. Started again from a checkpoint, the run can leave them out:
    ``if spikes.excludes(number): continue``, on all ranks alike. The last losses, of rank 0 for all ranks, and the
    numbers are saved and restored with the fabric. Each batch costs a reduction of one number over the ranks, and the
    loss is fetched from the device.

    Args:
        mode: Which direction of the loss is good: ``"min"`` or ``"max"``.
        window: Over how many losses the mean is.
        warmup: How many batches to take in before the first can be a spike.
        atol: How far from the mean a spike is, at least; None: any distance.
        rtol: And how far from it in units of the mean.
        exclude_batches_path: A JSON file with the numbers of the batches, on rank 0's disk. None: no file.
        finite_only: Whether a loss that is NaN or infinite is a spike whatever else is said.

    Raises:
        FabricValueError: A value is not allowed.
    """

    def __init__(
        self,
        mode: str = "min",
        window: int = 10,
        warmup: int = 1,
        atol: float | None = None,
        rtol: float | None = 2.0,
        exclude_batches_path: str | os.PathLike[str] | None = None,
        finite_only: bool = True,
    ) -> None:
        check_mode(mode)
        for name, value in (("window", window), ("warmup", warmup)):
            if value < 1:
                raise FabricValueError(f"{name} is 1 at least.", given=f"{name}={value}", fix=f"{name}=1")
        self.mode, self.warmup, self.atol, self.rtol = mode, warmup, atol, rtol
        self.finite_only = finite_only
        self.excluded: set[int] = set()
        self._losses: deque[float] = deque(maxlen=window)
        self._seen = 0
        self._path = None if exclude_batches_path is None else Path(exclude_batches_path)
        self._has_read = False

    def excludes(self, batch_idx: int) -> bool:
        """Whether the loss has jumped at this batch in an earlier attempt; every rank calls.

        Raises:
            CheckpointError: The file could not be read on rank 0; there its own error.
        """
        self._read()
        return batch_idx in self.excluded

    def on_train_batch_end(self, *, fabric: Any, loss: Any, batch_idx: int) -> None:
        """Look at the loss of a batch; every rank calls.

        Raises:
            TrainingSpikeError: It is a spike on some rank; on all of them.
        """
        if loss is None:  # of a batch that was passed over, on all ranks
            return
        self._read()
        value = float(loss)
        is_spike = self._is_spike(value)
        if bool(fabric.all_reduce(torch.tensor(is_spike, dtype=torch.uint8), reduce_op="max")):
            self.excluded.add(batch_idx)
            on_every_rank("SpikeDetection", lambda: self._note() if fabric.is_global_zero else None)
            raise TrainingSpikeError(
                "The loss has jumped at a batch.",
                given=f"batch {batch_idx}, loss {value:.4g} on rank {fabric.global_rank}, before it {self._mean():.4g}",
                fix="go on from the checkpoint before it, without the batches in SpikeDetection.excluded",
            )
        self._seen += 1
        if math.isfinite(value):  # else it would be the mean for a while, and hide what comes
            self._losses.append(value)

    def state_dict(self) -> dict[str, Any]:
        """The last losses, how many there were, and which batches to leave out."""
        return {"losses": list(self._losses), "seen": self._seen, "excluded": sorted(self.excluded)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; batches that were noted since stay noted."""
        self._losses.clear()
        self._losses.extend(state["losses"])
        self._seen = state["seen"]
        self.excluded |= set(state["excluded"])

    def _is_spike(self, value: float) -> bool:
        if not math.isfinite(value):
            return self.finite_only
        if self._seen < self.warmup or not self._losses:
            return False
        mean = self._mean()
        if (value < mean) == (self.mode == "min"):
            return False
        distance = abs(value - mean)
        return distance > (self.atol or 0.0) and (self.rtol is None or distance > self.rtol * abs(mean))

    def _mean(self) -> float:
        return sum(self._losses) / len(self._losses) if self._losses else math.nan

    def _read(self) -> None:
        """Take rank 0's file to all ranks, the first time: nodes may have disks of their own."""
        if self._has_read or self._path is None:
            return
        path, self._has_read = self._path, True
        self.excluded |= broadcast_object(
            on_every_rank("SpikeDetection", lambda: _numbers_in(path) if rank() == 0 else None)
        )

    def _note(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(sorted(self.excluded)).encode() + b"\n")


def _numbers_in(path: Path) -> set[int]:
    return set(json.loads(path.read_text())) if path.exists() else set()
