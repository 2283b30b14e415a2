"""The article's snippet on several ranks and in shards; a Trainer on ranks is the loop by hand on ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import fabric_lite.trainer as pl
from fabric_lite import Fabric, FabricRuntimeError
from fabric_lite.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from fabric_lite.loggers import CSVLogger
from fabric_lite.testing import RankPool
from tests.backends import BACKENDS
from tests.distributed.launching import fabric_run, run, write
from tests.lit_models import LitModel, by_hand, data, digest, loader

SNIPPET = """
    import torch
    import torch.nn as nn
    from torch.utils.data import DataLoader, TensorDataset
    import fabric_lite.trainer as pl


    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x)


    class LitModel(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Net()
            self.loss = nn.CrossEntropyLoss()

        def training_step(self, batch, batch_idx):
            x, y = batch
            y_hat = self.model(x)
            loss = self.loss(y_hat, y)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)


    torch.manual_seed(0)
    inputs = torch.randn(24, 4)
    train_loader = DataLoader(TensorDataset(inputs, torch.arange(24) % 3), batch_size=4, shuffle=True)
    model = LitModel()
    print("before", tuple(model.forward(inputs).shape))
    trainer = pl.Trainer(max_epochs=10{options})
    trainer.fit(model, train_loader)
    print("after", tuple(model.forward(inputs).shape), trainer.global_step, trainer.world_size)
"""


@pytest.mark.parametrize(
    ("options", "steps", "world_size"),
    [
        ("", 60, 1),
        (', accelerator="cpu", devices=2, strategy="ddp"', 30, 2),
        (', accelerator="cpu", devices=2, strategy="fsdp"', 30, 2),
    ],
    ids=["one device", "ddp", "fsdp"],
)
def test_the_articles_snippet_runs_with_its_import_changed(
    tmp_path: Path, options: str, steps: int, world_size: int
) -> None:
    script = write(tmp_path, SNIPPET.replace("{options}", options))
    done = run([sys.executable, script], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # Before fit, python itself runs the script too, and becomes the supervisor of the ranks there.
    assert done.stdout.count("before (24, 3)") == (1 if world_size == 1 else 1 + world_size)
    assert done.stdout.count(f"after (24, 3) {steps} {world_size}") == world_size
    folder = tmp_path / "fabric_logs" / "version_0"
    if steps >= 50:
        assert [step for step, _ in BACKENDS[0].scalars(tmp_path, CSVLogger(tmp_path, version=0))["train_loss"]] == [50]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]


def test_the_articles_snippet_takes_its_devices_from_the_command_line(tmp_path: Path) -> None:
    script = write(tmp_path, SNIPPET.replace("{options}", ""))
    done = fabric_run("--devices", 2, script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("after (24, 3) 30 2") == 2


def fit(folder: Path, strategy: str, options: dict[str, Any]) -> list[list[float]]:
    torch.manual_seed(1)
    trainer = pl.Trainer(
        accelerator="cpu", strategy=strategy, max_epochs=2, logger=False, default_root_dir=folder, **options
    )
    model = LitModel()
    trainer.fit(model, loader(), loader(12, shuffle=False))
    weights = digest(model)
    trainer.fabric.close()
    return weights


def fit_by_hand(strategy: str, options: dict[str, Any]) -> list[list[float]]:
    fabric = Fabric(accelerator="cpu", strategy=strategy)
    model = by_hand(fabric, 2, validation=loader(12, shuffle=False), **options)
    weights = digest(model)
    fabric.close()
    return weights


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("options", "hand_options"),
    [({}, {}), ({"accumulate_grad_batches": 4, "gradient_clip_val": 0.1}, {"accumulate": 4, "clip": 0.1})],
    ids=["plain", "windows"],
)
def test_a_trainer_on_ranks_gives_the_weights_of_the_loop_by_hand(
    ranks: RankPool, tmp_path: Path, strategy: str, options: dict[str, Any], hand_options: dict[str, Any]
) -> None:
    mine = ranks.run(fit, tmp_path, strategy, options)
    theirs = ranks.run(fit_by_hand, strategy, hand_options)
    assert mine[0] == mine[1] == theirs[0] == theirs[1]


class Dies(Exception):
    pass


def resume(folder: Path, strategy: str, dies_at: int | None) -> tuple[list[list[float]], dict[str, Any]] | None:
    class DiesAt:
        def on_train_batch_start(self, trainer: Any) -> None:
            if trainer.global_step == dies_at:
                raise Dies

    class Model(LitModel):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("mean", loss, on_step=False, on_epoch=True, sync_dist=True)
            return loss

    torch.manual_seed(1)
    callbacks = [
        EarlyStopping("val_loss", patience=9),
        LearningRateMonitor(),
        ModelCheckpoint(folder, monitor="val_loss", every_n_steps=2),
        DiesAt(),
    ]
    trainer = pl.Trainer(
        accelerator="cpu", strategy=strategy, max_epochs=3, logger=CSVLogger(folder), callbacks=callbacks
    )
    model = Model()
    try:
        trainer.fit(model, loader(), loader(13, shuffle=False))
    except Dies:
        trainer.fabric.close()
        return None
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    result = digest(model), metrics
    trainer.fabric.close()
    return result


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_on_ranks_that_dies_goes_on_to_the_same_weights_and_metrics(
    ranks: RankPool, tmp_path: Path, strategy: str
) -> None:
    whole = ranks.run(resume, tmp_path / "whole", strategy, None)
    assert ranks.run(resume, tmp_path / "parts", strategy, 9) == [None, None]
    resumed = ranks.run(resume, tmp_path / "parts", strategy, None)
    assert resumed[0] == whole[0]
    assert resumed[1] == whole[1]
    assert resumed[0][0] == resumed[1][0]


def validate() -> tuple[float, int]:
    """13 samples on two ranks, each once."""

    class Counts(LitModel):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("samples", len(batch[0]), reduce_fx="sum", sync_dist=True)
            super().validation_step(batch, batch_idx)

    torch.manual_seed(1)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    [result] = trainer.validate(Counts(), loader(13, shuffle=False))
    trainer.fabric.close()
    return result["val_loss"], int(result["samples"])


def test_each_sample_is_evaluated_once_over_all_ranks(ranks: RankPool) -> None:
    (loss, samples), other = ranks.run(validate)
    assert (loss, samples) == other
    torch.manual_seed(1)
    model = LitModel().eval()
    batches = list(loader(13, shuffle=False))
    with torch.no_grad():
        expected = sum(float(model.loss(model.model(x), y)) * len(x) for x, y in batches) / 13
    assert samples == 13
    assert loss == pytest.approx(expected, rel=1e-6)


def fit_by_hand_steps(folder: Path) -> list[list[float]]:
    class Manual(LitModel):
        automatic_optimization = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(self(x), y))
            optimizer.step()

        def on_train_start(self) -> None:
            self.first = digest(self)

    torch.manual_seed(1)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, default_root_dir=folder)
    model = Manual()
    trainer.fit(model, loader())
    weights = digest(model)
    assert all(now != before for now, before in zip(weights, model.first, strict=True))
    trainer.fabric.close()
    return weights


def test_steps_by_hand_are_synchronized(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(fit_by_hand_steps, tmp_path)
    assert first == second


class Sees(LitModel):
    """Keeps the samples of its batches, as the first number of each, and in which epoch they came."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen += [(self.current_epoch, value) for value in batch[0][:, 0].tolist()]
        return super().training_step(batch, batch_idx)


def begin_or_go_on(folder: Path) -> tuple[int, int, list[tuple[int, float]]]:
    torch.manual_seed(1)
    begins = not any(folder.glob("step-*"))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        max_steps=5 if begins else -1,
        logger=False,
        callbacks=ModelCheckpoint(folder, every_n_steps=5),
    )
    trainer.fit(model := Sees(), loader())
    result = trainer.global_step, trainer.current_epoch, model.seen
    trainer.fabric.close()
    return result


def test_another_number_of_ranks_sees_the_rest_of_the_epoch(ranks: RankPool, tmp_path: Path) -> None:
    """5 of 12 batches on one rank; the other 28 samples are 3.5 batches of 4 on each of two, and an epoch has 6."""
    [(steps, epoch, before)] = ranks.run(begin_or_go_on, tmp_path, ranks=1)
    assert (steps, epoch, len(before)) == (5, 0, 20)
    parts = ranks.run(begin_or_go_on, tmp_path, ranks=2)
    assert [part[:2] for part in parts] == [(5 + 4 + 6, 2)] * 2
    seen = [*before, *parts[0][2], *parts[1][2]]
    everything = sorted(data().tensors[0][:, 0].tolist())
    for epoch in (0, 1):
        assert sorted(value for number, value in seen if number == epoch) == everything


class Plateau(LitModel):
    """Watches a value that is another on each rank: on rank 0 it gets better, on rank 1 it does not."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        epoch, rank = self.trainer.current_epoch, self.fabric.global_rank
        self.log("val_loss", float(-epoch if rank == 0 else epoch))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def fit_plateau() -> tuple[float, list[list[float]]]:
    torch.manual_seed(1)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False)
    trainer.fit(model := Plateau(), loader(), loader(8))
    result = trainer.optimizers[0].param_groups[0]["lr"], digest(model)
    trainer.fabric.close()
    return result


def test_a_scheduler_that_watches_a_value_of_each_rank_goes_by_rank_zeros(ranks: RankPool) -> None:
    first, second = ranks.run(fit_plateau)
    assert first == second
    assert first[0] == 1e-3


class OnRankZero(Plateau):
    """Only rank 0 logs what the scheduler watches."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.fabric.is_global_zero:
            self.log("val_loss", float(self.trainer.current_epoch))


def fit_on_rank_zero() -> float:
    torch.manual_seed(1)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False)
    trainer.fit(OnRankZero(), loader(), loader(8))
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    trainer.fabric.close()
    return rate


def test_a_scheduler_may_watch_a_value_that_only_rank_zero_has(ranks: RankPool) -> None:
    assert ranks.run(fit_on_rank_zero) == [pytest.approx(1e-5)] * 2


class OnSomeRanks(LitModel):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("everywhere", 1.0, on_step=False, on_epoch=True, sync_dist=True)
        if not self.fabric.is_global_zero:
            self.log("somewhere", 1.0, on_step=False, on_epoch=True, sync_dist=True)
        return super().training_step(batch, batch_idx)


def fit_on_some_ranks() -> None:
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    try:
        with pytest.raises(FabricRuntimeError, match="somewhere, on some ranks only"):
            trainer.fit(OnSomeRanks(), loader())
    finally:
        trainer.fabric.close()


def test_a_shared_value_that_some_ranks_do_not_log_is_an_error_on_all(ranks: RankPool) -> None:
    ranks.run(fit_on_some_ranks)


class Short(IterableDataset):
    """Says that it has more samples than come."""

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Any:
        return iter(data(12))


def fit_short() -> None:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=2, logger=False, enable_checkpointing=False
    )
    try:
        with pytest.raises(FabricRuntimeError, match="3 batches of a loader that has 5"):
            trainer.fit(LitModel(), DataLoader(Short(), 4))
    finally:
        trainer.fabric.close()


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_gradients_that_no_rank_has_sent_are_not_stepped_on(ranks: RankPool) -> None:
    ranks.run(fit_short)
