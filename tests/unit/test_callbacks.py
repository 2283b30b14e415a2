"""Callbacks in a raw loop: when they stop, save, log and raise, and that they go on after a resume."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_lite import EXIT_PREEMPTED, Fabric
from fabric_lite.callbacks import (
    DeviceMemoryMonitor,
    EarlyStopping,
    GradientNormMonitor,
    LearningRateMonitor,
    ModelCheckpoint,
    SpikeDetection,
    TrainingSpikeError,
)
from fabric_lite.errors import FabricKeyError, FabricTypeError, FabricValueError


class Kept:
    """A logger that keeps what it gets."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, metrics))

    def of(self, name: str) -> list[tuple[int | None, float]]:
        return [(step, metrics[name]) for step, metrics in self.rows if name in metrics]


def begin(*callbacks: Any, **arguments: Any) -> dict[str, Any]:
    """The state of a small run."""
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=list(callbacks), **arguments)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(torch.randn(12, 3)), batch_size=2, shuffle=True))
    return {"fabric": fabric, "model": model, "optimizer": optimizer, "loader": loader, "epoch": 0}


def train_step(state: dict[str, Any], batch: torch.Tensor) -> torch.Tensor:
    loss = state["model"](batch).square().mean()
    state["fabric"].backward(loss)
    state["optimizer"].step()
    state["optimizer"].zero_grad()
    return loss.detach()


@pytest.mark.parametrize(
    ("options", "values", "stops_at"),
    [
        ({"patience": 2}, [3.0, 2.0, 2.0, 2.5, 1.0], 3),
        ({"patience": 2}, [3.0, 2.0, 2.5, 1.0, 1.5, 1.5], 5),
        ({"patience": 1, "mode": "max"}, [1.0, 2.0, 2.0], 2),
        ({"patience": 1, "min_delta": 0.5}, [3.0, 2.4, 2.0], 2),
        ({"patience": 0}, [1.0, 1.0], 1),
        ({"patience": 5}, [1.0, math.nan], 1),
        ({"patience": 5}, [1.0, math.inf], 1),
        ({"patience": 2, "check_finite": False}, [1.0, math.nan, 0.5, 2.0, 2.0], 4),
        ({"patience": 2, "check_finite": False}, [math.nan, 1.0, 0.5, 0.25], None),
        ({"patience": 3}, [1.0, 0.5, 0.25], None),
    ],
    ids=str,
)
def test_it_stops_when_the_value_gets_no_better(
    options: dict[str, Any], values: list[float], stops_at: int | None
) -> None:
    early = EarlyStopping("loss", **options)
    said = [early.step({"loss": value}) for value in values]
    assert (said.index(True) if True in said else None) == stops_at
    assert early.should_stop == (stops_at is not None)


def test_early_stopping_counts_on_after_a_resume(tmp_path: Path) -> None:
    early = EarlyStopping("loss", patience=2)
    state = begin(early)
    state["fabric"].call("on_validation_end", metrics={"loss": torch.tensor(1.0)})
    state["fabric"].call("on_validation_end", metrics={"loss": 2.0})
    state["fabric"].save(tmp_path / "a.ckpt", state)

    again = EarlyStopping("loss", patience=2)
    resumed = begin(again)
    resumed["fabric"].load(tmp_path / "a.ckpt", resumed)
    assert (again.best, again.waited, again.should_stop) == (1.0, 1, False)
    resumed["fabric"].call("on_validation_end", metrics={"loss": 1.5})
    assert again.should_stop


def test_early_stopping_looks_after_epochs_instead_when_asked() -> None:
    early = EarlyStopping("loss", patience=1, check_on_train_epoch_end=True)
    fabric = begin(early)["fabric"]
    for value in (1.0, 2.0):
        fabric.call("on_validation_end", metrics={"loss": value})
    assert not early.should_stop
    for value in (1.0, 2.0):
        fabric.call("on_train_epoch_end", metrics={"loss": value})
    assert early.should_stop


def test_a_value_that_is_not_there_is_named() -> None:
    with pytest.raises(FabricKeyError, match=r"'val_loss', metrics 'loss'"):
        EarlyStopping("val_loss").step({"loss": 1.0})


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (lambda: EarlyStopping("loss", mode="best"), "mode='best'"),
        (lambda: EarlyStopping("loss", patience=-1), "patience=-1"),
        (lambda: EarlyStopping("loss", min_delta=-0.1), "min_delta=-0.1"),
        (lambda: ModelCheckpoint("a", mode="best"), "mode='best'"),
        (lambda: ModelCheckpoint("a", save_top_k=-2), "save_top_k=-2"),
        (lambda: ModelCheckpoint("a", save_top_k=0, save_last=False), "save_top_k=0"),
        (lambda: ModelCheckpoint("a", save_last="link"), "save_last='link'"),
        (lambda: SpikeDetection(mode="best"), "mode='best'"),
        (lambda: SpikeDetection(window=0), "window=0"),
        (lambda: LearningRateMonitor(every_n_steps=0), "every_n_steps=0"),
    ],
)
def test_values_that_are_not_allowed_are_refused(make: Callable[[], Any], given: str) -> None:
    with pytest.raises(FabricValueError, match=rf"Given: .*{re.escape(given)}"):
        make()


def run_validations(folder: Path, values: list[float], **options: Any) -> ModelCheckpoint:
    """Steps 1, 2, ..., each followed by a validation with the next value."""
    checkpoint = ModelCheckpoint(folder, **options)
    state = begin(checkpoint)
    state["fabric"].call("on_train_start", state=state)
    for value in values:
        state["optimizer"].step()
        state["fabric"].call("on_train_batch_end", state=state, metrics={"loss": value})
        state["fabric"].call("on_validation_end", state=state, metrics={"loss": value})
        state["fabric"].call("on_train_epoch_end", state=state, metrics={"loss": value})
    return checkpoint


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


VALUES = [3.0, 1.0, 4.0, 2.0, 5.0]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"monitor": "loss"}, [2, 5]),
        ({"monitor": "loss", "save_last": False}, [2]),
        ({"monitor": "loss", "save_top_k": 2, "save_last": False}, [2, 4]),
        ({"monitor": "loss", "mode": "max", "save_top_k": 2}, [3, 5]),
        ({"monitor": "loss", "save_top_k": -1}, [1, 2, 3, 4, 5]),
        ({"monitor": "loss", "save_top_k": 0}, [5]),
        ({"monitor": "loss", "check_on_train_epoch_end": True}, [2, 5]),
        ({}, [5]),
        ({"save_top_k": 2}, [4, 5]),
        ({"save_top_k": -1}, [1, 2, 3, 4, 5]),
        ({"every_n_steps": 2}, [4]),
        ({"every_n_steps": 2, "save_top_k": -1}, [2, 4]),
    ],
    ids=str,
)
def test_which_checkpoints_are_kept(tmp_path: Path, options: dict[str, Any], kept: list[int]) -> None:
    checkpoint = run_validations(tmp_path, VALUES, **options)
    assert steps_in(tmp_path) == kept
    assert checkpoint.last_model_path == tmp_path / f"step-{kept[-1]:07d}"


def test_the_best_one_is_told_with_its_value(tmp_path: Path) -> None:
    checkpoint = run_validations(tmp_path, VALUES, monitor="loss")
    assert (checkpoint.best_model_path, checkpoint.best_model_score) == (tmp_path / "step-0000002", 1.0)
    plain = run_validations(tmp_path / "b", VALUES)
    assert (plain.best_model_path, plain.best_model_score) == (tmp_path / "b" / "step-0000005", None)


def test_a_run_goes_on_from_the_folder_of_its_model_checkpoint(tmp_path: Path) -> None:
    def train(folder: Path, until: int) -> list[torch.Tensor]:
        """Save after each step, and stop there as if killed."""
        checkpoint = ModelCheckpoint(folder, every_n_steps=1)
        state = begin(checkpoint)
        state["fabric"].call("on_train_start", state=state)
        while state["epoch"] < 3:
            for (batch,) in state["loader"]:
                train_step(state, batch)
                state["fabric"].call("on_train_batch_end", state=state)
                if state["fabric"].steps == until:
                    return list(state["model"].parameters())
            state["epoch"] += 1
        return list(state["model"].parameters())

    whole = train(tmp_path / "whole", 15)
    train(tmp_path / "parts", 4)
    train(tmp_path / "parts", 9)
    resumed = train(tmp_path / "parts", 15)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(resumed, whole, strict=True))


def test_a_run_that_is_asked_to_leave_keeps_what_it_saves_then(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="loss", save_last=False)
    state = begin(checkpoint)
    fabric = state["fabric"]
    fabric.call("on_train_start", state=state)
    for value in (1.0, 2.0):
        state["optimizer"].step()
        fabric.call("on_validation_end", state=state, metrics={"loss": np.float32(value)})
    assert steps_in(tmp_path) == [1]
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(SystemExit) as leaving:
        for _ in range(2):
            state["optimizer"].step()
            fabric.call("on_train_batch_end", state=state)
    assert leaving.value.code == EXIT_PREEMPTED
    assert steps_in(tmp_path) == [1, fabric.steps]
    assert checkpoint.last_model_path == tmp_path / f"step-{fabric.steps:07d}"
    fabric.close()


def test_callbacks_can_be_pickled_for_other_processes() -> None:
    monitor = LearningRateMonitor()
    state = begin(monitor)
    state["optimizer"].step()
    pickle.loads(pickle.dumps([monitor, GradientNormMonitor(), DeviceMemoryMonitor(), SpikeDetection()]))


def test_learning_rates_of_all_optimizers_and_groups_are_logged_by_step() -> None:
    kept = Kept()
    fabric = Fabric(accelerator="cpu", devices=1, loggers=kept, callbacks=LearningRateMonitor(log_momentum=True))
    model = nn.Linear(2, 2)
    first = torch.optim.SGD([{"params": [model.weight], "lr": 0.5}, {"params": [model.bias]}], lr=0.25, momentum=0.9)
    second, third = torch.optim.Adam(model.parameters(), lr=0.125), torch.optim.Adam(model.parameters(), lr=0.0625)
    fabric.setup(model, first, second, third)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(first, 0.5)
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
        for optimizer in (first, second, third):
            optimizer.step()
        scheduler.step()
    assert kept.of("lr-SGD/pg1") == [(1, 0.5), (2, 0.25)]
    assert kept.of("lr-SGD/pg2") == [(1, 0.25), (2, 0.125)]
    assert kept.of("lr-SGD-momentum/pg1") == [(1, 0.9), (2, 0.9)]
    assert kept.of("lr-Adam") == [(1, 0.125), (2, 0.125)]
    assert kept.of("lr-Adam-1") == [(1, 0.0625), (2, 0.0625)]


def test_monitors_look_after_every_nth_step_of_the_whole_run(tmp_path: Path) -> None:
    kept = Kept()
    state = begin(LearningRateMonitor(every_n_steps=3), loggers=kept)
    for _ in range(4):
        state["optimizer"].step()
    state["fabric"].save(tmp_path / "a.ckpt", state)
    resumed = begin(LearningRateMonitor(every_n_steps=3), loggers=kept)
    resumed["fabric"].load(tmp_path / "a.ckpt", resumed)
    for _ in range(3):
        resumed["optimizer"].step()
    assert [step for step, _ in kept.of("lr-SGD")] == [3, 6]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_the_norm_of_a_steps_gradients_is_logged(precision: str) -> None:
    kept = Kept()
    state = begin(GradientNormMonitor(), loggers=kept, precision=precision)
    parameters = list(state["model"].parameters())
    expected = []
    for (batch,) in state["loader"]:
        state["fabric"].backward(state["model"](batch / 10).square().mean())
        expected.append(float(state["fabric"].clip_gradients(state["model"], state["optimizer"], max_norm=1e6)))
        state["optimizer"].step()
        state["optimizer"].zero_grad()
    assert all(parameter.grad is None for parameter in parameters)
    assert [step for step, _ in kept.of("grad_norm-SGD")] == [1, 2, 3, 4, 5, 6]
    assert [norm for _, norm in kept.of("grad_norm-SGD")] == pytest.approx(expected)


def test_memory_is_logged_in_bytes() -> None:
    kept = Kept()
    state = begin(DeviceMemoryMonitor(every_n_steps=2), loggers=kept)
    for _ in range(4):
        state["optimizer"].step()
    assert [step for step, _ in kept.rows] == [2, 4]
    resident, peak = kept.of("memory/resident_bytes")[-1][1], kept.of("memory/peak_bytes")[-1][1]
    assert 50e6 < resident <= peak * 1.05  # Python with torch; the two are counted at different moments


@pytest.mark.parametrize(
    ("options", "losses", "spike"),
    [
        ({}, [1.0, 1.1, 0.9, 9.0], 3),
        ({}, [9.0, 1.0, 1.1, 0.9], None),  # better
        ({"mode": "max"}, [1.0, 1.0, -9.0], 2),
        ({"warmup": 3}, [1.0, 9.0, 1.0, 60.0], 3),
        ({}, [1.0, 2.9, 1.9], None),  # within twice the mean
        ({"atol": 20.0}, [1.0, 9.0], None),
        ({"rtol": None, "atol": 0.5}, [1.0, 1.4, 2.0], 2),
        ({}, [1.0, math.nan], 1),
        ({}, [math.inf], 0),
        ({"finite_only": False}, [1.0, math.nan], None),
        ({"finite_only": False}, [1.0, math.nan, 9.0], 2),
        ({"rtol": None}, [1.0, 1.0, 1.1], 2),
        ({"window": 1}, [1.0, 2.0, 3.0, 8.0, 25.0], 4),
    ],
    ids=str,
)
def test_a_spike_is_a_jump_in_the_wrong_direction(
    options: dict[str, Any], losses: list[float], spike: int | None
) -> None:
    spikes = SpikeDetection(**options)
    fabric = begin(spikes)["fabric"]
    seen = 0
    with contextlib.suppress(TrainingSpikeError):
        for loss in losses:
            fabric.call("on_train_batch_end", fabric=fabric, loss=torch.tensor(loss), batch_idx=seen)
            seen += 1
    assert seen == (len(losses) if spike is None else spike)
    assert spikes.excluded == (set() if spike is None else {spike})


def test_spikes_are_noted_in_a_file_and_known_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "notes" / "skip.json"
    spikes = SpikeDetection(exclude_batches_path=path)
    state = begin(spikes)
    fabric = state["fabric"]
    fabric.call("on_train_batch_end", fabric=fabric, loss=1.0, batch_idx=0)
    fabric.save(tmp_path / "a.ckpt", state)
    with pytest.raises(TrainingSpikeError, match=r"batch 7, loss 90 on rank 0, before it 1"):
        fabric.call("on_train_batch_end", fabric=fabric, loss=90.0, batch_idx=7)
    assert json.loads(path.read_text()) == [7]

    again = SpikeDetection(exclude_batches_path=path)
    resumed = begin(again)
    resumed["fabric"].load(tmp_path / "a.ckpt", resumed)
    assert again.excludes(7)
    assert not again.excludes(8)
    with pytest.raises(TrainingSpikeError, match=r"batch 8, loss 90 on rank 0"):
        resumed["fabric"].call("on_train_batch_end", fabric=resumed["fabric"], loss=90.0, batch_idx=8)
    assert json.loads(path.read_text()) == [7, 8]


def test_two_callbacks_of_one_class_have_a_state_each(tmp_path: Path) -> None:
    first, second = EarlyStopping("a"), EarlyStopping("b")
    state = begin(first, second)
    first.step({"a": 1.0})
    second.step({"b": 2.0})
    state["fabric"].save(tmp_path / "a.ckpt", state)
    others = EarlyStopping("a"), EarlyStopping("b")
    resumed = begin(*others)
    resumed["fabric"].load(tmp_path / "a.ckpt", resumed)
    assert [one.best for one in others] == [1.0, 2.0]


def test_a_callback_that_is_new_after_a_resume_begins_afresh(tmp_path: Path) -> None:
    state = begin()
    state["fabric"].save(tmp_path / "a.ckpt", state)
    early = EarlyStopping("a")
    resumed = begin(early)
    resumed["fabric"].load(tmp_path / "a.ckpt", resumed)
    assert early.best is None
    resumed["fabric"].save(tmp_path / "b.ckpt", resumed)
    without = begin()
    without["fabric"].load(tmp_path / "b.ckpt", without)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: ModelCheckpoint(dirpath=folder), "dirpath: folder"),  # type: ignore[call-arg]
        (lambda folder: ModelCheckpoint(folder, every_n_train_steps=5), "every_n_train_steps: every_n_steps"),
        (lambda folder: ModelCheckpoint(folder, save_topk=5), "save_topk: save_top_k"),
        (lambda _: EarlyStopping("loss", verbose=True), "verbose: leave it out"),
    ],
)
def test_an_argument_of_lightnings_is_told_what_it_is_called_here(tmp_path: Path, make: Any, said: str) -> None:
    with pytest.raises(FabricTypeError, match=said):
        make(tmp_path / "saves")
