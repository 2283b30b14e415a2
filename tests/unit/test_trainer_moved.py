"""Models and callbacks that were written for Lightning: they run as there, or are told what differs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

import fabric_lite.trainer as pl
from fabric_lite import FabricKeyError, FabricTypeError, FabricValueError
from tests.lit_models import LitModel, data, digest, loader
from tests.unit.test_trainer_edges import fitted, seeded, trainer


def test_a_step_keeps_its_own_defaults_where_there_is_one_loader(tmp_path: Path) -> None:
    class Named(LitModel):
        def validation_step(self, batch: Any, batch_idx: int, name: str = "val") -> None:
            self.log(f"{name}_loss", 1.0)

        def test_step(self, *args: Any) -> None:
            self.log("arguments", float(len(args)))

    own = trainer(tmp_path)
    model = fitted(own, seeded(Named), loader(8))
    assert own.callback_metrics["val_loss"] == 1.0
    assert own.test(model, loader(8)) == [{"arguments": 2.0}]
    assert [list(one.values()) for one in own.test(model, [loader(8)] * 2)] == [[3.0], [3.0]]


def test_loaders_to_validate_on_come_in_a_dict_and_one_loader_trains(tmp_path: Path) -> None:
    own = trainer(tmp_path)
    fitted(own, validation={"a": loader(8), "b": loader(12)})
    assert {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"} <= own.callback_metrics.keys()
    for given in ([loader(8), loader(12)], {"a": loader(8), "b": loader(12)}, []):
        with pytest.raises(FabricValueError, match=rf"trains on one loader[\s\S]*{len(given)} loaders"):
            fitted(trainer(tmp_path), batches=given)


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}])
def test_a_model_that_steps_by_itself_does_not_get_windows_and_clipping(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    class ByHand(LitModel):
        automatic_optimization = False

    with pytest.raises(FabricValueError, match=f"{next(iter(options))}=[\\s\\S]*clip_gradients in training_step"):
        fitted(trainer(tmp_path, **options), seeded(ByHand))


def test_a_value_that_goes_nowhere_and_a_metric_object_are_refused(tmp_path: Path) -> None:
    class Metric(nn.Module):
        def compute(self) -> float:
            return 1.0

    class Nowhere(LitModel):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("lost", 1.0, on_step=False)
            return super().training_step(batch, batch_idx)

    class Object(LitModel):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("accuracy", Metric())
            return super().training_step(batch, batch_idx)

    with pytest.raises(FabricValueError, match=r"'lost', on_step=False, on_epoch=False"):
        fitted(trainer(tmp_path), seeded(Nowhere))
    with pytest.raises(FabricTypeError, match=r"value\.compute\(\)"):
        fitted(trainer(tmp_path), seeded(Object))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("loss", [(torch.tensor(1.0), 1), 0.5, "loss"])
def test_a_loss_that_is_no_tensor_is_refused(tmp_path: Path, loss: Any, accumulate: int) -> None:
    class NoTensor(LitModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return loss

    with pytest.raises(FabricTypeError, match="training_step returned no loss"):
        fitted(trainer(tmp_path, accumulate_grad_batches=accumulate), seeded(NoTensor))


def test_callbacks_get_the_loss_by_its_name_whatever_the_step_returns(tmp_path: Path) -> None:
    class Dict(LitModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "size": len(batch)}

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(float(outputs["loss"]))

    seen: list[float] = []
    for kind in (LitModel, Dict):
        fitted(trainer(tmp_path, callbacks=Losses()), seeded(kind))
    assert len(seen) == 48
    assert seen[:24] == seen[24:]


def test_what_callbacks_add_to_a_checkpoint_comes_back(tmp_path: Path) -> None:
    class Adds(pl.Callback):
        found: int | None = None

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["steps"] = trainer.global_step

        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            self.found = checkpoint["steps"]

    own = trainer(tmp_path, callbacks=Adds(), max_epochs=1)
    fitted(own)
    own.save_checkpoint(tmp_path / "a.ckpt")
    again = Adds()
    trainer(tmp_path, callbacks=again).fit(LitModel(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert again.found == 12


def test_methods_that_say_how_to_evaluate_are_refused(tmp_path: Path) -> None:
    class Stays(LitModel):
        def on_validation_model_eval(self) -> None:
            pass

    with pytest.raises(FabricValueError, match="on_validation_model_eval"):
        fitted(trainer(tmp_path), seeded(Stays), loader(8))


def test_a_hook_that_would_leave_the_epoch_is_refused(tmp_path: Path) -> None:
    class Leaves(LitModel):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    with pytest.raises(FabricValueError, match="-1 from on_train_batch_start"):
        fitted(trainer(tmp_path), seeded(Leaves))


def test_a_scheduler_by_steps_whose_value_never_comes_is_an_error_after_the_epoch(tmp_path: Path) -> None:
    class Waits(LitModel):
        strict = True

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            options = {"interval": "step", "monitor": "vla_loss", "strict": self.strict}
            return [optimizer], [{"scheduler": ReduceLROnPlateau(optimizer), **options}]

    class DoesNotMind(Waits):
        strict = False

    with pytest.raises(FabricKeyError, match="vla_loss"):
        fitted(trainer(tmp_path), seeded(Waits), loader(8))
    fitted(trainer(tmp_path), seeded(DoesNotMind), loader(8))


def test_a_scheduler_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    class Other(LitModel):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [StepLR(super().configure_optimizers(), 1), StepLR(optimizer, 1)]

    with pytest.raises(FabricValueError, match="StepLR"):
        fitted(trainer(tmp_path), seeded(Other))


def test_schedulers_are_told_apart_by_the_groups_that_they_change_not_by_equality(tmp_path: Path) -> None:
    class Alike(torch.optim.SGD):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, torch.optim.SGD)

        __hash__ = torch.optim.SGD.__hash__

    class Other(LitModel):
        def configure_optimizers(self) -> Any:
            return [Alike(self.parameters(), 0.1)], [StepLR(Alike(self.parameters(), 0.1), 1)]

    class Around(torch.optim.Optimizer):  # as Lookahead is
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups, inner.defaults)
            self.inner, self.param_groups = inner, inner.param_groups

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.inner.step(closure)

    class OfInner(LitModel):
        def configure_optimizers(self) -> Any:
            inner = torch.optim.SGD(self.parameters(), 0.1)
            return [Around(inner)], [StepLR(inner, 1, 0.5)]

    with pytest.raises(FabricValueError, match="an optimizer that configure_optimizers does not return"):
        fitted(trainer(tmp_path), seeded(Other))
    own = trainer(tmp_path, max_epochs=1)
    fitted(own, seeded(OfInner))
    assert own.optimizers[0].param_groups[0]["lr"] == 0.05


def test_a_validation_that_goes_backward_is_no_part_of_the_next_step(tmp_path: Path) -> None:
    class Backward(LitModel):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            with torch.enable_grad():
                self.loss(self.model(batch[0]), batch[1]).backward()

    held_out = loader(8, shuffle=False)
    with_it, without = (
        fitted(trainer(tmp_path, val_check_interval=5), seeded(kind), held_out) for kind in (Backward, LitModel)
    )
    assert digest(with_it) == digest(without)


def test_parameters_that_join_at_an_epoch_begin_without_the_gradients_of_the_one_before(tmp_path: Path) -> None:
    class Joins(LitModel):
        clears = False

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.layers[3].parameters(), lr=0.1)

        def on_train_epoch_start(self) -> None:
            if self.clears:
                self.zero_grad()
            if self.current_epoch == 1:
                self.optimizers().add_param_group({"params": list(self.model.layers[0].parameters())})

    class Clears(Joins):
        clears = True

    joined, cleared = (fitted(trainer(tmp_path), seeded(kind)) for kind in (Joins, Clears))
    assert digest(joined) == digest(cleared)


def test_the_models_hooks_at_an_end_find_what_its_steps_have_logged(tmp_path: Path) -> None:
    class Looks(LitModel):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("epoch", float(self.current_epoch), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("validated", float(self.current_epoch))

        def on_train_epoch_end(self) -> None:
            seen.append(self.trainer.callback_metrics["epoch"])
            self.log("twice", 2 * seen[-1])

        def on_validation_epoch_end(self) -> None:
            seen.append(self.trainer.callback_metrics["validated"])
            self.log("thrice", 3 * seen[-1])

    seen: list[float] = []
    own = trainer(tmp_path)
    model = fitted(own, seeded(Looks), loader(8))
    assert seen == [0.0, 0.0, 1.0, 1.0]
    assert (own.callback_metrics["twice"], own.callback_metrics["thrice"]) == (2.0, 3.0)
    assert own.validate(model, loader(8)) == [{"validated": 2.0, "thrice": 6.0}]


def test_the_mean_is_by_the_length_of_a_tensor_in_a_dataclass(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Batch:
        x: torch.Tensor

    class Numbers(LitModel):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            self.log("number", float(batch_idx))

    own = trainer(tmp_path)
    held_out = DataLoader(data(6), batch_size=4, collate_fn=lambda samples: Batch(torch.stack([x for x, _ in samples])))
    assert own.validate(seeded(Numbers), held_out) == [{"number": pytest.approx(2 / 6)}]


def test_no_folder_is_the_current_one(tmp_path: Path) -> None:
    assert trainer(tmp_path, default_root_dir=None).default_root_dir == "."


def test_a_callback_that_samples_from_the_model_after_a_validation_changes_nothing_in_it(tmp_path: Path) -> None:
    class Normed(LitModel):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def on_test_end(self) -> None:
            ways.append((self.training, torch.is_grad_enabled()))

    class Samples(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            ways.append((pl_module.training, torch.is_grad_enabled()))
            pl_module(torch.ones(4, 6))

    ways: list[tuple[bool, bool]] = []
    own = trainer(tmp_path, callbacks=Samples())
    sampled = fitted(own, seeded(Normed), loader(8))
    plain = fitted(trainer(tmp_path), seeded(Normed), loader(8))
    own.test(sampled, loader(8))
    assert ways == [(False, False)] * 3
    assert sampled.training
    assert [one.tolist() for one in sampled.buffers()] == [one.tolist() for one in plain.buffers()]
    assert digest(sampled) == digest(plain)


def test_a_callback_may_change_windows_and_clipping(tmp_path: Path) -> None:
    class Changes(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.accumulate_grad_batches, trainer.gradient_clip_val = 3, 0.1

    own = trainer(tmp_path, callbacks=Changes())
    changed = fitted(own)
    constant = fitted(trainer(tmp_path, accumulate_grad_batches=3, gradient_clip_val=0.1))
    assert own.global_step == 8
    assert digest(changed) == digest(constant)


@pytest.mark.parametrize(("number", "is_automatic"), [(0, True), (1.5, True), (2, False)])
def test_a_callback_can_not_change_windows_into_what_a_trainer_refuses(
    tmp_path: Path, number: Any, is_automatic: bool
) -> None:
    class Changes(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.accumulate_grad_batches = number

    model = seeded(LitModel)
    model.automatic_optimization = is_automatic
    with pytest.raises(FabricValueError, match=f"accumulate_grad_batches={number}"):
        fitted(trainer(tmp_path, callbacks=Changes()), model)


def test_a_file_of_hyperparameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FabricTypeError, match=r"hparams_file: what is in it, by name"):
        LitModel.load_from_checkpoint(tmp_path / "a.ckpt", hparams_file=tmp_path / "hparams.yaml")


def test_before_a_step_gradients_are_not_clipped_yet(tmp_path: Path) -> None:
    class Gradients(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.append([parameter.grad.clone() for parameter in pl_module.parameters()])

    seen: list[list[torch.Tensor]] = []
    batches = loader(shuffle=False)
    fitted(trainer(tmp_path, callbacks=Gradients(), gradient_clip_val=1e-3, max_steps=1), batches=batches)
    model = seeded()
    torch.manual_seed(1)
    x, y = next(iter(batches))
    model.loss(model.model(x), y).backward()
    assert [one.tolist() for one in seen[0]] == [one.grad.tolist() for one in model.parameters()]


def test_before_a_step_gradients_are_without_the_scale_of_the_loss(tmp_path: Path) -> None:
    class Norms(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.append(float(pl_module.model.layers[3].weight.grad.norm()))

    seen: list[float] = []
    options = {"max_epochs": 1, "gradient_clip_val": 0.1}
    for precision in ("32-true", "16-mixed"):
        watched = fitted(trainer(tmp_path, callbacks=Norms(), precision=precision, **options))
    plain = fitted(trainer(tmp_path, precision="16-mixed", **options))
    assert seen[12:] == pytest.approx(seen[:12], rel=0.05)  # float16 has 11 bits
    assert digest(watched) == digest(plain)
