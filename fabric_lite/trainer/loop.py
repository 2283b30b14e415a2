"""The epochs of one fit: batches, windows of accumulation, schedulers, and when to validate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fabric_lite import FabricKeyError, FabricRuntimeError, FabricTypeError
from fabric_lite.callbacks.monitoring import monitored
from fabric_lite.notices import rank_zero_info
from fabric_lite.trainer.checks import check_optimization
from fabric_lite.trainer.evaluation import evaluate, evaluating
from fabric_lite.trainer.module import LightningModule, step_of
from fabric_lite.trainer.options import CLIPS
from fabric_lite.trees import map_leaves

if TYPE_CHECKING:
    from fabric_lite.trainer.trainer import Trainer

__all__ = ["FitLoop"]


@dataclasses.dataclass
class _Progress:
    """How far the current epoch is."""

    world_size: int = 1  # in whose batches it is counted
    is_length_known: bool = True  # as far as that of the loader is
    batches: int = 0
    closed_at: int = 0  # batches, those before a window of accumulation that is open
    validated_at: int = 0  # batches
    stepped: list[int] = dataclasses.field(default_factory=list)  # the schedulers that have, at its end
    is_trained: bool = False  # its batches are done, and the schedulers that need no metric
    is_over: bool = False  # all of it is done, except for the callbacks at its end
    cut_at: int | None = None  # batches: a run has ended here, and all were told


class FitLoop:
    """Trains until the trainer's epochs or steps are over, or somebody asks to stop; every rank calls.

    Args:
        trainer: Whose model, optimizers and options these are.
        model: Set up, as are the loaders.
        loader: To train on.
        validation: To validate on.
    """

    def __init__(self, trainer: Trainer, model: LightningModule, loader: Any, validation: Sequence[Any]) -> None:
        self._trainer, self._fabric, self._model = trainer, trainer.fabric, model
        self._loader, self._validation = loader, validation
        self._hooks, self._metrics = trainer.hooks, trainer.metrics
        self._accumulate, self._early = trainer.accumulate_grad_batches, trainer.early_stopping_callbacks
        self._has_gradients = False
        self._progress = _Progress(world_size=trainer.world_size)
        self._send: Callable[[int], Any] | None = None  # what hooks log now belongs to what has just ended
        self._has_told = False  # of an epoch without a step
        self.is_cut = False  # whether the latest epoch was left before its end

    def run(self) -> None:
        """Train to the end, from where the state that was loaded has left off."""
        trainer = self._trainer
        if self._progress.cut_at == self._progress.batches and self._stops(trainer.global_step):
            self.is_cut = True
            return
        # An epoch that a run was killed in is ended, also where no batch of it is wanted any more.
        while trainer.current_epoch < trainer.max_epochs and (
            self._progress.is_trained or self._progress.batches > 0 or not self._stops(trainer.global_step)
        ):
            before, is_whole = trainer.global_step, self._progress.batches == 0 and not self._progress.is_trained
            self._run_epoch()
            if self.is_cut:
                return
            has_steps = trainer.global_step != before or not trainer.optimizers
            if not has_steps and not self._has_told and self._model.automatic_optimization:
                self._has_told = True
                rank_zero_info("an epoch went by without a step: no training_step of it returned a loss")
            if is_whole and trainer.max_epochs == math.inf > trainer.max_steps and trainer.global_step == before:
                raise FabricRuntimeError(
                    "An epoch went by without a step, so this would never end.",
                    given=f"max_steps={trainer.max_steps}, {before} steps, epoch {trainer.current_epoch}",
                    fix="a loader with batches, an optimizer, or max_epochs",
                )

    def _stops(self, steps: int) -> bool:
        trainer, early = self._trainer, self._early
        is_over = trainer.should_stop or steps >= trainer.max_steps
        return is_over or (bool(early) and any(one.should_stop for one in early))

    def _run_epoch(self) -> None:
        """One epoch, or what is left of it: what a checkpoint would miss is done before the hooks that save."""
        trainer, progress, metrics = self._trainer, self._progress, self._metrics
        count = trainer.current_epoch + 1
        metrics.stage = "train"
        self.is_cut = False
        if not progress.is_trained:
            self._hooks.call("on_train_epoch_start")
            self._drop_gradients()
            self.is_cut = not self._run_batches()
            if not self.is_cut:
                self._step_schedulers("epoch", count)
                progress.is_trained = True
        self._validate_if_due(is_over=True)
        if self.is_cut:
            metrics.keep()  # a checkpoint of now goes on in the middle
            progress.cut_at = progress.batches
        metrics.end_epoch(trainer.global_step)
        self._hooks.call_model("on_train_epoch_end")  # it finds in trainer.callback_metrics what the steps have logged
        metrics.end_epoch(trainer.global_step)
        if not self.is_cut:
            self._step_schedulers("epoch", count, trainer.callback_metrics)  # those that no validation let step
            progress.is_over = True
        self._tell("on_train_epoch_end")
        if self.is_cut:
            metrics.restore()
        else:
            trainer.current_epoch, self._progress = count, _Progress(world_size=self._fabric.world_size)

    def _tell(self, name: str) -> None:
        """Call the callbacks about an epoch or a validation that has ended; what they log is sent with it."""
        self._send = self._metrics.end_epoch
        self._hooks.call_callbacks(name, state=self._trainer.state, metrics=self._trainer.callback_metrics)
        self.send_late()
        self._send = None

    def send_late(self) -> None:
        """Send what hooks have logged about what has just ended; before a checkpoint says that it has."""
        if self._send is not None:
            self._send(self._trainer.global_step)

    def _run_batches(self) -> bool:
        """The batches of an epoch, or what is left of them; returns whether all have come.

        Raises:
            FabricRuntimeError: There are fewer than the loader said, and gradients wait that no rank has sent.
        """
        trainer, progress, metrics = self._trainer, self._progress, self._metrics
        step, total = step_of(self._model, "training_step"), self._begin_batches()
        if progress.batches != total:
            self._validate_if_due()
        latest = self._fabric.steps
        if progress.batches > 0 and progress.batches != total and self._stops(latest):
            return False
        bar = trainer.loaders.bar(self._loader, total, progress.batches, f"epoch {trainer.current_epoch}")
        for batch in bar:
            number, metrics.batch, metrics.of_step = progress.batches, batch, {}
            if progress.closed_at == number:
                metrics.window = number
            if "on_train_batch_start" in self._hooks.of_batches:
                self._hooks.begin_batch(batch, number)
            outputs = self._train_batch(step, batch, number, total)
            progress.batches += 1
            is_between = progress.closed_at == progress.batches  # windows of accumulation
            if is_between:
                metrics.window = None
            before, latest = latest, self._fabric.steps
            has_stepped = latest != before
            if has_stepped and metrics.to_send:
                metrics.send(latest)
            if "on_train_batch_end" in self._hooks.of_batches:
                outputs = map_leaves(_detached, outputs)
                named = {"metrics": metrics.of_step, "loss": _loss_of(outputs), "batch_idx": number}
                outputs = {"loss": outputs} if isinstance(outputs, torch.Tensor) else outputs  # as Lightning has it
                self._send = metrics.send if has_stepped else None
                self._hooks.call("on_train_batch_end", outputs, batch, number, state=trainer.state, **named)
                self.send_late()
                self._send = None
            if metrics.shown:
                bar.show(**metrics.shown)
            if self._validation and is_between and progress.batches != total:
                self._validate_if_due()
            if is_between and self._stops(latest):
                if progress.batches != total:
                    metrics.batch = None
                    return False
                break
        metrics.batch = None
        if progress.closed_at != progress.batches:
            self._end_open_window(total)
        if metrics.to_send:
            metrics.send(self._fabric.steps)
        self._set_epoch(trainer.current_epoch + 1)  # else a loader with a limit would go on in the middle
        return True

    def _begin_batches(self) -> int | None:
        """Prepare for an epoch, or what is left of it; returns how many batches it has, where that is known."""
        trainer, progress, world_size = self._trainer, self._progress, self._fabric.world_size
        self._set_epoch(trainer.current_epoch)  # an earlier fit may have left the loader in the middle
        check_optimization(trainer, self._model, trainer.optimizers)
        self._accumulate = trainer.accumulate_grad_batches  # a callback may have changed it for this epoch
        if progress.world_size != world_size:  # it was begun by more ranks, or fewer
            progress.is_length_known = progress.batches == 0 or not trainer.loaders.takes_all("train")
            progress.batches = progress.closed_at = progress.batches * progress.world_size // world_size
            progress.validated_at = progress.validated_at * progress.world_size // world_size
            progress.world_size = world_size
        return trainer.num_training_batches if progress.is_length_known else None

    def _set_epoch(self, epoch: int) -> None:
        if hasattr(self._loader, "set_epoch"):
            self._loader.set_epoch(self._trainer.past_epochs + epoch)

    def _end_open_window(self, total: int | None) -> None:
        """Step on the last batches, of which nobody knew that they were the last."""
        if total is not None and self._has_gradients and self._fabric.world_size > 1:
            raise FabricRuntimeError(
                "The data ended in a window of accumulation, so its gradients are on their ranks alone.",
                given=f"{self._progress.batches} batches of a loader that has {total} by its length and the limits",
                fix="a loader whose length is right, or none",
            )
        self._step(self._progress.batches)

    def _train_batch(self, step: Callable[..., Any], batch: Any, number: int, total: int | None) -> Any:
        steps = number + 1 == total or (number + 1) % self._accumulate == 0
        if not self._model.automatic_optimization:
            self._progress.closed_at = number + 1
            return step(batch, number)
        if self._accumulate == 1:
            outputs = self._backward(step(batch, number))
        else:  # without a known end any batch may be the last one of a window
            with self._fabric.no_backward_sync(self._model, enabled=not steps and total is not None):
                outputs = self._backward(step(batch, number))
        if steps:
            if outputs is None and self._has_gradients and self._fabric.world_size > 1 and total is not None:
                raise FabricRuntimeError(
                    "The last batch of a window was passed over, so the gradients before it are on their ranks alone.",
                    given=f"training_step returned None for batch {number}, accumulate_grad_batches={self._accumulate}",
                    fix="a loss of 0 times the outputs instead of None",
                )
            self._step(number + 1)
        return outputs

    def _backward(self, outputs: Any) -> Any:
        loss = _loss_of(outputs)
        if not isinstance(loss, torch.Tensor) and outputs is not None:
            raise FabricTypeError(
                "training_step returned no loss.", given=f"{outputs!r:.80}", fix='a tensor, a dict with "loss", or None'
            )
        if loss is not None:
            loss = loss / self._accumulate if self._accumulate > 1 else loss
            if "on_before_backward" in self._hooks.of_batches:
                self._hooks.call("on_before_backward", loss)
            self._fabric.backward(loss)
            self._has_gradients = True
            if "on_after_backward" in self._hooks.of_batches:
                self._hooks.call("on_after_backward")
        return outputs

    def _step(self, batches: int) -> None:
        """End the window of accumulation after so many batches: step, if one of them went backward."""
        self._progress.closed_at = batches
        if not self._has_gradients:
            return
        self._has_gradients = False
        trainer = self._trainer
        limit = trainer.gradient_clip_val
        for optimizer in trainer.optimizers:
            if "on_before_optimizer_step" in self._hooks.of_batches:
                if self._fabric.precision.loss_scale:  # clips nothing, and takes the scale of the loss off
                    self._fabric.clip_gradients(self._model, optimizer, clip_val=math.inf)
                self._hooks.call("on_before_optimizer_step", optimizer)  # as in Lightning, before gradients are clipped
            if limit:
                clip: dict[str, Any] = {CLIPS[trainer.gradient_clip_algorithm]: limit}
                self._fabric.clip_gradients(self._model, optimizer, **clip)
            optimizer.step()
            if "on_before_zero_grad" in self._hooks.of_batches:
                self._hooks.call("on_before_zero_grad", optimizer)
            optimizer.zero_grad()
        if trainer.schedulers:
            self._step_schedulers("step", trainer.global_step)
            self._step_schedulers("step", trainer.global_step, trainer.callback_metrics)

    def _drop_gradients(self) -> None:
        """Between windows: what a validation that goes backward, or a new group of parameters, has is of no step."""
        if self._model.automatic_optimization:
            for optimizer in self._trainer.optimizers:
                optimizer.zero_grad()

    def _step_schedulers(self, interval: str, count: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Let those step whose turn it is: without ``metrics`` those that need none, with them the others.

        Raises:
            FabricKeyError: After an epoch one waits for a value that nobody has logged.
        """
        trainer, stepped = self._trainer, self._progress.stepped
        if not self._model.automatic_optimization:
            return
        for place, one in enumerate(trainer.schedulers):
            if place not in stepped and one.step(interval, count, metrics) and interval == "epoch":
                stepped.append(place)
            is_over = interval == "epoch" and metrics is trainer.callback_metrics
            if not is_over or one.monitor is None or not one.strict:
                continue
            if one.interval == "step":
                monitored(trainer.callback_metrics, one.monitor)  # raises where an epoch has not brought it
            elif place not in stepped and count % one.frequency == 0:
                raise FabricKeyError(
                    "A scheduler waits for a value that nobody logs.",
                    given=f"monitor={one.monitor!r}, metrics {', '.join(trainer.callback_metrics) or 'none'}",
                    fix="the name of one that is, or strict=False, with which it does not step",
                )

    def _validate_if_due(self, is_over: bool = False) -> None:
        """Validate, if it is time to and was not done after this batch."""
        trainer, progress = self._trainer, self._progress
        asked, total = trainer.val_check_interval, trainer.num_training_batches
        if isinstance(asked, int):
            interval: int | None = asked
        else:
            interval = None if asked == 1.0 or total is None else max(1, int(total * asked))
        if interval is None:
            is_due = is_over and progress.validated_at != progress.batches
        else:  # since the end of the window of accumulation in which it became due
            is_due = progress.batches // interval > progress.validated_at // interval
        if not is_due or not self._validation or (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch != 0:
            return
        batch, self._metrics.batch = self._metrics.batch, None
        with evaluating(self._model):
            results = evaluate(trainer, "validation", self._model, self._validation)[0]
            if is_over and not self.is_cut:
                found = {name: value for result in results for name, value in result.items()}
                self._step_schedulers("epoch", trainer.current_epoch + 1, found)
            progress.validated_at = progress.batches
            self._hooks.call_model("on_validation_end")
            self._tell("on_validation_end")
        self._drop_gradients()
        self._metrics.stage, self._metrics.batch = "train", batch

    def state_dict(self) -> dict[str, Any]:
        """The place in the run."""
        epoch, progress = self._trainer.current_epoch, self._progress
        is_over = progress.is_over
        if is_over:
            epoch, progress = epoch + 1, _Progress(world_size=self._fabric.world_size)
        if not progress.is_trained:  # the loader's place is before the window that is open
            progress = dataclasses.replace(progress, batches=progress.closed_at)
        place = {"epoch": epoch, "past_epochs": self._trainer.past_epochs, "is_over": is_over}
        return {**place, "progress": dataclasses.asdict(progress)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._trainer.current_epoch, self._trainer.past_epochs = state["epoch"], state["past_epochs"]
        self._progress = _Progress(**state["progress"])


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def _loss_of(outputs: Any) -> Any:
    return outputs if isinstance(outputs, torch.Tensor) or not isinstance(outputs, Mapping) else outputs.get("loss")
