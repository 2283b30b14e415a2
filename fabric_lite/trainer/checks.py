"""Whether a Trainer, a model and its optimizers go together: else a run would be another one than was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fabric_lite import FabricTypeError, FabricValueError
from fabric_lite.trainer.module import LightningModule
from fabric_lite.trainer.optimization import needs_closure

if TYPE_CHECKING:
    from fabric_lite.trainer.trainer import Trainer

__all__ = ["check_model", "check_optimization", "check_validation"]

# Of Lightning's models, methods without which a run would be another one.
_NOT_CALLED = (
    "transfer_batch_to_device",
    "on_before_batch_transfer",
    "on_after_batch_transfer",
    "configure_callbacks",
    "configure_model",
    "configure_sharded_model",
    *(f"on_{stage}_model_{mode}" for stage in ("validation", "test", "predict") for mode in ("eval", "train")),
)
_NOT_CALLED_IN_FIT = (
    "optimizer_step",
    "optimizer_zero_grad",
    "backward",
    "configure_gradient_clipping",
    "lr_scheduler_step",
)


def check_model(model: Any, stage: str) -> None:
    """Raise unless ``model`` is one that this Trainer runs as it was written.

    Args:
        model: Of a user.
        stage: ``fit``, ``validation``, ``test`` or ``predict``.

    Raises:
        FabricTypeError: It is no ``LightningModule``.
        FabricValueError: It has methods of Lightning's that would not be called.
    """
    if not isinstance(model, LightningModule):
        raise FabricTypeError(
            "A Trainer runs a LightningModule, which says what a step is.",
            given=type(model).__name__,
            fix="class LitModel(pl.LightningModule), with your model as self.model; or a loop of your own",
        )
    names = (*_NOT_CALLED, *(_NOT_CALLED_IN_FIT if stage == "fit" else ()))
    if unused := [name for name in names if callable(getattr(model, name, None))]:
        raise FabricValueError(
            "This Trainer does not call some methods of the model.",
            given=", ".join(unused),
            fix="self.automatic_optimization = False, and the step written in training_step; or a loop of your own",
        )


def check_optimization(trainer: Trainer, model: LightningModule, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise FabricValueError unless the steps that the model's optimizers make are those that were asked for.

    Called for each epoch too: a callback may have changed what is asked for.
    """
    if type(trainer.accumulate_grad_batches) is not int or trainer.accumulate_grad_batches < 1:
        raise FabricValueError(
            "A step is made of a whole number of batches.",
            given=f"accumulate_grad_batches={trainer.accumulate_grad_batches!r}",
            fix="1 or more",
        )
    if not model.automatic_optimization:
        if trainer.accumulate_grad_batches > 1 or trainer.gradient_clip_val:
            raise FabricValueError(
                "A model that steps by itself accumulates and clips gradients itself too.",
                given=f"accumulate_grad_batches={trainer.accumulate_grad_batches}, "
                f"gradient_clip_val={trainer.gradient_clip_val}, automatic_optimization=False",
                fix="leave them out, and count batches or call self.fabric.clip_gradients in training_step",
            )
        return
    if len(optimizers) > 1:
        raise FabricValueError(
            "With several optimizers, which of them steps when is for the model to say.",
            given=f"{len(optimizers)} optimizers and automatic_optimization=True",
            fix="self.automatic_optimization = False, self.optimizers() and self.manual_backward(loss)",
        )
    schedulers = [one.scheduler for one in trainer.schedulers]
    if foreign := [type(one).__name__ for one in schedulers if _is_of_another(one, optimizers)]:
        raise FabricValueError(
            "This scheduler is of an optimizer that configure_optimizers does not return, so it would do nothing.",
            given=", ".join(foreign),
            fix="the optimizer that was given to the scheduler",
        )
    closing = [type(one).__name__ for one in optimizers if needs_closure(one)]
    if closing:
        raise FabricValueError(
            "This optimizer steps on a function that runs forward and backward itself.",
            given=", ".join(closing),
            fix="self.automatic_optimization = False, and self.optimizers().step(closure) in training_step",
        )


def _is_of_another(scheduler: Any, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Whether what it changes is of no optimizer here; one that wraps another has the other's groups (Lookahead)."""
    its = getattr(scheduler, "optimizer", None)
    if its is None or any(its is one for one in optimizers):
        return False
    groups = {id(group) for one in optimizers for group in one.param_groups}
    return groups.isdisjoint(map(id, getattr(its, "param_groups", ())))


def check_validation(trainer: Trainer, *, has_validation: bool) -> None:
    """Raise FabricValueError unless validations come when they were asked for, and when callbacks wait for them."""
    interval, batches = trainer.val_check_interval, trainer.num_training_batches
    is_unreachable = isinstance(interval, int) and batches is not None and interval > batches
    if has_validation and (is_unreachable or (interval != 1.0 and isinstance(interval, float) and batches is None)):
        raise FabricValueError(
            "There would be no validation: batches are counted within an epoch.",
            given=f"val_check_interval={interval!r}, {batches or 'an unknown number of'} batches in an epoch",
            fix="a smaller number of batches, or check_val_every_n_epoch",
        )
    waiting = [one for one in trainer.callbacks if getattr(one, "waits_for_validation", False)]
    if waiting and not has_validation:
        raise FabricValueError(
            "A callback waits for the end of a validation, and there is none.",
            given=f"{type(waiting[0]).__name__}(monitor={waiting[0].monitor!r}) and no val_dataloaders",
            fix="val_dataloaders, or check_on_train_epoch_end=True",
        )
