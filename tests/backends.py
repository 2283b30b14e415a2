"""Loggers' backends, read back with their own readers."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fabric_lite.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

__all__ = ["BACKENDS", "Backend"]

Scalars = dict[str, list[tuple[int, float]]]


@dataclasses.dataclass(frozen=True)
class Backend:
    """How a logger is made in a folder, and what it has left there is read."""

    name: str
    make: Callable[..., Logger]
    scalars: Callable[[Path, Any], Scalars]
    params: Callable[[Path, Any], dict[str, Any]]
    kill: Callable[[Any], None]
    image: Callable[[Path, Any, str], np.ndarray] | None = None

    def __str__(self) -> str:
        return self.name


def _csv_scalars(_: Path, logger: Any) -> Scalars:
    found: Scalars = {}
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "step" and value != "":
                    found.setdefault(name, []).append((int(row["step"]), float(value)))
    return found


def _csv_params(_: Path, logger: Any) -> dict[str, Any]:
    params: dict[str, Any] = json.loads((Path(logger.log_dir) / "hparams.json").read_text())
    return params


def _events(logger: Any) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(logger.log_dir, size_guidance={"images": 0, "scalars": 0}).Reload()


def _tensorboard_scalars(_: Path, logger: Any) -> Scalars:
    events = _events(logger)
    names = [name for name in events.Tags()["scalars"] if name != "hp_metric"]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def _tensorboard_params(_: Path, logger: Any) -> dict[str, Any]:
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    found: dict[str, Any] = {}
    for file in sorted(Path(logger.log_dir).iterdir()):
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag == metadata.SESSION_START_INFO_TAG:
                    content = plugin_data_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
                    hparams = content.session_start_info.hparams
                    found |= {
                        name: getattr(hparams[name], hparams[name].WhichOneof("kind") or "number_value")
                        for name in hparams
                    }
    return found


def _tensorboard_image(_: Path, logger: Any, name: str) -> np.ndarray:
    from PIL import Image

    event = _events(logger).Images(name)[-1]
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))[..., :3]


def _mlflow_client(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder.resolve() / 'mlflow.db'}")


def _mlflow_scalars(folder: Path, logger: Any) -> Scalars:
    client = _mlflow_client(folder)
    assert client.get_run(logger.run_id).info.status != "RUNNING"
    return {
        name: [(one.step, one.value) for one in client.get_metric_history(logger.run_id, name)]
        for name in client.get_run(logger.run_id).data.metrics
    }


def _mlflow_params(folder: Path, logger: Any) -> dict[str, Any]:
    params: dict[str, Any] = _mlflow_client(folder).get_run(logger.run_id).data.params
    return params


def _mlflow_image(folder: Path, _: Any, name: str) -> np.ndarray:
    from PIL import Image

    [path] = [path for path in (folder / "artifacts").rglob("*.png") if name in str(path.relative_to(folder))]
    return np.asarray(Image.open(path))[..., :3]


def _wandb_records(folder: Path, logger: Any) -> Iterator[Any]:
    """The records of a run's files: LevelDB's log format behind a header of 7 bytes.

    https://github.com/google/leveldb/blob/main/doc/log_format.md; W&B has no reader of its own in Python any more.
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its service may still be writing when a run has ended
    for path in sorted((folder / "wandb").glob(f"offline-run-*-{logger.version}*/run-*.wandb")):
        data, position, parts = path.read_bytes(), 7, b""
        while position + 7 <= len(data):
            if 32768 - position % 32768 < 7:
                position += 32768 - position % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", data, position)
            parts += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # whole, or the last part
                yield Record.FromString(parts)
                parts = b""


def _wandb_scalars(folder: Path, logger: Any) -> Scalars:
    found: Scalars = {}
    for record in _wandb_records(folder, logger):
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in items.items():
            if not name.startswith("_") and name != "trainer/step" and isinstance(value, float | int):
                found.setdefault(name, []).append((items["trainer/step"], float(value)))
    return found


def _wandb_params(folder: Path, logger: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in _wandb_records(folder, logger):
        found |= {one.key or "/".join(one.nested_key): json.loads(one.value_json) for one in record.config.update}
    return found


def _wandb_image(folder: Path, logger: Any, name: str) -> np.ndarray:
    from PIL import Image

    [path] = (folder / "wandb").glob(f"offline-run-*-{logger.version}*/files/media/images/{name}_*.png")
    return np.asarray(Image.open(path))[..., :3]


def _nothing(_: Any) -> None:
    """What is written stays as it is, nothing is closed."""


def _kill_wandb(logger: WandbLogger) -> None:
    """The process of a test can't be killed, and W&B takes no second run in it before the first has ended."""
    with contextlib.redirect_stderr(io.StringIO()):
        logger.finalize("aborted")


BACKENDS = [
    Backend("csv", CSVLogger, _csv_scalars, _csv_params, _nothing),
    Backend(
        "tensorboard",
        TensorBoardLogger,
        _tensorboard_scalars,
        _tensorboard_params,
        lambda logger: logger.save(),
        _tensorboard_image,
    ),
    Backend(
        "mlflow",
        lambda folder, **options: MLFlowLogger(root_dir=folder, **options),
        _mlflow_scalars,
        _mlflow_params,
        _nothing,
        _mlflow_image,
    ),
    Backend(
        "wandb",
        lambda folder, **options: WandbLogger(root_dir=folder, offline=True, **options),
        _wandb_scalars,
        _wandb_params,
        _kill_wandb,
        _wandb_image,
    ),
]
