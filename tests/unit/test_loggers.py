"""What is logged is read back with each backend's own reader, also after a crash and a resume."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import inspect
import json
import math
import os
import pickle
import re
import resource
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.summary.writer.event_file_writer import AtomicCounter

from fabric_lite import Checkpoints, Fabric
from fabric_lite.callbacks import EarlyStopping
from fabric_lite.errors import FabricImportError, FabricRuntimeError, FabricTypeError, FabricValueError
from fabric_lite.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    PictureLogger,
    TensorBoardLogger,
    WandbLogger,
    tensorboard_logger,
)
from fabric_lite.loggers.guard import Guard
from fabric_lite.loggers.logger import flat, needs
from fabric_lite.loggers.pictures import pixels
from tests.backends import BACKENDS, Backend

pytestmark = pytest.mark.filterwarnings("default")  # of the backends' own code
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def backends_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B's service and its mark in the environment go; TensorBoard's files sort by a number of as many digits."""
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer._global_uid", AtomicCounter(10**6))
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@dataclasses.dataclass
class Options:
    """Of a run, nested."""

    lr: float = 0.1
    model: dict[str, Any] = dataclasses.field(default_factory=lambda: {"width": 8})


def cpu(**arguments: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, **arguments)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_scalars_are_read_back_with_their_steps(backend: Backend, tmp_path: Path) -> None:
    logger = backend.make(tmp_path)
    fabric = cpu(loggers=logger)
    fabric.log("loss", torch.tensor(0.5), step=3)
    fabric.log_dict({"loss": 0.25, "accuracy": np.float64(0.75)}, step=5)
    fabric.close()
    assert backend.scalars(tmp_path, logger) == {"loss": [(3, 0.5), (5, 0.25)], "accuracy": [(5, 0.75)]}


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_without_a_step_the_next_one_is_taken_and_a_prefix_stands_before_names(
    backend: Backend, tmp_path: Path
) -> None:
    logger = backend.make(tmp_path, prefix="train")
    for value in (1.0, 2.0):
        logger.log_metrics({"loss": value})
    logger.finalize()
    assert backend.scalars(tmp_path, logger) == {"train/loss": [(0, 1.0), (1, 2.0)]}


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_parameters_are_read_back_flat(backend: Backend, tmp_path: Path) -> None:
    logger = backend.make(tmp_path)
    logger.log_hyperparams(Options())
    logger.log_hyperparams(argparse.Namespace(seed=7))
    logger.finalize()
    found = backend.params(tmp_path, logger)
    assert {name: float(found[name]) for name in ("lr", "model/width", "seed")} == {
        "lr": 0.1,
        "model/width": 8,
        "seed": 7,
    }


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_values_that_come_with_parameters_are_read_back_with_them(backend: Backend, tmp_path: Path) -> None:
    """As Lightning's ``log_hyperparams(params, metrics)`` does."""
    logger = backend.make(tmp_path)
    logger.log_hyperparams({"lr": 0.5}, {"best": torch.tensor(0.25)})
    logger.log_metrics({"loss": 1.0}, 2)
    logger.log_hyperparams({}, metrics={"best": 0.75})
    logger.finalize()
    assert backend.scalars(tmp_path, logger) == {"best": [(0, 0.25), (2, 0.75)], "loss": [(2, 1.0)]}
    assert float(backend.params(tmp_path, logger)["lr"]) == 0.5
    with pytest.raises(FabricTypeError, match="best='good'"):
        logger.log_hyperparams({"lr": 0.5}, {"best": "good"})


def test_tensorboard_compares_runs_by_the_values_that_come_with_their_parameters(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    for metrics, named in (({"best": 0.25}, "best"), (None, "hp_metric")):
        logger = TensorBoardLogger(tmp_path)
        logger.log_hyperparams({"lr": 0.5}, metrics)
        logger.finalize()
        events = EventAccumulator(logger.log_dir).Reload()
        content = events.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
        experiment = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
        assert [info.name.tag for info in experiment.metric_infos] == [named]
        assert [tag for tags in events.Tags().values() if isinstance(tags, list) for tag in tags].count(named) == 1


def test_the_experiment_of_a_csv_logger_takes_metrics(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.experiment.log_metrics({"a": 1.0}, step=2)
    logger.experiment.save()
    assert csv_rows(logger) == [{"step": "2", "a": "1.0"}]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_run_that_goes_on_has_no_step_twice_and_none_that_was_undone(backend: Backend, tmp_path: Path) -> None:
    """Saved after step 2, it logs 3 and 4, is killed, and goes on from the checkpoint."""
    logger = backend.make(tmp_path)
    for step in (1, 2):
        logger.log_metrics({"loss": float(step)}, step)
    state = pickle.loads(pickle.dumps(logger.state_dict()))
    for step in (3, 4):
        logger.log_metrics({"loss": float(step)}, step)
    backend.kill(logger)

    again = backend.make(tmp_path)
    again.load_state_dict(state)
    for step in (3, 4, 5):
        again.log_metrics({"loss": float(step)}, step)
    again.finalize()
    assert again.version == logger.version
    assert backend.scalars(tmp_path, again) == {"loss": [(step, float(step)) for step in range(1, 6)]}


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_several_calls_for_one_step_all_count_after_a_resume(backend: Backend, tmp_path: Path) -> None:
    logger = backend.make(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    state = logger.state_dict()
    backend.kill(logger)
    again = backend.make(tmp_path)
    again.load_state_dict(state)
    again.log_metrics({"loss": 2.0}, 2)
    again.log_metrics({"lr": 0.5}, 2)
    again.log_metrics({"epoch": 0.0}, 1)
    again.finalize()
    found = backend.scalars(tmp_path, again)
    assert (found["loss"], found["lr"]) == ([(1, 1.0), (2, 2.0)], [(2, 0.5)])
    assert found["epoch"] == [(1, 0.0)]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_another_runs_checkpoint_does_not_touch_a_version_that_was_asked_for(backend: Backend, tmp_path: Path) -> None:
    first = backend.make(tmp_path)
    first.log_metrics({"loss": 1.0}, 1)
    first._asked_version = first.version
    for state in ({**first.state_dict(), "version": "other"}, {**first.state_dict(), "name": "x", "lines": 0}):
        first.load_state_dict(state)
    first.log_metrics({"loss": 2.0}, 2)
    first.finalize()
    assert backend.scalars(tmp_path, first)["loss"] == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_logger_that_is_in_use_can_be_pickled_for_other_processes(backend: Backend, tmp_path: Path) -> None:
    logger = backend.make(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    copied = pickle.loads(pickle.dumps(logger))
    assert copied.version == logger.version
    logger.finalize()


@pytest.mark.parametrize("ending", ["", "raise ValueError", "fabric.close()"], ids=["end", "exception", "closed"])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_the_end_of_a_script_leaves_nothing_out(backend: Backend, tmp_path: Path, ending: str) -> None:
    script = f"""
        import sys
        from pathlib import Path
        from fabric_lite import Fabric
        from tests.backends import BACKENDS

        backend = next(one for one in BACKENDS if one.name == {backend.name!r})
        logger = backend.make(Path({str(tmp_path)!r}))
        fabric = Fabric(accelerator="cpu", devices=1, loggers=logger)
        fabric.log_hyperparams({{"lr": 0.5}})
        fabric.log("loss", 1.0, step=1)
        print("version", logger.version)
        {ending}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "the training goes on" not in done.stderr, done.stderr
    [version] = re.findall("^version (.+)$", done.stdout, re.MULTILINE)
    logger = backend.make(tmp_path)
    logger._version = int(version) if backend.name in ("csv", "tensorboard") else version
    assert backend.scalars(tmp_path, logger)["loss"] == [(1, 1.0)]
    assert float(backend.params(tmp_path, logger)["lr"]) == 0.5


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_logger_is_saved_and_restored_with_its_fabric(backend: Backend, tmp_path: Path) -> None:
    first = cpu(loggers=backend.make(tmp_path))
    first.log("loss", 1.0, step=4)
    first.save(tmp_path / "a.ckpt", {"fabric": first})
    first.close()
    second = cpu(loggers=backend.make(tmp_path))
    second.load(tmp_path / "a.ckpt", {"fabric": second})
    assert second.logger.version == first.logger.version
    second.log("loss", 0.5, step=5)
    second.close()
    assert backend.scalars(tmp_path, second.logger)["loss"] == [(4, 1.0), (5, 0.5)]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_nothing_is_made_before_the_first_use(backend: Backend, tmp_path: Path) -> None:
    backend.make(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", [one for one in BACKENDS if one.image is not None], ids=str)
def test_images_and_figures_are_read_back(backend: Backend, tmp_path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib.figure import Figure

    logger = backend.make(tmp_path)
    assert isinstance(logger, PictureLogger)
    image = torch.zeros(3, 4, 6)
    image[0, :, :3] = 1.0
    logger.log_image("samples", image, step=2)
    figure = Figure(figsize=(2, 1), dpi=50)
    figure.add_subplot().plot([0, 1])
    logger.log_figure("curve", figure, step=2)
    logger.finalize()
    assert backend.image is not None
    found = backend.image(tmp_path, logger, "samples")
    assert found.shape == (4, 6, 3)
    assert np.array_equal(found, pixels(image))
    assert backend.image(tmp_path, logger, "curve").shape[:2] == (50, 100)


def test_rows_of_a_csv_are_on_the_disk_when_log_returns(tmp_path: Path) -> None:
    script = """
        import os, signal, sys
        from fabric_lite import Fabric
        from fabric_lite.loggers import CSVLogger
        fabric = Fabric(accelerator="cpu", devices=1, loggers=CSVLogger(sys.argv[1], flush_logs_every_n_steps=100))
        fabric.log("a", 1.0, step=0)
        fabric.log("b", 2.0, step=1)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), tmp_path], check=False)
    with (tmp_path / "fabric_logs" / "version_0" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"step": "0", "a": "1.0", "b": ""}, {"step": "1", "a": "", "b": "2.0"}]


@dataclasses.dataclass
class Disk:
    """What a power cut would leave of files: their content when ``fsync`` was last called, and how often it was."""

    committed: dict[str, bytes] = dataclasses.field(default_factory=dict)
    calls: int = 0

    def fsync(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        self.calls += 1
        if path.is_file():
            self.committed[str(path)] = path.read_bytes()
        else:  # a folder, whose names are now those of the files
            self.committed |= {str(file): file.read_bytes() for file in path.iterdir() if file.is_file()}


@pytest.mark.parametrize(("every", "committed"), [(1, [1, 2, 3, 4, 5, 6]), (3, [0, 0, 3, 3, 3, 6])])
def test_lines_of_a_csv_are_forced_onto_the_disk_after_so_many_calls(
    every: int, committed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of the columns are in any case, since they are written as a whole file."""
    disk = Disk()
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=every)
    path = str(Path(logger.log_dir, "metrics.csv").resolve())
    monkeypatch.setattr(os, "fsync", disk.fsync)
    found, calls = [], []
    for step in range(6):
        before = disk.calls
        logger.log_metrics({"a": float(step)}, step)
        found.append(len(disk.committed[path].splitlines()) - 1)
        calls.append(disk.calls - before)
    assert found == committed
    assert calls[1:] == [1 if every == 1 or step % 3 == 2 else 0 for step in range(1, 6)]
    logger.log_metrics({"a": 6.0}, 6)
    logger.save()
    assert disk.committed[path] == Path(path).read_bytes()


def test_a_csv_has_one_line_of_each_step_whatever_is_logged_of_it(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    for metrics, step in (({"a": 1.5}, 1), ({"b": 2.0}, 1), ({"a": 0.25}, 1), ({"a": 3.0}, 2), ({"c": 4.0}, 2)):
        logger.log_metrics(metrics, step)
    assert csv_rows(logger) == [
        {"step": "1", "a": "0.25", "b": "2.0", "c": ""},
        {"step": "2", "a": "3.0", "b": "", "c": "4.0"},
    ]


def test_a_csv_that_goes_on_has_its_last_line_as_it_was_saved(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 1)
    saved = pickle.loads(pickle.dumps(logger.state_dict()))
    logger.log_metrics({"b": 2.0}, 1)  # of the same step, after the save
    logger.log_metrics({"a": 3.0}, 2)
    logger.finalize()
    again = CSVLogger(tmp_path)
    again.load_state_dict(saved)
    again.log_metrics({"c": 4.0}, 1)
    assert csv_rows(again) == [{"step": "1", "a": "1.0", "b": "", "c": "4.0"}]


def test_a_line_that_a_full_disk_does_not_take_leaves_the_one_before_it(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0, "b": 2.0}, 1)
    path = Path(logger.log_dir) / "metrics.csv"
    before = path.read_bytes()
    with full_disk(len(before)):
        logger.log_metrics({"b": 2.000000001}, 1)
    assert path.read_bytes() == before


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        with pytest.warns(UserWarning, match="CSVLogger failed"):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_column_for_which_the_disk_was_full_comes_later_and_spoils_nothing(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 1)
    with full_disk((Path(logger.log_dir) / "metrics.csv").stat().st_size):
        logger.log_metrics({"a": 2.0, "b": 3.0}, 2)
    logger.log_metrics({"a": 4.0, "b": 5.0}, 3)
    logger.log_metrics({"c": 6.0}, 4)
    assert csv_rows(logger) == [
        {"step": "1", "a": "1.0", "b": "", "c": ""},
        {"step": "3", "a": "4.0", "b": "5.0", "c": ""},
        {"step": "4", "a": "", "b": "", "c": "6.0"},
    ]


def test_a_line_of_a_csv_may_get_shorter(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    for value in (1 / 3, 0.5):
        logger.log_metrics({"a": value}, 1)
    logger.log_metrics({"a": 2.0}, 2)
    assert csv_rows(logger) == [{"step": "1", "a": "0.5"}, {"step": "2", "a": "2.0"}]


class Foreign:
    """A logger of somebody else's, which takes no parameters, and fails."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((metrics, step))
        if step == 2:
            raise NotImplementedError("at step 2")

    def log_hyperparams(self, params: Any) -> None:
        raise NotImplementedError


def test_a_logger_may_be_added_later_and_what_it_can_not_do_is_no_failure_but_for_metrics() -> None:
    fabric, later = cpu(loggers=Foreign()), Foreign()
    fabric.loggers.append(later)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fabric.log_hyperparams({"a": 1})
        fabric.log("loss", 1.0, step=1)
    assert later.rows == [({"loss": 1.0}, 1)]
    with pytest.warns(UserWarning, match="at step 2"):
        fabric.log("loss", 1.0, step=2)
    fabric.close()


def csv_rows(logger: CSVLogger) -> list[dict[str, str]]:
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_half_a_line_that_a_crash_has_left_is_dropped(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version=3)
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize()
    with (Path(logger.log_dir) / "metrics.csv").open("a") as file:
        file.write("1,2.")
    again = CSVLogger(tmp_path, version=3)
    again.log_metrics({"a": 3.0}, 2)
    again.finalize()
    assert BACKENDS[0].scalars(tmp_path, again) == {"a": [(0, 1.0), (2, 3.0)]}


def test_versions_are_counted_and_may_be_named(tmp_path: Path) -> None:
    for version, folder in ((None, "version_0"), (None, "version_1"), (7, "version_7"), ("best", "best")):
        logger = CSVLogger(tmp_path, "runs", version=version)
        logger.log_metrics({"a": 1.0})
        assert Path(logger.log_dir) == tmp_path / "runs" / folder


class Broken(Logger):
    """Its backend is away, the first time and every time."""

    def __init__(self) -> None:
        super().__init__(".", "broken")

    def write_metrics(self, metrics: dict[str, float], step: int) -> None:
        raise ConnectionError("no route to host")

    def write_params(self, params: dict[str, Any]) -> None:
        raise ConnectionError("no route to host")


def test_a_backend_that_fails_is_one_warning_with_a_count_and_the_others_get_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = CSVLogger(tmp_path)
    monkeypatch.setattr("fabric_lite.loggers.guard.time.monotonic", lambda: 0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fabric = cpu(loggers=[Broken(), healthy])
        for step in range(5):
            fabric.log("loss", 1.0, step=step)
        fabric.close()
    first, last = (str(one.message) for one in caught)
    assert first.startswith("Broken failed, and the training goes on without what it was to log: ConnectionError: no")
    # Each time the record of the run is tried first, and once more at the end.
    assert last == "Broken failed 11 times in all."
    assert all(one.filename == __file__ for one in caught[:1]), caught[0].filename
    assert len(BACKENDS[0].scalars(tmp_path, healthy)["loss"]) == 5


def test_a_folder_that_cannot_be_made_does_not_stop_the_training(tmp_path: Path) -> None:
    (tmp_path / "fabric_logs").write_text("a file where the folder should be")
    fabric = cpu(loggers=CSVLogger(tmp_path))
    with pytest.warns(UserWarning, match="CSVLogger failed"):
        fabric.log("loss", 1.0)
    fabric.close()


@pytest.mark.parametrize("value", [torch.ones(2), "text", None, np.ones(2)], ids=["tensor", "text", "none", "array"])
def test_what_is_no_number_is_the_users_error(tmp_path: Path, value: Any) -> None:
    fabric = cpu(loggers=CSVLogger(tmp_path))
    with pytest.raises(FabricTypeError, match=r"is a number[\s\S]*loss="):
        fabric.log("loss", value)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (torch.tensor([0.5], requires_grad=True), 0.5),
        (torch.tensor(True), 1),
        (np.array([[0.5]]), 0.5),
        (np.int64(3), 3),
        (Fraction(1, 2), 0.5),
        (True, 1),
    ],
    ids=["tensor", "boolean tensor", "array", "integer of numpy", "fraction", "boolean"],
)
def test_loggers_callbacks_and_checkpoints_take_the_same_for_a_number(
    value: Any, number: float, tmp_path: Path
) -> None:
    fabric = cpu(loggers=CSVLogger(tmp_path))
    fabric.log("loss", value, step=1)
    early = EarlyStopping("loss")
    early.step({"loss": value})
    checkpoints = Checkpoints(tmp_path, every=1)
    checkpoints.save({"fabric": fabric}, {"loss": value})
    [entry] = checkpoints.entries()
    fabric.close()
    assert csv_rows(fabric.logger) == [{"step": "1", "loss": str(number)}]
    assert (early.best, entry.metrics) == (number, {"loss": number})


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("logger", "pictures", "versions"):
        monkeypatch.setattr(f"fabric_lite.loggers.{module}.rank", lambda: 1)
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 1.0})
    logger.log_hyperparams({"a": 1})
    logger.experiment.add_histogram("a", [1.0]).anything["b"] = 3
    assert logger.experiment.something[0].other() is not None
    logger.log_image("a", torch.ones(2, 2))
    with pytest.raises(FabricRuntimeError, match="Rank 0 alone"):
        _ = logger.log_dir
    assert list(tmp_path.iterdir()) == []


def test_infinite_values_do_not_become_large_ones(tmp_path: Path) -> None:
    logger = MLFlowLogger(root_dir=tmp_path)
    logger.log_metrics({"loss[a]": math.inf}, 0)
    logger.finalize()
    [(_, value)] = BACKENDS[2].scalars(tmp_path, logger)["loss_a_"]
    assert math.isnan(value)


@pytest.mark.parametrize(
    ("make", "package"),
    [(lambda: TensorBoardLogger("."), "tensorboard or tensorboardX"), (MLFlowLogger, "mlflow"), (WandbLogger, "wandb")],
)
def test_a_missing_package_is_said_at_once(
    make: Callable[[], Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(FabricImportError, match=f"{package}[\\s\\S]*pip install {package.split()[0]}") as caught:
        make()
    assert isinstance(caught.value, ImportError)


def test_a_package_that_is_there_is_not_imported() -> None:
    needs("a logger", "absent_package", "json")
    code = """if True:
        import sys
        from fabric_lite.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
        loggers = MLFlowLogger(), TensorBoardLogger("."), WandbLogger()
        print([name for name in ("tensorboard", "mlflow", "wandb", "matplotlib") if name in sys.modules])
    """
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "[]\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: TensorBoardLogger(folder, default_hp_metric=False), r"SummaryWriter[\s\S]*default_hp_metric="),
        (lambda folder: TensorBoardLogger(folder, sub_dir="a"), r"sub_dir=[\s\S]*filename_suffix"),
        (lambda folder: TensorBoardLogger(folder, log_dir="a"), "log_dir="),
        (lambda folder: CSVLogger(folder, save_dir="a"), "save_dir"),
        (lambda folder: MLFlowLogger(root_dir=folder, log_model=True), "log_model"),
    ],
    ids=["tensorboard", "tensorboard, another", "tensorboard, its own", "csv", "mlflow"],
)
def test_an_option_that_nobody_takes_is_refused_before_anything_is_logged(
    make: Callable[[Path], Logger], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=message):
        make(tmp_path)


@pytest.mark.parametrize("option", ["save_dir", "dir", "project_name"])
def test_an_option_that_wandb_does_not_take_stops_the_first_log(option: str, tmp_path: Path) -> None:
    fabric = cpu(loggers=WandbLogger(root_dir=tmp_path, offline=True, **{option: "a"}))
    with pytest.raises(FabricTypeError, match=rf"wandb\.init[\s\S]*{option}=[\s\S]*entity"):
        fabric.log("loss", 1.0)
    fabric.close()
    assert list(tmp_path.iterdir()) == []


def test_the_options_of_a_backend_reach_it(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, filename_suffix=".mine", max_queue=1, flush_secs=1)
    board.log_metrics({"a": 1.0})
    board.finalize()
    assert [path.suffix for path in Path(board.log_dir).iterdir()] == [".mine"]
    run = WandbLogger(root_dir=tmp_path, offline=True, name="mine", resume="never")
    assert run.experiment.name == "mine"
    run.finalize()


def test_tensorboards_writer_takes_no_options_but_those_that_are_known() -> None:
    from torch.utils.tensorboard import SummaryWriter

    given = {"log_dir", "purge_step", "comment"}
    assert set(inspect.signature(SummaryWriter).parameters) - given == set(tensorboard_logger._OPTIONS)


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (torch.zeros(2, 4, 4), FabricValueError),
        (torch.zeros(4), FabricValueError),
        (torch.zeros(3, 4, 4, dtype=torch.int64), FabricTypeError),
        ([[0.0]], FabricTypeError),
    ],
    ids=["two channels", "a row", "integers", "a list"],
)
def test_what_is_no_image_is_refused(image: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="image"):
        pixels(image)


def test_images_come_in_all_usual_forms() -> None:
    assert pixels(torch.ones(4, 6)).shape == (4, 6, 1)
    assert pixels(np.full((3, 2, 2), 7, np.uint8)).tolist() == [[[7] * 3] * 2] * 2
    assert pixels(torch.tensor([[-1.0, 0.5, 2.0, math.nan]], dtype=torch.bfloat16)).ravel().tolist() == [0, 128, 255, 0]


def test_parameters_become_flat() -> None:
    assert flat({"a": {"b": 1, 2: None}, "c": Options()}) == {
        "a/b": 1,
        "a/2": None,
        "c/lr": 0.1,
        "c/model/width": 8,
    }


def test_parameters_of_a_csv_logger_are_json(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1, "dtype": torch.float32})
    logger.save()
    assert json.loads((Path(logger.log_dir) / "hparams.json").read_text()) == {"lr": 0.1, "dtype": "torch.float32"}


def test_a_metric_may_not_be_called_step_in_a_csv(tmp_path: Path) -> None:
    with pytest.raises(FabricValueError, match='a metric "step"'):
        cpu(loggers=CSVLogger(tmp_path)).log("step", 1.0)


def test_parameters_come_as_a_namespace_or_dataclass_too(tmp_path: Path) -> None:
    fabric = cpu(loggers=CSVLogger(tmp_path))
    fabric.log_hyperparams(argparse.Namespace(lr=0.5))
    fabric.log_hyperparams(Options(lr=0.25))
    with pytest.raises(FabricTypeError, match="have names"):
        fabric.log_hyperparams([1])
    fabric.log("loss", 1.0)
    fabric.close()
    assert BACKENDS[0].params(tmp_path, fabric.logger)["lr"] == 0.25


def test_a_backend_that_takes_long_to_fail_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("fabric_lite.loggers.guard.time.monotonic", lambda: now)
    calls: list[float] = []

    def call() -> None:
        nonlocal now
        calls.append(now)
        now += 2.0
        raise ConnectionError

    guard = Guard("Slow")
    with pytest.warns(UserWarning, match="Slow failed, and"):
        guard.attempt(call)
    for _ in range(30):
        now += 1.0
        guard.attempt(call)
    assert calls == [0.0, 22.0]
    with pytest.warns(UserWarning, match="Slow failed 31 times"):
        guard.report()


def test_a_logger_of_lightning_fabric_that_takes_no_parameters_does_not_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # which its import sets, and leaves
    lightning = pytest.importorskip("lightning_fabric.loggers", reason="the extra fabric-lite[peers]")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fabric = cpu(loggers=lightning.CSVLogger(str(tmp_path)))
        fabric.log("loss", 1.0, step=2)
        fabric.close()
    assert "loss" in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()


def test_lines_are_flushed_after_one_call_at_least(tmp_path: Path) -> None:
    with pytest.raises(FabricValueError, match="flush_logs_every_n_steps=0"):
        CSVLogger(tmp_path, flush_logs_every_n_steps=0)


def test_a_logger_of_lightnings_interface_works() -> None:
    class Foreign:
        """As ``lightning.fabric.loggers.Logger`` asks for."""

        name, version, root_dir, log_dir = "foreign", 0, None, None

        def __init__(self) -> None:
            self.calls: list[Any] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.calls.append((metrics, step))

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            self.calls.append(params)

        def save(self) -> None:
            self.calls.append("save")

        def finalize(self, status: str) -> None:
            self.calls.append(status)

    foreign = Foreign()
    fabric = cpu(loggers=foreign)
    fabric.log_hyperparams({"a": {"b": 1}})
    fabric.log("loss", torch.tensor(2.0), step=1)
    fabric.close()
    fabric.close()
    record = foreign.calls.pop(1)
    assert record["run"]["versions"]["torch"] == torch.__version__
    assert foreign.calls == [{"a": {"b": 1}}, ({"loss": 2.0}, 1), "success"]


def test_a_logger_written_for_lightnings_base_class_is_told_what_to_change() -> None:
    with pytest.raises(
        FabricTypeError, match=r"write_metrics[\s\S]*class Ported with log_metrics[\s\S]*without a base"
    ):

        class Ported(Logger):
            def log_metrics(self, metrics: Any, step: Any = None) -> None:
                pass


class Louder(CSVLogger):
    """Adds to what ours does, and its own part fails."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        super().log_metrics({name: 2 * value for name, value in metrics.items()}, step)

    def finalize(self, status: str = "success") -> None:
        super().finalize(status)
        raise ConnectionError(f"nobody hears of {status}")


def test_what_a_subclass_adds_may_fail_too(tmp_path: Path) -> None:
    fabric = cpu(loggers=Louder(tmp_path))
    fabric.log("loss", 1.0, step=1)
    with pytest.warns(UserWarning, match="Louder failed[\\s\\S]*of success"):
        fabric.close()
    assert csv_rows(fabric.logger) == [{"step": "1", "loss": "2.0"}]


@pytest.mark.parametrize("logger", ["csv", True, CSVLogger, object()], ids=["text", "true", "a class", "an object"])
def test_what_is_no_logger_is_refused_and_not_left_out(logger: Any) -> None:
    with pytest.raises(FabricTypeError, match=r"object with log_metrics[\s\S]*Given: (the class )?\S"):
        cpu(loggers=logger)
    fabric = cpu()
    fabric.loggers.append(logger)
    with pytest.raises(FabricTypeError, match="object with log_metrics"):
        fabric.log("loss", 1.0)
    fabric.close()


@pytest.mark.parametrize(
    ("ending", "status"),
    [("pass", "success"), ("raise ValueError('no')", "failed"), ("raise SystemExit(3)", "success")],
)
def test_the_end_of_a_script_finalizes_with_how_it_ended(ending: str, status: str) -> None:
    script = f"""
        from fabric_lite import Fabric

        class Says:
            def log_metrics(self, metrics, step):
                pass
            def finalize(self, status):
                print(status, flush=True)

        fabric = Fabric(accelerator="cpu", devices=1, loggers=Says())
        {ending}
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.stdout == f"{status}\n"
