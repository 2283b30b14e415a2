"""What loggers and callbacks know after a Trainer's run was killed, or had ended, and goes on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

import fabric_lite.trainer as pl
from fabric_lite import FabricValueError
from fabric_lite.loggers import CSVLogger
from tests.lit_models import LitModel, loader
from tests.unit.test_trainer_edges import Kept, Stop, fitted, seeded, trainer


class Late(pl.Callback):
    """Logs in each hook in which a ModelCheckpoint saves."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, number: int) -> None:
        pl_module.log("after_batch", float(number))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.log("after_validation", float(trainer.global_step))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.log("after_epoch", float(trainer.current_epoch))


class Killed(LitModel):
    stops_at: int | None = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == self.stops_at:
            raise Stop


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("saves", "stops_at"),
    [
        ({"every_n_steps": 1}, 5),
        ({"every_n_steps": 1}, 12),
        ({"monitor": "val_loss"}, 12),
        ({"monitor": "train_loss", "check_on_train_epoch_end": True}, 12),
    ],
    ids=["after a step", "after a step that ends an epoch", "after a validation", "after an epoch"],
)
def test_what_a_callback_logs_just_before_a_save_is_there_after_a_kill(
    tmp_path: Path, saves: dict[str, Any], stops_at: int
) -> None:
    def run(name: str, stops_at: int | None) -> Path:
        logger = CSVLogger(tmp_path / "logs", name)
        model = seeded(Killed)
        model.stops_at = stops_at
        callbacks = [Late(), pl.ModelCheckpoint(tmp_path / name, **saves)]
        own = trainer(tmp_path, callbacks=callbacks, logger=logger, log_every_n_steps=1)
        fitted(own, model, loader(4))
        return Path(logger.log_dir)

    whole = rows(run("whole", None))
    with pytest.raises(Stop):
        run("parts", stops_at)
    assert rows(run("parts", None)) == whole
    last = [row for row in whole if row["after_epoch"]]
    assert [(row["step"], row["after_epoch"]) for row in last] == [("12", "0.0"), ("24", "1.0")]


def test_a_run_that_has_ended_within_an_epoch_does_nothing_when_started_again(tmp_path: Path) -> None:
    class Logs(LitModel):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("mean", float(batch_idx), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    def run(steps: int) -> tuple[pl.EarlyStopping, Kept]:
        early = pl.EarlyStopping("never_better", patience=9, check_on_train_epoch_end=True)
        kept = Kept()
        model = seeded(Logs)
        model.on_train_epoch_end = lambda: model.log("never_better", 1.0)
        saves = pl.ModelCheckpoint(tmp_path / "saves")
        fitted(trainer(tmp_path, callbacks=[early, saves], logger=kept, max_steps=steps), model)
        return early, kept

    early, kept = run(17)
    assert early.waited == 1
    assert kept.of("mean") == [(12, 5.5), (17, 2.0)]
    early, kept = run(17)
    assert early.waited == 1
    assert kept.of("mean") == []
    early, kept = run(-1)
    assert early.waited == 2
    assert kept.of("mean") == [(24, 5.5)]


@pytest.mark.filterwarnings("ignore:The gradients of the latest")
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("batch", [0, 7])
def test_a_save_within_a_window_counts_no_batch_twice(tmp_path: Path, accumulate: int, batch: int) -> None:
    class Saves(LitModel):
        path: Path | None = None

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("mean", float(batch_idx), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def on_after_backward(self) -> None:
            self.seen += 1
            if self.path is not None and self.seen == batch + 1:
                self.trainer.save_checkpoint(self.path)

    def run(path: Path | None, **options: Any) -> Kept:
        kept, model = Kept(), seeded(Saves)
        model.path, model.seen = path, 0
        own = trainer(tmp_path, logger=kept, max_epochs=1, accumulate_grad_batches=accumulate)
        fitted(own, model, **options)
        return kept

    path = tmp_path / "by_hand.ckpt"
    assert run(path).of("mean") == [(12 // accumulate, 5.5)]
    assert run(None, ckpt_path=path).of("mean") == [(12 // accumulate, 5.5)]


def test_what_is_logged_before_the_first_epoch_is_a_part_of_it(tmp_path: Path) -> None:
    model, kept = seeded(), Kept()
    model.on_train_start = lambda: model.log("at_start", 3.0)
    fitted(trainer(tmp_path, logger=kept), model)
    assert kept.of("at_start") == [(12, 3.0)]


def test_an_optimizer_that_needs_a_closure_is_refused_and_can_step_by_hand(tmp_path: Path) -> None:
    class Closing(LitModel):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=2)

    with pytest.raises(FabricValueError, match="LBFGS"):
        fitted(trainer(tmp_path), seeded(Closing))

    class ByHand(Closing):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss = self.loss(self(batch[0]), batch[1])
                self.manual_backward(loss)
                return loss

            optimizer.step(closure)

    fitted(own := trainer(tmp_path, max_epochs=1), seeded(ByHand))
    assert own.global_step == 12


def test_a_test_refuses_only_what_it_would_have_called(tmp_path: Path) -> None:
    class Steps(LitModel):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("number", float(batch_idx))

        def optimizer_step(self) -> None:
            pass

    assert trainer(tmp_path).test(Steps(), loader(8)) == [{"number": 0.5}]

    class Moves(Steps):
        def transfer_batch_to_device(self, batch: Any) -> Any:
            return batch

    with pytest.raises(FabricValueError, match="transfer_batch_to_device"):
        trainer(tmp_path).test(Moves(), loader(8))
