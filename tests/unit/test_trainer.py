"""A Trainer does what the loop by hand does, in all usual forms, and goes on where it was."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import fabric_lite.trainer as pl
from fabric_lite import Fabric
from fabric_lite.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from fabric_lite.errors import FabricRuntimeError, FabricTypeError, FabricValueError
from fabric_lite.loggers import CSVLogger
from tests.backends import BACKENDS
from tests.lit_models import LitModel, by_hand, data, digest, loader


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    defaults = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "enable_progress_bar": False}
    return pl.Trainer(**{**defaults, **options})


def fitted(folder: Path, model: Any = None, validation: Any = None, **options: Any) -> Any:
    """The trainer and the model after ``fit``."""
    torch.manual_seed(1)
    own = trainer(folder, **{"max_epochs": 2, "enable_checkpointing": False, "logger": False, **options})
    if model is None or isinstance(model, type):
        model = (model or LitModel)()
    own.fit(model, loader(), validation)
    return own, model


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "64-true"])
def test_it_gives_the_weights_of_the_loop_by_hand(tmp_path: Path, precision: str) -> None:
    _, mine = fitted(tmp_path, precision=precision)
    theirs = by_hand(Fabric(accelerator="cpu", devices=1, precision=precision), 2)
    assert digest(mine) == digest(theirs)


@pytest.mark.parametrize(("accumulate", "clip"), [(3, None), (5, None), (1, 0.1), (4, 0.05)])
def test_windows_and_clipping_are_those_of_the_loop_by_hand(
    tmp_path: Path, accumulate: int, clip: float | None
) -> None:
    own, mine = fitted(tmp_path, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    theirs = by_hand(Fabric(accelerator="cpu", devices=1), 2, accumulate=accumulate, clip=clip)
    assert digest(mine) == digest(theirs)
    assert own.global_step == 2 * math.ceil(12 / accumulate) == own.estimated_stepping_batches


def test_with_validation_and_a_schedule_it_is_still_the_loop_by_hand(tmp_path: Path) -> None:
    class Scheduled(LitModel):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    own, mine = fitted(tmp_path, Scheduled, loader(12))
    theirs = by_hand(
        Fabric(accelerator="cpu", devices=1),
        2,
        schedule=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        validation=loader(12),
    )
    assert digest(mine) == digest(theirs)
    assert mine.training
    assert own.callback_metrics["val_loss"] > 0


def configured(kind: str, model: nn.Module) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)
    by_step = {"scheduler": scheduler, "interval": "step", "frequency": 12}
    return {
        "an optimizer": optimizer,
        "a list": [optimizer],
        "two lists": ([optimizer], [scheduler]),
        "a dict": {"optimizer": optimizer},
        "a dict with a scheduler": {"optimizer": optimizer, "lr_scheduler": scheduler},
        "a dict with a scheduler's dict": {"optimizer": optimizer, "lr_scheduler": by_step},
        "a tuple of dicts": ({"optimizer": optimizer, "lr_scheduler": scheduler},),
        "plateau": {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}},
        "plateau, monitor beside it": {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "train_loss_epoch"},
        "none": None,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("an optimizer", 0.1),
        ("a list", 0.1),
        ("two lists", 0.025),
        ("a dict", 0.1),
        ("a dict with a scheduler", 0.025),
        ("a dict with a scheduler's dict", 0.025),
        ("a tuple of dicts", 0.025),
        ("plateau", 0.025),
        ("plateau, monitor beside it", 0.025),
        ("none", None),
    ],
)
def test_optimizers_come_in_all_usual_forms(tmp_path: Path, kind: str, rate: float | None) -> None:
    class Configured(LitModel):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.loss(self.model(batch[0]), batch[1])
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            return configured(kind, self)

    own, _ = fitted(tmp_path, Configured(), loader(12, shuffle=False))
    assert [optimizer.param_groups[0]["lr"] for optimizer in own.optimizers] == ([] if rate is None else [rate])


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("adam", FabricTypeError),
        ({"optimizer": 1, "lr_scheduler": {"schedule": 1}}, FabricValueError),
        ([[1], [{"scheduler": 1, "interval": "batch"}]], FabricValueError),
        (torch.optim.lr_scheduler.LRScheduler.__new__(torch.optim.lr_scheduler.StepLR), FabricTypeError),
    ],
    ids=["text", "an unknown key", "an unknown interval", "a scheduler alone"],
)
def test_other_forms_are_refused(tmp_path: Path, value: Any, error: type[Exception]) -> None:
    class Configured(LitModel):
        def configure_optimizers(self) -> Any:
            return value

    with pytest.raises(error):
        fitted(tmp_path, Configured())


def test_steps_by_hand_step_when_the_model_says(tmp_path: Path) -> None:
    class Two(LitModel):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(6, 3)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            for optimizer, part in zip(self.optimizers(), (self.model, self.other), strict=True):
                loss = self.loss(part(x), y)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            self.lr_schedulers().step()

        def configure_optimizers(self) -> Any:
            optimizers = [torch.optim.SGD(part.parameters(), lr=1.0) for part in (self.model, self.other)]
            return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 12, 0.5)]

    torch.manual_seed(1)
    model = Two()
    before = digest(model)
    own, _ = fitted(tmp_path, model)
    assert all(now != then for now, then in zip(digest(model), before, strict=True))
    assert own.optimizers[0].param_groups[0]["lr"] == 0.25


def test_several_optimizers_need_steps_by_hand(tmp_path: Path) -> None:
    class Two(LitModel):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=1.0) for _ in range(2)]

    with pytest.raises(FabricValueError, match="automatic_optimization = False"):
        fitted(tmp_path, Two())


ALL_HOOKS = [
    "setup", "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_backward",
    "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad", "on_train_batch_end",
    "on_validation_start", "on_validation_epoch_start", "on_validation_batch_start", "on_validation_batch_end",
    "on_validation_epoch_end", "on_validation_end", "on_train_epoch_end", "on_train_end", "on_fit_end", "teardown",
]  # fmt: skip


def test_hooks_of_model_and_callbacks_are_called_in_order(tmp_path: Path) -> None:
    class Hooked:
        def __init__(self) -> None:
            for name in ALL_HOOKS:
                setattr(self, name, lambda *args, name=name: seen.append((name, len(args))))

    class Model(LitModel):
        pass

    calls: list[tuple[str, int]] = []
    seen: list[tuple[str, int]] = []
    for name in ALL_HOOKS:
        setattr(Model, name, lambda _, *args, name=name: calls.append((name, len(args))))
    fitted(tmp_path, Model(), loader(4, shuffle=False), callbacks=Hooked(), limit_train_batches=1, max_epochs=1)
    assert [name for name, _ in calls] == ALL_HOOKS
    assert seen == [(name, count + 2) for name, count in calls]
    assert dict(calls)["on_train_batch_end"] == 3


def test_a_callback_takes_what_it_names(tmp_path: Path) -> None:
    class Mixed:
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append((trainer, pl_module, float(outputs["loss"]), len(batch), batch_idx))

        def on_train_epoch_end(self, *, fabric: Any, metrics: Any) -> None:
            seen.append((fabric, sorted(metrics)))

    seen: list[Any] = []
    own, model = fitted(tmp_path, callbacks=Mixed(), limit_train_batches=2, max_epochs=1)
    assert [entry[:2] + entry[3:] for entry in seen[:2]] == [(own, model, 2, 0), (own, model, 2, 1)]
    assert seen[2] == (own.fabric, ["train_loss"])


def test_what_steps_log_is_sent_step_by_step_and_put_together_by_epoch(tmp_path: Path) -> None:
    class Logs(LitModel):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("number", float(batch_idx), on_step=True, on_epoch=True, prog_bar=True)
            self.log_dict({"largest": batch_idx, "all": torch.tensor(1)}, on_epoch=True, on_step=False, reduce_fx="max")
            self.log("total", torch.tensor(1.0), on_epoch=True, on_step=False, reduce_fx="sum")
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            self.log("after", 7.0)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", float(batch_idx))

    own, _ = fitted(
        tmp_path,
        Logs(),
        DataLoader(data(10), batch_size=4),
        logger=CSVLogger(tmp_path, "logs"),
        log_every_n_steps=4,
    )
    found = BACKENDS[0].scalars(tmp_path, own.fabric.logger)
    assert found["number_step"] == [(step, float((step - 1) % 12)) for step in (4, 8, 12, 16, 20, 24)]
    assert found["number_epoch"] == [(12, 5.5), (24, 5.5)]
    assert found["largest"] == [(12, 11.0), (24, 11.0)]
    assert found["total"] == [(12, 12.0), (24, 12.0)]
    # Weighted by the sizes of the batches, 4, 4 and 2.
    assert found["val"] == [(12, pytest.approx(0.8)), (24, pytest.approx(0.8))]
    assert own.callback_metrics["after"] == 7.0


def test_values_are_logged_from_within_steps(tmp_path: Path) -> None:
    _, model = fitted(tmp_path)
    with pytest.raises(FabricRuntimeError, match="log\\('late'"):
        model.log("late", 1.0)
    with pytest.raises(FabricRuntimeError, match="No Trainer runs this LitModel"):
        LitModel().log("early", 1.0)


def test_testing_and_predicting_return_what_there_is(tmp_path: Path) -> None:
    class Tested(LitModel):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            self.log("test", float(dataloader_idx))

    own, model = fitted(tmp_path, Tested())
    batches = DataLoader(data(10), batch_size=4)
    assert own.test(model, batches) == [{"test": 0.0}]
    assert own.test(dataloaders=[batches, DataLoader(data(4), batch_size=2)]) == [
        {"test/dataloader_idx_0": 0.0},
        {"test/dataloader_idx_1": 1.0},
    ]
    assert own.validate(model, batches)[0].keys() == {"val_loss"}
    predictions = own.predict(model, DataLoader(data(10).tensors[0], batch_size=4))
    assert [len(one) for one in predictions] == [4, 4, 2]
    assert not any(one.requires_grad for one in predictions)
    model.eval()
    assert torch.allclose(torch.cat(predictions), model.forward(data(10).tensors[0]))


def test_a_model_without_a_step_says_so(tmp_path: Path) -> None:
    own, model = fitted(tmp_path)
    with pytest.raises(FabricRuntimeError, match="has no test_step"):
        own.test(model, loader())
    with pytest.raises(FabricValueError, match="There is no data"):
        own.test(model)
    with pytest.raises(FabricValueError, match="There is no model"):
        trainer(tmp_path).validate()


def test_loaders_may_be_the_models_own(tmp_path: Path) -> None:
    class Own(LitModel):
        def train_dataloader(self) -> Any:
            return loader(8)

        def val_dataloader(self) -> Any:
            return [loader(4), loader(4)]

    own = trainer(tmp_path, max_epochs=1)
    own.fit(Own())
    assert own.global_step == 2
    assert {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"} <= own.callback_metrics.keys()


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"limit_train_batches": 3}, 6),
        ({"limit_train_batches": 99}, 24),
        ({"limit_train_batches": 0.5}, 12),
        ({"max_steps": 5}, 5),
        ({"max_steps": 30, "max_epochs": None}, 30),
        ({"fast_dev_run": True}, 1),
        ({"fast_dev_run": 3}, 3),
        ({"max_epochs": 0}, 0),
    ],
    ids=str,
)
def test_it_makes_as_many_steps_as_it_is_told(tmp_path: Path, options: dict[str, Any], steps: int) -> None:
    own, _ = fitted(tmp_path, **options)
    assert own.global_step == steps


def test_data_of_unknown_length_is_trained_on_to_its_end(tmp_path: Path) -> None:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter([(torch.ones(6), torch.tensor(1))] * 7)

    torch.manual_seed(1)
    own = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, logger=False)
    own.fit(LitModel(), DataLoader(Stream(), batch_size=1))
    assert own.global_step == 8


def test_hyperparameters_are_kept_logged_and_saved(tmp_path: Path) -> None:
    class Sized(LitModel):
        def __init__(self, width: int, net: nn.Module, rate: float = 0.1, **others: Any) -> None:
            super().__init__()
            self.save_hyperparameters(ignore="others")
            self.head = nn.Linear(width, 1)

    model = Sized(4, nn.Linear(1, 1), extra="text")
    assert model.hparams == {"width": 4, "rate": 0.1, "extra": "text"}
    assert model.hparams.width == 4
    own = trainer(tmp_path, max_epochs=1, limit_train_batches=1)
    own.fit(model, loader())
    assert BACKENDS[0].params(tmp_path, own.fabric.logger)["width"] == 4
    path = own.checkpoint_callback.best_model_path
    assert path == Path(own.fabric.logger.log_dir) / "checkpoints" / "last.ckpt"
    again = Sized.load_from_checkpoint(path, net=nn.Linear(1, 1), rate=0.5)
    assert again.hparams == {"width": 4, "rate": 0.5, "extra": "text"}
    assert digest(again) == digest(model)
    assert torch.load(path, weights_only=True)["state_dict"].keys() == model.state_dict().keys()


def test_what_the_model_adds_to_a_checkpoint_comes_back(tmp_path: Path) -> None:
    class Adds(LitModel):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["note"] = [1, 2]

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            loaded.append(checkpoint)

    loaded: list[Any] = []
    own, _ = fitted(tmp_path, Adds())
    own.save_checkpoint(tmp_path / "a.ckpt")
    trainer(tmp_path, max_epochs=2).fit(Adds(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert loaded == [{"note": [1, 2]}]


class Dies(Exception):
    pass


class DiesAt:
    """Ends the training in the middle of it."""

    def __init__(self, hook: str, call: int) -> None:
        self.left = call
        setattr(self, hook, self.count)

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Dies


class Full(LitModel):
    """All that has a state: schedulers of each kind, values of an epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("epoch_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.9, patience=0, threshold=1e9)
        return [optimizer], [
            torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9),
            {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99), "interval": "step"},
            {"scheduler": plateau, "monitor": "val_loss"},
        ]


def callbacks(folder: Path, checkpoint: dict[str, Any]) -> list[Any]:
    return [EarlyStopping("val_loss", patience=50), LearningRateMonitor(), ModelCheckpoint(folder, **checkpoint)]


@pytest.mark.parametrize("shuffled_validation", [False, True])
@pytest.mark.parametrize(
    ("checkpoint", "hook", "call"),
    [
        ({"every_n_steps": 1}, "on_train_batch_end", 5),
        ({"every_n_steps": 1}, "on_train_batch_end", 12),
        ({"every_n_steps": 1}, "on_train_batch_end", 13),
        ({"every_n_steps": 5}, "on_train_batch_start", 20),
        ({"every_n_steps": 12}, "on_validation_batch_start", 2),
        ({"monitor": "val_loss"}, "on_train_epoch_end", 1),
        ({"monitor": "val_loss"}, "on_train_batch_start", 30),
        ({}, "on_train_batch_start", 26),
        ({}, "on_validation_end", 2),
        ({"monitor": "val_loss", "every_n_steps": 4}, "on_validation_batch_start", 5),
    ],
    ids=str,
)
def test_a_run_that_dies_goes_on_to_the_same_weights_and_logs(
    tmp_path: Path, checkpoint: dict[str, Any], hook: str, call: int, shuffled_validation: bool
) -> None:
    def run(folder: Path, *extra: Any) -> tuple[Any, Any]:
        torch.manual_seed(1)
        own = trainer(
            folder,
            max_epochs=3,
            callbacks=[*callbacks(folder / "checkpoints", checkpoint), *extra],
            logger=CSVLogger(folder),
            log_every_n_steps=1,
        )
        model = Full()
        own.fit(model, loader(), loader(12, shuffle=shuffled_validation))
        return own, model

    whole, expected = run(tmp_path / "whole")
    with pytest.raises(Dies):
        run(tmp_path / "parts", DiesAt(hook, call))
    resumed, model = run(tmp_path / "parts")
    assert digest(model) == digest(expected)
    assert resumed.global_step == whole.global_step == 36
    assert BACKENDS[0].scalars(tmp_path, resumed.fabric.logger) == BACKENDS[0].scalars(tmp_path, whole.fabric.logger)


@pytest.mark.parametrize(
    ("accumulate", "hook", "call"), [(1, "on_validation_batch_start", 4), (3, "on_train_batch_start", 9)]
)
def test_a_run_that_validates_within_epochs_goes_on_to_the_same_weights(
    tmp_path: Path, accumulate: int, hook: str, call: int
) -> None:
    def run(folder: Path, *extra: Any) -> tuple[Any, Any, Any]:
        torch.manual_seed(1)
        early = EarlyStopping("val_loss", patience=50)
        own = trainer(
            folder,
            max_epochs=2,
            val_check_interval=4,
            accumulate_grad_batches=accumulate,
            callbacks=[early, ModelCheckpoint(folder, monitor="val_loss", every_n_steps=1), *extra],
            logger=False,
        )
        model = Full()
        own.fit(model, loader(), loader(8))
        return digest(model), own.global_step, early.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(Dies):
        run(tmp_path / "parts", DiesAt(hook, call))
    assert run(tmp_path / "parts") == whole


def test_the_newest_of_several_checkpoints_is_resumed_and_only_by_the_first_fit(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        last = ModelCheckpoint(tmp_path / "last", every_n_steps=1)
        return [last, ModelCheckpoint(tmp_path / "best", monitor="val_loss")]

    own, _ = fitted(tmp_path, validation=loader(4), callbacks=callbacks(), max_epochs=1)
    resumed, model = fitted(tmp_path, validation=loader(4), callbacks=callbacks(), max_epochs=2)
    assert (own.global_step, resumed.global_step) == (12, 24)
    before = digest(model)
    resumed.fit(model, loader(), loader(4))
    assert resumed.global_step == 48
    assert digest(model) != before


def test_a_dry_run_touches_no_checkpoints(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "a", monitor="val_loss")
    fitted(tmp_path, validation=loader(4), callbacks=checkpoint, fast_dev_run=True)
    assert not (tmp_path / "a").exists()


def test_a_copy_of_the_model_has_no_trainer(tmp_path: Path) -> None:
    _, model = fitted(tmp_path)
    copied = copy.deepcopy(model)
    assert copied._trainer is None
    assert digest(copied) == digest(model)
    assert pickle.loads(pickle.dumps(model))._trainer is None


@pytest.mark.parametrize("value", [torch.ones(2), "text", None], ids=str)
def test_what_is_no_number_is_not_logged(tmp_path: Path, value: Any) -> None:
    class Logs(LitModel):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.log("odd", value)

    with pytest.raises(FabricTypeError, match="log\\('odd'"):
        fitted(tmp_path, Logs())


def test_a_scheduler_whose_value_nobody_logs_is_an_error(tmp_path: Path) -> None:
    class Waits(LitModel):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "valid_loss"}

    with pytest.raises(KeyError, match="valid_loss"):
        fitted(tmp_path, Waits(), loader(4))


def test_early_stopping_stops_and_a_resumed_run_stays_stopped(tmp_path: Path) -> None:
    class Worse(LitModel):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", float(self.current_epoch))

    def run() -> pl.Trainer:
        own = trainer(
            tmp_path,
            max_epochs=9,
            callbacks=[EarlyStopping("val_loss", patience=2), ModelCheckpoint(tmp_path / "a", monitor="val_loss")],
        )
        torch.manual_seed(1)
        own.fit(Worse(), loader(8), loader(4))
        return own

    first = run()
    assert (first.current_epoch, first.global_step) == (3, 6)
    assert run().global_step == 6


def test_a_callback_that_would_wait_for_ever_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FabricValueError, match=r"EarlyStopping\(monitor='val_loss'\) and no val_dataloaders"):
        fitted(tmp_path, callbacks=EarlyStopping("val_loss"))
    own, _ = fitted(tmp_path, callbacks=EarlyStopping("train_loss", check_on_train_epoch_end=True))
    assert own.current_epoch == 2


def test_fitting_again_goes_on_with_the_same_model(tmp_path: Path) -> None:
    own, model = fitted(tmp_path)
    before = digest(model)
    own.fit(model, loader())
    assert digest(model) != before
    assert (own.current_epoch, own.global_step) == (2, 48)


def test_a_validation_by_itself_neither_saves_nor_stops(tmp_path: Path) -> None:
    checkpoint, early = ModelCheckpoint(tmp_path / "a", monitor="val_loss", save_top_k=-1), EarlyStopping("val_loss")
    own, model = fitted(tmp_path, validation=loader(4), callbacks=[checkpoint, early])
    before = early.state_dict()
    for _ in range(5):
        own.validate(model, loader(8))
    assert early.state_dict() == before
    assert len(list((tmp_path / "a").glob("step-*"))) == 2


def test_parts_that_do_not_train_are_left_so_by_a_validation(tmp_path: Path) -> None:
    class Frozen(LitModel):
        def on_train_start(self) -> None:
            self.model.layers[2].eval()

        def on_validation_start(self) -> None:
            assert not any(part.training for part in self.modules())

    _, model = fitted(tmp_path, Frozen(), loader(4))
    assert [part.training for part in (model, model.model, model.model.layers[2])] == [True, True, False]


def test_an_unknown_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="max_epoch"):
        trainer(tmp_path, max_epoch=3)
    with pytest.raises(FabricValueError, match="gradient_clip_algorithm='both'"):
        trainer(tmp_path, gradient_clip_algorithm="both")


def test_the_default_saves_after_each_epoch_beside_the_logs(tmp_path: Path) -> None:
    for version in range(2):
        own = trainer(tmp_path, max_epochs=2)
        own.fit(LitModel(), loader(8))
        folder = tmp_path / "fabric_logs" / f"version_{version}"
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoints"]
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
        assert own.checkpoint_callback.best_model_path == folder / "checkpoints" / "last.ckpt"
