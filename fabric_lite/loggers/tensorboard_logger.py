"""Metrics, images and figures for TensorBoard."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np

from fabric_lite.loggers.logger import check_options, needs, rank_zero_experiment
from fabric_lite.loggers.pictures import PictureLogger
from fabric_lite.loggers.versions import FolderLogger

__all__ = ["TensorBoardLogger"]

# Of SummaryWriter in either package, less what this logger gives itself, and comment=, which has no effect beside it:
# asking the class for them would import all of TensorBoard.
_OPTIONS = ("max_queue", "flush_secs", "filename_suffix")


class TensorBoardLogger(FolderLogger, PictureLogger):
    """Event files in ``root_dir/name/version_0``. Needs ``pip install tensorboard`` (or tensorboardX).

    A run that goes on writes a new file there, which hides what was logged after the step that it goes on at. Of the
    parameters TensorBoard shows those that came before its first metrics.

    Args:
        root_dir: Where it writes.
        name: A folder in it; may be empty.
        version: As for :class:`CSVLogger`.
        prefix: Before every metric's name, with a ``/`` between.
        options: For ``SummaryWriter``: ``max_queue``, ``flush_secs`` and ``filename_suffix``.

    Raises:
        FabricTypeError: It takes no such option.
        FabricImportError: Neither package is installed.
    """

    handles = ("_writer",)

    def __init__(
        self,
        root_dir: str | os.PathLike[str],
        name: str = "fabric_logs",
        version: int | str | None = None,
        prefix: str = "",
        **options: Any,
    ) -> None:
        needs("TensorBoardLogger", "tensorboard", "tensorboardX")
        check_options("TensorBoardLogger", options, _OPTIONS, "SummaryWriter")
        super().__init__(root_dir, name, version, prefix)
        self._options = options
        self._writer: Any = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The ``SummaryWriter``; made at the first use."""
        if self._writer is None:
            resumed_at, self._resumed_at = self._resumed_at, None
            purge = {} if resumed_at is None else {"purge_step": resumed_at + 1}
            self._writer = _tensorboard("writer").SummaryWriter(log_dir=self.log_dir, **purge, **self._options)
        return self._writer

    def write_metrics(self, metrics: dict[str, float], step: int) -> None:
        try:
            for name, value in metrics.items():
                self.experiment.add_scalar(name, value, step)
        except Exception:
            self._writer = None  # one that has failed does so from then on
            raise

    def write_params(self, params: dict[str, Any]) -> None:
        plain = {name: value if isinstance(value, (int, float, bool)) else str(value) for name, value in params.items()}
        # TensorBoard shows parameters beside a metric only. Values that came with them are written as any other are.
        compared = self._compared or {"hp_metric": -1.0}
        for summary in _tensorboard("summary").hparams(plain, compared):
            self.experiment.file_writer.add_summary(summary)
        if not self._compared:
            self.experiment.add_scalar("hp_metric", -1.0)

    def write_image(self, name: str, image: np.ndarray, step: int) -> None:
        self.experiment.add_image(name, image, step, dataformats="HWC")

    def write_figure(self, name: str, figure: Any, step: int) -> None:
        self.experiment.add_figure(name, figure, step, close=False)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _tensorboard(module: str) -> Any:
    """A module of the package that writes, which both have."""
    package = "tensorboardX" if importlib.util.find_spec("tensorboard") is None else "torch.utils.tensorboard"
    return importlib.import_module(f"{package}.{module}")
