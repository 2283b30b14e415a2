"""Callbacks and loggers on several ranks: all stop at the same step, and rank 0 alone writes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_lite import Fabric
from fabric_lite.callbacks import (
    DeviceMemoryMonitor,
    EarlyStopping,
    GradientNormMonitor,
    ModelCheckpoint,
    SpikeDetection,
)
from fabric_lite.callbacks.spike_detection import TrainingSpikeError
from fabric_lite.errors import FabricError
from fabric_lite.loggers import CSVLogger
from fabric_lite.testing import RankPool
from tests.backends import BACKENDS


def begin(strategy: str, *callbacks: Any, **arguments: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", strategy=strategy, callbacks=list(callbacks), **arguments)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return {"fabric": fabric, "model": model, "optimizer": optimizer}


def step(state: dict[str, Any]) -> None:
    fabric = state["fabric"]
    batch = torch.full((2, 4), 1.0 + fabric.global_rank)
    fabric.backward(state["model"](batch).square().mean())
    state["optimizer"].step()


def stops_at() -> int:
    """Each rank sees other values; rank 0's get better for three rounds."""
    early = EarlyStopping("loss", patience=1)
    state = begin("ddp", early)
    fabric = state["fabric"]
    count = 0
    while not early.should_stop:
        value = 1.0 / (count + 1) if fabric.global_rank else [3.0, 2.0, 1.0, 1.5][count]
        fabric.call("on_validation_end", metrics={"loss": value})
        count += 1
    fabric.close()
    return count


def test_all_ranks_stop_at_the_same_time(ranks: RankPool) -> None:
    assert ranks.run(stops_at) == [4, 4]


def misses_the_value() -> str:
    fabric = begin("ddp")["fabric"]
    try:
        EarlyStopping("val_loss").step({"loss": 1.0} if fabric.global_rank == 0 else {"val_loss": 1.0})
    except FabricError as error:
        return str(error)
    finally:
        fabric.close()
    return "nothing"


def test_a_missing_value_is_an_error_on_all_ranks(ranks: RankPool) -> None:
    assert all("val_loss" in message for message in ranks.run(misses_the_value))


def jumps(path: Path) -> tuple[int, list[int]]:
    """The loss of rank 1 alone jumps, at its third batch."""
    spikes = SpikeDetection(exclude_batches_path=path)
    fabric = begin("ddp", spikes)["fabric"]
    seen = 0
    with contextlib.suppress(TrainingSpikeError):
        for loss in [1.0, 1.0, 50.0 if fabric.global_rank else 1.0, 1.0]:
            fabric.call("on_train_batch_end", fabric=fabric, loss=loss, batch_idx=seen)
            seen += 1
    fabric.close()
    return seen, sorted(spikes.excluded)


def test_a_spike_on_one_rank_is_raised_on_all(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(jumps, tmp_path / "skip.json") == [(2, [2])] * 2
    assert (tmp_path / "skip.json").read_text() == "[2]\n"


def logs(folder: Path, strategy: str) -> tuple[list[float], Any]:
    """The norms that clipping returns, and the logger."""
    logger = CSVLogger(folder)
    state = begin(strategy, GradientNormMonitor(), DeviceMemoryMonitor(every_n_steps=2), loggers=logger)
    fabric, norms = state["fabric"], []
    for _ in range(2):
        batch = torch.full((2, 4), 1.0 + fabric.global_rank)
        fabric.backward(state["model"](batch).square().mean())
        norms.append(float(fabric.clip_gradients(state["model"], state["optimizer"], max_norm=1e6)))
        state["optimizer"].step()
        state["optimizer"].zero_grad()
    fabric.log("rank", fabric.global_rank)
    fabric.close()
    return norms, logger.version


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_monitors_log_what_all_ranks_have_and_rank_zero_writes_it(
    ranks: RankPool, tmp_path: Path, strategy: str
) -> None:
    (norms, version), (others, no_version) = ranks.run(logs, tmp_path, strategy)
    assert (version, no_version, norms) == (0, None, others)
    found = BACKENDS[0].scalars(tmp_path, CSVLogger(tmp_path, version=0))
    assert [value for _, value in found["grad_norm-SGD"]] == pytest.approx(norms)
    assert found["memory/peak_bytes"][0][1] > 50e6
    assert [value for _, value in found["rank"]] == [0.0]


def saves_and_resumes(folder: Path, strategy: str) -> tuple[list[str], int, float | None]:
    checkpoint = ModelCheckpoint(folder, monitor="loss", save_top_k=1)
    state = begin(strategy, checkpoint)
    fabric = state["fabric"]
    for value in (2.0, 1.0, 3.0):
        step(state)
        fabric.call("on_train_batch_end", state=state)
        fabric.call("on_validation_end", state=state, metrics={"loss": value + fabric.global_rank})
    fabric.close()
    again = ModelCheckpoint(folder, monitor="loss", save_top_k=1)
    resumed = begin(strategy, again)
    resumed["fabric"].call("on_train_start", state=resumed)
    result = sorted(path.name for path in folder.glob("step-*")), resumed["fabric"].steps, again.best_model_score
    resumed["fabric"].close()
    return result


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_keep_the_best_and_the_last_and_go_on_from_it(ranks: RankPool, tmp_path: Path, strategy: str) -> None:
    assert ranks.run(saves_and_resumes, tmp_path, strategy) == [(["step-0000002", "step-0000003"], 3, 1.0)] * 2
