"""A Trainer where runs end in the middle, hooks log late, and arguments or models do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import fabric_lite.trainer as pl
from fabric_lite import FabricKeyError, FabricRuntimeError, FabricTypeError, FabricValueError
from fabric_lite.loggers import Logger
from tests.lit_models import LitModel, data, digest, loader


class Kept(Logger):
    """Keeps the rows."""

    def __init__(self) -> None:
        super().__init__(".", "kept")
        self.rows: list[tuple[int, dict[str, float]]] = []

    def write_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))

    def write_params(self, params: dict[str, Any]) -> None:
        pass

    def of(self, name: str) -> list[tuple[int, float]]:
        return [(step, row[name]) for step, row in self.rows if name in row]


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    defaults = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "enable_progress_bar": False}
    return pl.Trainer(**{**defaults, "max_epochs": 2, "enable_checkpointing": False, "logger": False, **options})


def seeded(kind: Any = LitModel) -> Any:
    torch.manual_seed(1)
    return kind()


def fitted(own: pl.Trainer, model: Any = None, validation: Any = None, batches: Any = None, **options: Any) -> Any:
    model = seeded() if model is None else model
    torch.manual_seed(1)
    own.fit(model, loader() if batches is None else batches, validation, **options)
    return model


def test_what_hooks_log_after_a_batch_and_an_epoch_is_of_that_batch_and_epoch(tmp_path: Path) -> None:
    class Late(LitModel):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("number", float(batch_idx), on_epoch=False)

    class Logs(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            pl_module.log("epoch", float(trainer.current_epoch))

        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            pl_module.log("validated", float(trainer.current_epoch))

        def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            pl_module.log("at_last", float(trainer.current_epoch))

    kept = Kept()
    fitted(trainer(tmp_path, callbacks=Logs(), logger=kept, log_every_n_steps=1), seeded(Late), loader(12))
    assert kept.of("number") == [(1 + step, float(step % 12)) for step in range(24)]
    for name in ("epoch", "validated", "at_last"):
        assert kept.of(name) == [(12, 0.0), (24, 1.0)], name


def test_a_run_that_max_steps_ends_within_an_epoch_goes_on_there(tmp_path: Path) -> None:
    class Scheduled(LitModel):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    whole = fitted(trainer(tmp_path), seeded(Scheduled))
    for steps in (5, 17, -1):
        saves = pl.ModelCheckpoint(tmp_path / "parts")
        parts = fitted(own := trainer(tmp_path, callbacks=saves, max_steps=steps), seeded(Scheduled))
    assert own.global_step == 24
    assert digest(parts) == digest(whole)


def test_a_fit_after_one_that_was_cut_sees_whole_epochs_in_the_next_order(tmp_path: Path) -> None:
    class Counts(LitModel):
        def on_fit_start(self) -> None:
            self.sizes = 0

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.sizes += len(batch[0])
            return super().training_step(batch, batch_idx)

    own, batches = trainer(tmp_path, max_epochs=1), loader()
    own.should_stop = False
    model = Counts()
    model.on_train_batch_end = lambda *_: setattr(own, "should_stop", True)
    own.fit(model, batches)
    assert model.sizes == 4
    del model.on_train_batch_end
    own.fit(model, batches)
    assert model.sizes == 48


class Stop(Exception):
    pass


def test_a_run_killed_in_the_validation_that_would_end_it_ends_there_when_it_goes_on(tmp_path: Path) -> None:
    class Validated(LitModel):
        stops_at: int | None = None

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", float(self.trainer.global_step))  # never gets better

        def on_validation_end(self) -> None:
            if self.trainer.global_step == self.stops_at:
                raise Stop

    def run(folder: Path, stops_at: int | None) -> Any:
        early = pl.EarlyStopping("val_loss", patience=1)
        saves = pl.ModelCheckpoint(folder, every_n_steps=1)
        model = seeded(Validated)
        model.stops_at = stops_at
        own = trainer(tmp_path, callbacks=[early, saves], val_check_interval=2)
        return own, fitted(own, model, loader(4))

    whole, model = run(tmp_path / "whole", None)
    assert whole.global_step == 4
    with pytest.raises(Stop):
        run(tmp_path / "parts", 4)
    parts, other = run(tmp_path / "parts", None)
    assert parts.global_step == 4
    assert digest(model) == digest(other)


def test_metrics_that_a_scheduler_waits_for_are_in_a_checkpoint(tmp_path: Path) -> None:
    class Plateau(LitModel):
        stops_at: int | None = None

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss", "interval": "step"},
            }

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == self.stops_at:
                raise Stop

    def run(folder: Path, stops_at: int | None) -> Any:
        model = seeded(Plateau)
        model.stops_at = stops_at
        own = trainer(tmp_path, callbacks=pl.ModelCheckpoint(folder, every_n_steps=1))
        return fitted(own, model, loader(4)), own.optimizers[0].param_groups[0]["lr"]

    model, rate = run(tmp_path / "whole", None)
    with pytest.raises(Stop):
        run(tmp_path / "parts", 15)
    other, found = run(tmp_path / "parts", None)
    assert found == rate < 1e-3
    assert digest(model) == digest(other)


def test_gradients_that_somebody_has_left_are_no_part_of_the_first_step(tmp_path: Path) -> None:
    clean = fitted(trainer(tmp_path))
    model = seeded()
    model(data(4).tensors[0]).sum().backward()
    assert digest(fitted(trainer(tmp_path), model)) == digest(clean)


def test_a_validation_that_fails_leaves_the_model_in_training_mode_and_is_told(tmp_path: Path) -> None:
    class Fails(LitModel):
        told: BaseException | None = None

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise Stop

        def on_exception(self, error: BaseException) -> None:
            self.told = error

    model = seeded(Fails)
    with pytest.raises(Stop):
        fitted(trainer(tmp_path), model, loader(4))
    assert model.training
    assert isinstance(model.told, Stop)


def test_a_scheduler_that_takes_no_metric_is_not_given_one(tmp_path: Path) -> None:
    class Watched(LitModel):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

    model = seeded(Watched)
    before = model.configure_optimizers()["optimizer"].param_groups[0]["lr"]
    fitted(own := trainer(tmp_path), model, loader(4))
    assert own.optimizers[0].param_groups[0]["lr"] == pytest.approx(before / 100)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0"),
        ({"log_every_n_steps": 0}, "log_every_n_steps=0"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch=0"),
        ({"val_check_interval": 0}, "val_check_interval=0"),
        ({"val_check_interval": 1.5}, r"val_check_interval=1\.5"),
        ({"val_check_interval": None}, "val_check_interval=None"),
        ({"accumulate_grad_batches": {0: 2}}, "accumulate_grad_batches={0: 2}"),
        ({"max_steps": 2.0}, r"max_steps=2\.0"),
        ({"fast_dev_run": -1}, "fast_dev_run=-1"),
        ({"limit_train_batches": -1}, "limit_train_batches=-1"),
        ({"limit_val_batches": 2.5}, r"limit_val_batches=2\.5"),
        ({"max_epochs": -3}, "max_epochs=-3"),
        ({"max_steps": -2}, "max_steps=-2"),
        ({"gradient_clip_val": -1.0}, r"gradient_clip_val=-1\.0"),
        ({"gradient_clip_algorithm": "sum"}, "gradient_clip_algorithm='sum'"),
        ({"enable_checkpointing": None}, "enable_checkpointing=None"),
        ({"enable_progress_bar": None}, "enable_progress_bar=None"),
    ],
)
def test_an_argument_that_means_nothing_is_refused(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(FabricValueError, match=named):
        trainer(tmp_path, **options)


def test_an_argument_that_there_is_not_is_named(tmp_path: Path) -> None:
    for name, said in (
        ("enable_model_summary", "enable_model_summary: leave it out"),
        ("max_epoch", "max_epoch: max_epochs"),
        ("gpus", 'gpus: accelerator="gpu", devices='),
        ("zzz", "zzz: there is none like it"),
        ("min_epochs", "min_epochs: a larger patience"),
        ("max_time", "max_time: a callback that sets trainer.should_stop"),
        ("overfit_batches", "overfit_batches: limit_train_batches=, and a loader that does not shuffle"),
        ("reload_dataloaders_every_n_epochs", "reload_dataloaders_every_n_epochs: one loader"),
    ):
        with pytest.raises(FabricTypeError, match=f"{name}[\\s\\S]*{said}"):
            trainer(tmp_path, **{name: 1})


def test_a_model_that_is_none_of_lightnings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FabricTypeError, match=r"LightningModule[\s\S]*Linear"):
        trainer(tmp_path).fit(torch.nn.Linear(6, 3), loader())  # type: ignore[arg-type]


def test_a_fit_that_can_train_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class NoOptimizer(LitModel):
        def configure_optimizers(self) -> None:
            super().configure_optimizers()  # and no return

    class NoLoss(LitModel):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)  # and no return

    for kind, said in ((NoOptimizer, "returned no optimizer"), (NoLoss, "returned a loss"), (LitModel, None)):
        fitted(trainer(tmp_path), seeded(kind))
        told = capsys.readouterr()
        lines = [line for line in (told.out + told.err).splitlines() if "returned" in line]
        assert [said in line for line in lines] == ([] if said is None else [True])


def test_a_validation_that_would_never_come_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FabricValueError, match="val_check_interval=13, 12 batches"):
        fitted(trainer(tmp_path, val_check_interval=13), None, loader(4))


def test_a_model_whose_own_step_would_not_be_called_is_refused(tmp_path: Path) -> None:
    class Own(LitModel):
        def optimizer_step(self) -> None:
            pass

    with pytest.raises(FabricValueError, match="optimizer_step"):
        fitted(trainer(tmp_path), seeded(Own))


def test_steps_that_never_come_are_said(tmp_path: Path) -> None:
    with pytest.raises(FabricRuntimeError, match="without a step"):
        fitted(trainer(tmp_path, max_epochs=None, max_steps=3), None, None, DataLoader(data(4), 8, drop_last=True))


def test_a_dict_without_a_loss_is_refused_and_may_be_returned_by_steps_made_by_hand(tmp_path: Path) -> None:
    class NoLoss(LitModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"x": 1}

    with pytest.raises(FabricTypeError, match="no loss"):
        fitted(trainer(tmp_path), seeded(NoLoss))
    model = seeded(NoLoss)
    model.automatic_optimization = False
    fitted(trainer(tmp_path, callbacks=pl.ModelCheckpoint(tmp_path / "saves")), model)


def test_best_and_last_are_checkpoints_of_the_first_model_checkpoint(tmp_path: Path) -> None:
    saves = pl.ModelCheckpoint(tmp_path / "saves", monitor="val_loss")
    own = trainer(tmp_path, callbacks=saves)
    fitted(own, None, loader(12))
    again = trainer(tmp_path, callbacks=pl.ModelCheckpoint(tmp_path / "saves", monitor="val_loss"), max_epochs=3)
    fitted(again, None, loader(12), ckpt_path="last")
    assert again.global_step == 36
    for callbacks in (None, pl.ModelCheckpoint(tmp_path / "none")):
        with pytest.raises(FabricValueError, match="ckpt_path='best'"):
            fitted(trainer(tmp_path, callbacks=callbacks), ckpt_path="best")


def test_hyperparameters_come_as_a_mapping_too_and_need_not_be_logged() -> None:
    class Configured(LitModel):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.save_hyperparameters(config, logger=False)

    assert Configured({"width": 3}).hparams == {"width": 3}

    class Named(LitModel):
        def __init__(self, width: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters("depth")

    with pytest.raises(FabricKeyError, match="depth"):
        Named()


def test_the_mean_is_by_the_length_of_the_first_tensor_wherever_it_is(tmp_path: Path) -> None:
    class Texts(LitModel):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("number", float(batch_idx))

    def collate(samples: list[Any]) -> Any:
        return ["text"] * len(samples), torch.stack([sample[0] for sample in samples])

    [found] = trainer(tmp_path).validate(Texts(), DataLoader(data(9), 8, collate_fn=collate))
    assert found["number"] == pytest.approx(1 / 9)


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(data(12))


def test_the_last_window_of_data_of_unknown_length_is_logged_with_its_step(tmp_path: Path) -> None:
    class Logs(LitModel):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("number", float(batch_idx))
            return super().training_step(batch, batch_idx)

    kept = Kept()
    own = trainer(tmp_path, accumulate_grad_batches=2, logger=kept, log_every_n_steps=1, max_epochs=1)
    fitted(own, seeded(Logs), None, DataLoader(Endless(), 4))
    assert kept.of("number") == [(1, 1.0), (2, 2.0)]


class Numbers(LitModel):
    """Logs the number of each batch, and in the hook after the epoch how many there were."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("number", float(batch_idx), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("steps", float(self.trainer.global_step))


def test_an_epoch_that_was_cut_has_the_values_of_all_its_batches_at_its_end(tmp_path: Path) -> None:
    for steps in (5, -1):
        kept, saves = Kept(), pl.ModelCheckpoint(tmp_path / "saves")
        own = trainer(tmp_path, callbacks=saves, logger=kept, max_epochs=1, max_steps=steps)
        fitted(own, seeded(Numbers))
    assert kept.of("number") == [(12, 5.5)]
    assert kept.of("steps") == [(12, 12.0)]


def test_a_checkpoint_that_is_saved_after_a_cut_fit_has_its_totals(tmp_path: Path) -> None:
    fitted(cut := trainer(tmp_path, max_epochs=1, max_steps=5), seeded(Numbers))
    cut.validate(dataloaders=loader(4))
    cut.save_checkpoint(tmp_path / "cut.ckpt")
    kept = Kept()
    fitted(trainer(tmp_path, max_epochs=1, logger=kept), seeded(Numbers), None, None, ckpt_path=tmp_path / "cut.ckpt")
    assert kept.of("number") == [(12, 5.5)]


def test_a_run_by_steps_that_was_saved_at_the_end_of_an_epoch_goes_on(tmp_path: Path) -> None:
    class Ends(LitModel):
        has_to_stop = True

        def on_train_epoch_end(self) -> None:
            if self.has_to_stop and self.trainer.current_epoch == 1:
                raise Stop

    def run(model: Any) -> pl.Trainer:
        saves = pl.ModelCheckpoint(tmp_path / "saves", monitor="val_loss")
        own = trainer(tmp_path, callbacks=saves, max_epochs=None, max_steps=40)
        fitted(own, model, loader(4))
        return own

    with pytest.raises(Stop):
        run(seeded(Ends))
    model = seeded(Ends)
    model.has_to_stop = False
    assert run(model).global_step == 40


def test_a_part_that_can_not_be_counted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FabricValueError, match=r"0\.5 of the train loader"):
        fitted(trainer(tmp_path, limit_train_batches=0.5), None, None, DataLoader(Endless(), 4))
    with pytest.raises(FabricValueError, match=r"0\.01 of the 12 batches"):
        fitted(trainer(tmp_path, limit_train_batches=0.01))
