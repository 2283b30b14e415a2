"""Runs of Weights & Biases, with a network or without."""

from __future__ import annotations

import atexit
import inspect
import json
import os
import secrets
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from fabric_lite import process_end
from fabric_lite.loggers.logger import check_options, needs, rank_zero_experiment
from fabric_lite.loggers.pictures import PictureLogger, drawn
from fabric_lite.whole_file import write_whole

__all__ = ["WandbLogger"]

# W&B's own step may not go back; this one may, and plots use it.
_STEP = "trainer/step"


class WandbLogger(PictureLogger):
    """A run of a W&B project. Needs ``pip install wandb``; ``offline=True`` needs neither a network nor an account.

    A run that goes on has the same id, and sends nothing for steps that were sent already: which the last one was is
    noted in a file in ``root_dir``.

    Args:
        project: Its name.
        root_dir: For what W&B writes on this machine.
        id: Of the run; None: a new one.
        offline: Whether to write here only; ``wandb sync`` sends it later.
        prefix: Before every metric's name, with a ``/`` between.
        options: For ``wandb.init``; those that it does not take raise FabricTypeError when the run starts, since asking
            it for them imports all of W&B.

    Raises:
        FabricImportError: wandb is not installed.
    """

    handles = ("_run",)

    def __init__(
        self,
        project: str = "fabric_logs",
        root_dir: str | os.PathLike[str] = "wandb_logs",
        id: str | None = None,
        offline: bool = False,
        prefix: str = "",
        **options: Any,
    ) -> None:
        needs("WandbLogger", "wandb")
        super().__init__(root_dir, project, id, prefix)
        self._offline, self._options = offline, options
        self._run: Any = None
        self._sent: dict[str, int] = {}  # the last step of each metric that W&B has
        self._sent_before: dict[str, int] = {}  # by processes before this one

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run; started at the first use."""
        if self._run is None:
            import wandb

            taken = [name for name in inspect.signature(wandb.init).parameters if name not in ("project", "dir", "id")]
            check_options("WandbLogger", self._options, taken, "wandb.init")
            self._root_dir.mkdir(parents=True, exist_ok=True)
            self._version = self._version or secrets.token_hex(4)
            # Not the run of somebody else in this process, which is what W&B would give.
            mode = {"reinit": "create_new", "resume": "allow", **({"mode": "offline"} if self._offline else {})}
            self._run = wandb.init(
                project=self._name,
                dir=self.root_dir,
                id=str(self._version),
                **{**mode, **self._options},
            )
            self._run.define_metric(_STEP)
            self._run.define_metric("*", step_metric=_STEP)
            self._sent_before = json.loads(self._mark.read_text()) if self._mark.exists() else {}
            self._sent = dict(self._sent_before)
            # W&B's own handler, registered a moment ago, closes the way to its service, and runs after this one.
            atexit.register(_finish_at_exit, weakref.ref(self))
        return self._run

    def write_metrics(self, metrics: dict[str, float], step: int) -> None:
        run = self.experiment
        fresh = {name: value for name, value in metrics.items() if step > self._sent_before.get(name, -1)}
        if fresh:
            run.log({**fresh, _STEP: step})
            self._sent |= {name: max(step, self._sent.get(name, -1)) for name in fresh}
            write_whole(self._mark, json.dumps(self._sent).encode(), survives_power_cut=False)

    def write_params(self, params: dict[str, Any]) -> None:
        self.experiment.config.update(params, allow_val_change=True)

    def write_image(self, name: str, image: np.ndarray, step: int) -> None:
        import wandb

        self.experiment.log({name: wandb.Image(image), _STEP: step})

    def write_figure(self, name: str, figure: Any, step: int) -> None:
        import wandb

        self.experiment.log({name: wandb.Image(drawn(figure)), _STEP: step})

    def close(self, status: str) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if status == "success" else 1)
            self._run = None

    @property
    def _mark(self) -> Path:
        """Where the last steps that were sent are noted, which W&B can't be asked for without a network."""
        return self._root_dir / f".{self._version}.steps"


def _finish_at_exit(reference: weakref.ref[WandbLogger]) -> None:
    logger = reference()
    if logger is not None:
        logger.finalize(process_end.status(is_at_exit=True))
