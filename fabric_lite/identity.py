"""Who and where a process is in its run: what every Fabric can be asked from its constructor on."""

from __future__ import annotations

import datetime
from typing import Any

import torch

from fabric_lite.checkpoint.archive_writing import own_version
from fabric_lite.device import Accelerator
from fabric_lite.errors import FabricRuntimeError
from fabric_lite.precision import Precision
from fabric_lite.run import Run
from fabric_lite.run_record import record_of
from fabric_lite.strategies import Placement, Strategy

__all__ = ["Identity"]


class Identity:
    """The read-only properties of a Fabric, and whether it can be used."""

    _run: Run
    _loggers: list[Any]
    _arguments: dict[str, Any]
    _started: datetime.datetime
    _placement: Placement | None
    _is_closed: bool

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self._run.device

    @property
    def global_rank(self) -> int:
        """0 to world_size - 1."""
        return self._run.topology.rank

    @property
    def local_rank(self) -> int:
        """The rank among the processes of this node."""
        return self._run.topology.local_rank

    @property
    def node_rank(self) -> int:
        """Which node this is."""
        return self._run.topology.node_rank

    @property
    def world_size(self) -> int:
        """The number of processes over all nodes."""
        return self._run.topology.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return self.global_rank == 0

    @property
    def strategy(self) -> Strategy:
        """The layout of models over the ranks."""
        return self._run.strategy

    @property
    def precision(self) -> Precision:
        """The dtypes of this run."""
        return self._run.precision

    @property
    def accelerator(self) -> Accelerator:
        """The kind of device."""
        return self._run.accelerator

    def run_record(self) -> dict[str, Any]:
        """What this run is, as plain data: command, arguments, seed, versions, git revision, hardware, strategy.

        It goes to the loggers before the first metrics, and into ``run.json`` beside the checkpoints of
        :class:`fabric_lite.Checkpoints`.
        """
        return record_of(self._run, self._arguments, own_version() or "unknown", self._started)

    @property
    def loggers(self) -> list[Any]:
        """All loggers."""
        return self._loggers

    @property
    def logger(self) -> Any:
        """The first logger, or None."""
        return self._loggers[0] if self._loggers else None

    def _launched(self) -> Placement:
        if self._is_closed:
            raise FabricRuntimeError(
                "This Fabric is closed.",
                given="a call after fabric.close()",
                fix="make a new Fabric, or close it later",
            )
        if self._placement is None:
            raise FabricRuntimeError(
                f"This run has {self.world_size} processes, and they are not started yet.",
                given=f"devices={self._arguments['devices']!r} in a script started with python",
                fix="fabric.launch() right after Fabric(...), or fabric-run --devices N script.py",
            )
        return self._placement
