"""Validation, tests and predictions: every batch once, without gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fabric_lite.trainer.module import LightningModule, step_of

if TYPE_CHECKING:
    from fabric_lite.trainer.trainer import Trainer

__all__ = ["evaluate", "evaluating"]


@contextlib.contextmanager
def evaluating(model: LightningModule) -> Iterator[None]:
    """Around an evaluation and the hooks at its end, which may sample from the model: ``eval()``, without gradients."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with torch.no_grad():  # not inference mode: what is made in it can't be trained with afterwards
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def evaluate(
    trainer: Trainer, stage: str, model: LightningModule, loaders: Sequence[Any]
) -> tuple[list[dict[str, float]], list[list[Any]]]:
    """Run ``validation_step``, ``test_step`` or ``predict_step`` on all batches; every rank calls.

    Args:
        trainer: Whose metrics, hooks and limits hold.
        stage: ``validation``, ``test`` or ``predict``.
        model: :func:`evaluating`.
        loaders: Set up.

    Returns:
        What was logged and, of a prediction, what the steps have returned; of each loader.
    """
    try:
        return _evaluate(trainer, stage, step_of(model, f"{stage}_step", 3 if len(loaders) > 1 else 2), loaders)
    finally:
        trainer.metrics.suffix = ""


def _evaluate(
    trainer: Trainer, stage: str, step: Callable[..., Any], loaders: Sequence[Any]
) -> tuple[list[dict[str, float]], list[list[Any]]]:
    metrics, hooks = trainer.metrics, trainer.hooks
    logged: list[dict[str, float]] = []
    outputs: list[list[Any]] = []
    metrics.stage = stage
    hooks.call(f"on_{stage}_start")
    hooks.call(f"on_{stage}_epoch_start")
    for index, loader in enumerate(loaders):
        metrics.suffix = f"/dataloader_idx_{index}" if len(loaders) > 1 else ""
        outputs.append([])
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(trainer.past_epochs + trainer.current_epoch)
        for number, batch in enumerate(trainer.loaders.bar(loader, trainer.loaders.count(loader, stage), 0, stage)):
            metrics.batch = batch
            hooks.call(f"on_{stage}_batch_start", batch, number, index)
            output = step(batch, number, index)
            hooks.call(f"on_{stage}_batch_end", output, batch, number, index)
            if stage == "predict":
                outputs[-1].append(output)
        metrics.batch = None
        logged.append(metrics.end_epoch(trainer.global_step))
    metrics.suffix = ""
    hooks.call_model(f"on_{stage}_epoch_end")  # it finds in trainer.callback_metrics what the steps have logged
    late = metrics.end_epoch(trainer.global_step)
    hooks.call_callbacks(f"on_{stage}_epoch_end", metrics=trainer.callback_metrics)
    late |= metrics.end_epoch(trainer.global_step)
    if logged:
        logged[-1] |= late
    return logged, outputs
