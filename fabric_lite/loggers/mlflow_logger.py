"""Runs in an MLflow store."""

from __future__ import annotations

import math
import os
import re
import time
from typing import Any

import numpy as np

from fabric_lite.loggers.logger import needs, rank_zero_experiment
from fabric_lite.loggers.pictures import PictureLogger

__all__ = ["MLFlowLogger"]

_REFUSED = re.compile(r"[^\w\-./ ]", re.ASCII)
_MOST_PARAMS = 100  # that the store takes at once
_STATUS = {"success": "FINISHED", "failed": "FAILED", "aborted": "KILLED"}


class MLFlowLogger(PictureLogger):
    """A run of an MLflow experiment. Needs ``pip install mlflow`` (``mlflow-skinny`` will do for a server).

    The store keeps all values that come for a step, so a run that goes on sends none for steps that it has already.
    Characters that it refuses in a name become ``_``; infinite values, which it would change, become NaN.

    Args:
        experiment_name: Made where there is none.
        tracking_uri: Of the store; None: a SQLite file ``mlflow.db`` in ``root_dir`` (MLflow takes folders no more).
        run_id: Of the run to go on with; None: a new one.
        root_dir: For the file of the store and the artifacts.
        prefix: Before every metric's name, with a ``/`` between.
        tags: Of a new run.

    Raises:
        FabricImportError: MLflow is not installed.
    """

    handles = ("_client",)

    def __init__(
        self,
        experiment_name: str = "fabric_logs",
        tracking_uri: str | None = None,
        run_id: str | None = None,
        root_dir: str | os.PathLike[str] = "mlflow",
        prefix: str = "",
        tags: dict[str, str] | None = None,
    ) -> None:
        needs("MLFlowLogger", "mlflow")
        super().__init__(root_dir, experiment_name, run_id, prefix)
        self._uri, self._tags = tracking_uri, tags
        self._client: Any = None
        self._last_steps: dict[str, int] | None = None  # by metric, of a run that goes on

    @property
    def run_id(self) -> str | None:
        """Of the run; None before the first use."""
        return None if self._version is None else str(self._version)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The ``MlflowClient``; made, with the run, at the first use."""
        if self._client is None:
            self._client = self._connected()
        return self._client

    def write_metrics(self, metrics: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        client, now = self.experiment, int(time.time() * 1000)
        named = {_REFUSED.sub("_", name): value for name, value in metrics.items()}
        fresh = {name: value for name, value in named.items() if step > self._last_step(client, name)}
        values = [Metric(name, math.nan if math.isinf(value) else value, now, step) for name, value in fresh.items()]
        if values:
            client.log_batch(self._version, metrics=values)

    def write_params(self, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        client = self.experiment
        # A parameter can't be changed: the store refuses a second one.
        known = client.get_run(self._version).data.params
        named = {_REFUSED.sub("_", name): str(value) for name, value in params.items()}
        fresh = [Param(*pair) for pair in named.items() if pair[0] not in known]
        for first in range(0, len(fresh), _MOST_PARAMS):
            client.log_batch(self._version, params=fresh[first : first + _MOST_PARAMS])

    def write_image(self, name: str, image: np.ndarray, step: int) -> None:
        self.experiment.log_image(self._version, image, key=_REFUSED.sub("_", name), step=step)

    def write_figure(self, name: str, figure: Any, step: int) -> None:
        self.experiment.log_figure(self._version, figure, f"{_REFUSED.sub('_', name)}/{step}.png")

    def close(self, status: str) -> None:
        if self._client is not None:
            self._client.set_terminated(self._version, _STATUS.get(status, "FINISHED"))
            self._client = None

    def _connected(self) -> Any:
        from mlflow import MlflowClient

        self._root_dir.mkdir(parents=True, exist_ok=True)
        folder = self._root_dir.resolve()
        client = MlflowClient(self._uri or f"sqlite:///{folder / 'mlflow.db'}")
        if self._version is not None:
            self._last_steps = {}
            client.update_run(str(self._version), status="RUNNING")
            return client
        experiment = client.get_experiment_by_name(self._name)
        if experiment is None:
            place = None if self._uri else (folder / "artifacts").as_uri()
            number = client.create_experiment(self._name, artifact_location=place)
        else:
            number = experiment.experiment_id
        self._version, self._last_steps = client.create_run(number, tags=self._tags).info.run_id, None
        return client

    def _last_step(self, client: Any, name: str) -> int:
        """The last step that the store has of a metric, in a run that goes on; else less than any."""
        if self._last_steps is None:
            return -1
        if name not in self._last_steps:
            history = client.get_metric_history(self._version, name)
            self._last_steps[name] = max((metric.step for metric in history), default=-1)
        return self._last_steps[name]
