"""``Trainer``: the loop around a ``LightningModule``, written with Fabric's public names."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fabric_lite import Fabric, FabricValueError
from fabric_lite.callbacks import EarlyStopping, ModelCheckpoint
from fabric_lite.hooks import as_callbacks
from fabric_lite.loggers import CSVLogger
from fabric_lite.notices import rank_zero_info
from fabric_lite.trainer.checks import check_model, check_optimization, check_validation
from fabric_lite.trainer.evaluation import evaluate, evaluating
from fabric_lite.trainer.hooks import Hooks
from fabric_lite.trainer.loaders import Loaders
from fabric_lite.trainer.loop import FitLoop
from fabric_lite.trainer.metrics import Metrics
from fabric_lite.trainer.module import LightningModule, savable
from fabric_lite.trainer.optimization import Scheduled, parse_optimizers
from fabric_lite.trainer.options import check_options

__all__ = ["Trainer"]

_PLAIN_NAMES = {"validation": "validate"}  # what setup() and teardown() are told


class Trainer:
    """Runs a :class:`LightningModule`: trains, validates, tests, predicts. ::

        trainer = Trainer(max_epochs=10, accelerator="gpu", devices=4, strategy="ddp")
        trainer.fit(model, train_loader, val_loader)

    It is a loop like one of your own: all that it does goes through ``trainer.fabric``. Hooks of callbacks are called
    with ``(trainer, pl_module, ...)``, and those of the model, of the same names, first and without these two.

    Args:
        max_epochs: How many epochs a fit has; None: 1000, or as many as ``max_steps`` takes; -1: no end.
        max_steps: How many steps the first optimizer makes at most, over all fits; -1: as many as the epochs have.
        callbacks: One or several. The first fit resumes from the folder of a ``ModelCheckpoint``.
        logger: One or several; None, True: a ``CSVLogger`` in ``default_root_dir``; False: none.
        gradient_clip_val: To which norm, or value, gradients are clipped; None, 0: they are not. A callback may change
            it, as an attribute of the Trainer.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
        accumulate_grad_batches: How many batches a step is made of. ``on_train_epoch_start`` may change it.
        limit_train_batches: Of each epoch, how many batches, or as a float which part of them; so do
            ``limit_val_batches``, ``limit_test_batches`` and ``limit_predict_batches``.
        val_check_interval: After how many batches, or which part of an epoch, to validate.
        check_val_every_n_epoch: In which epochs to validate.
        log_every_n_steps: After which steps what training steps log is sent to the loggers.
        enable_checkpointing: Whether to save ``last.ckpt`` after each epoch, beside the logs, where no callback saves.
        enable_progress_bar: Whether to draw a bar, on a terminal.
        use_distributed_sampler: Whether to deal the data out to the ranks.
        fast_dev_run: So many batches of everything, without loggers and checkpoints, to see whether it runs; True: 1.
        default_root_dir: For logs and checkpoints; None: the current folder.
        fabric_options: As for :class:`fabric_lite.Fabric`: ``accelerator``, ``devices``, ``strategy``, ``precision``...
    """

    def __init__(
        self,
        *,
        max_epochs: int | None = None,
        max_steps: int = -1,
        callbacks: Any = None,
        logger: Any = None,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
        accumulate_grad_batches: int = 1,
        limit_train_batches: float = 1.0,
        limit_val_batches: float = 1.0,
        limit_test_batches: float = 1.0,
        limit_predict_batches: float = 1.0,
        val_check_interval: float = 1.0,
        check_val_every_n_epoch: int = 1,
        log_every_n_steps: int = 50,
        enable_checkpointing: bool = True,
        enable_progress_bar: bool = True,
        use_distributed_sampler: bool = True,
        fast_dev_run: bool | int = False,
        default_root_dir: str | os.PathLike[str] | None = None,
        **fabric_options: Any,
    ) -> None:
        max_steps = -1 if max_steps is None else max_steps
        default_root_dir = "." if default_root_dir is None else default_root_dir
        if max_epochs is None:
            max_epochs = 1000 if max_steps == -1 else -1
        check_options({**locals(), "fast_dev_run": int(fast_dev_run)}, fabric_options)
        limits = [limit_train_batches, limit_val_batches, limit_test_batches, limit_predict_batches]
        own = list(as_callbacks(callbacks))
        if fast_dev_run:
            limits, max_epochs, logger, enable_checkpointing = [int(fast_dev_run)] * 4, 1, False, False
            val_check_interval, check_val_every_n_epoch = 1.0, 1
            own = [one for one in own if not isinstance(one, ModelCheckpoint)]
        self.max_epochs, self.max_steps = (math.inf if one == -1 else one for one in (max_epochs, max_steps))
        self.gradient_clip_val, self.gradient_clip_algorithm = gradient_clip_val, gradient_clip_algorithm
        self.accumulate_grad_batches = accumulate_grad_batches
        self.val_check_interval, self.check_val_every_n_epoch = val_check_interval, check_val_every_n_epoch
        self.default_root_dir = os.fspath(default_root_dir)
        if enable_checkpointing and not any(isinstance(one, ModelCheckpoint) for one in own):
            own.append(_LastCheckpoint())
        # Those that save last, so that they save what the others know by then.
        self.callbacks = tuple(sorted(own, key=lambda one: isinstance(one, ModelCheckpoint)))
        self.early_stopping_callbacks = [one for one in own if isinstance(one, EarlyStopping)]
        self.checkpoint_callbacks = [one for one in own if isinstance(one, ModelCheckpoint)]
        loggers = CSVLogger(default_root_dir) if logger is None or logger is True else logger or None
        self.fabric = Fabric(callbacks=self.callbacks, loggers=loggers, **fabric_options)
        by_stage = dict(zip(("train", "validation", "test", "predict"), limits, strict=True))
        self.loaders = Loaders(self.fabric, by_stage, use_distributed_sampler, enable_progress_bar)
        self.metrics = Metrics(self.fabric, log_every_n_steps)
        self.hooks = Hooks(self)
        self.optimizers: list[torch.optim.Optimizer] = []
        self.schedulers: list[Scheduled] = []
        self.lightning_module: LightningModule | None = None
        self.num_training_batches: int | None = None  # of an epoch, where that is known
        self.should_stop = False  # to be set on all ranks alike
        self.current_epoch = 0
        self.past_epochs = 0  # those of earlier fits, for the order of the data
        self.state: dict[str, Any] = {}  # what a checkpoint of the fit holds
        self._fits = 0
        self._loop: FitLoop | None = None

    @property
    def global_step(self) -> int:
        """The steps that the first optimizer has made, over all fits."""
        return self.fabric.steps

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.fabric.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that prints and logs."""
        return self.fabric.is_global_zero

    @property
    def logger(self) -> Any:
        """The first logger, or None."""
        return self.fabric.logger

    @property
    def loggers(self) -> list[Any]:
        """All loggers."""
        return self.fabric.loggers

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """The latest of all that was logged."""
        return self.metrics.latest

    @property
    def checkpoint_callback(self) -> Any:
        """The first ``ModelCheckpoint``, or what saves in its place."""
        return next((one for one in self.callbacks if isinstance(one, (ModelCheckpoint, _LastCheckpoint))), None)

    @property
    def estimated_stepping_batches(self) -> float:
        """How many steps ``fit`` makes at most."""
        if self.num_training_batches is None:
            return self.max_steps
        return min(self.max_steps, -(-self.num_training_batches // self.accumulate_grad_batches) * self.max_epochs)

    def fit(
        self, model: LightningModule, train_dataloaders: Any = None, val_dataloaders: Any = None, ckpt_path: Any = None
    ) -> None:
        """Train; every rank calls. The model stays set up.

        Args:
            model: Its ``train_dataloader()`` and ``val_dataloader()`` make the loaders that are not given.
            train_dataloaders: The loader.
            val_dataloaders: One or several.
            ckpt_path: To go on from, at its place in the data; ``"best"`` and ``"last"`` are those of the first
                ``ModelCheckpoint``. None: the newest in the folder of a ``ModelCheckpoint``.

        Raises:
            FabricValueError: The model and the arguments do not go together.
        """
        with self._tells_of_errors():
            self._fit(model, train_dataloaders, val_dataloaders, ckpt_path)

    def _fit(self, model: LightningModule, train_dataloaders: Any, val_dataloaders: Any, ckpt_path: Any) -> None:
        self._begin(model, "fit")
        released, self.optimizers = self.optimizers, []
        self.fabric.release(*released)
        del released  # else monitors would count them
        loaders = self.loaders.set_up(model, train_dataloaders, "train_dataloader", pad=None)
        if len(loaders) != 1:
            raise FabricValueError(
                "A Trainer trains on one loader.",
                given=f"{len(loaders)} loaders",
                fix="one whose batches have the parts of all, or torch.utils.data.ConcatDataset",
            )
        loader = loaders[0]
        validation = self.loaders.set_up(model, val_dataloaders, "val_dataloader", is_needed=False)
        validation = [one for one in validation if self.loaders.count(one, "validation") != 0]
        self.num_training_batches = self.loaders.count(loader, "train")
        optimizers, self.schedulers = parse_optimizers(model.configure_optimizers())
        check_optimization(self, model, optimizers)
        check_validation(self, has_validation=bool(validation))
        if not optimizers:
            rank_zero_info("configure_optimizers returned no optimizer: steps by hand alone can train this model")
        self._set_up_model(model, optimizers)
        self.optimizers = optimizers
        for optimizer in optimizers:
            optimizer.zero_grad()  # what somebody has left there is no part of the first step
        self.past_epochs += self.current_epoch + (self._loop is not None and self._loop.is_cut)
        self.current_epoch, self.should_stop = 0, False
        self._loop = FitLoop(self, model, loader, validation)
        # The trainer first: what it sends to loggers before a save is a part of what they save.
        objects = {"trainer": self, "fabric": self.fabric, "state_dict": model, "loader": loader}
        objects |= {"optimizers": optimizers, "lr_schedulers": [one.scheduler for one in self.schedulers]}
        # Those of now are saved, whatever they were.
        self.state = {**objects, "hyper_parameters": savable(model.hparams)}
        if model.hparams and model.logs_hparams:
            self.fabric.log_hyperparams(model.hparams)
        self.hooks.call("on_fit_start")
        self._resume(ckpt_path, objects)
        self.metrics.stage = "train"
        self.hooks.call("on_train_start", state=None)
        self._loop.run()
        self.metrics.stage = None  # the last epoch has its values
        self.hooks.call("on_train_end")
        self.hooks.call("on_fit_end")
        self._end("fit")

    def validate(self, model: LightningModule | None = None, dataloaders: Any = None) -> list[dict[str, float]]:
        """Run ``validation_step`` on all batches; every rank calls. Returns what was logged, for each loader."""
        return self._evaluate_alone("validation", model, dataloaders, "val_dataloader")[0]

    def test(self, model: LightningModule | None = None, dataloaders: Any = None) -> list[dict[str, float]]:
        """Run ``test_step`` on all batches; every rank calls. Returns what was logged, for each loader."""
        return self._evaluate_alone("test", model, dataloaders, "test_dataloader")[0]

    def predict(self, model: LightningModule | None = None, dataloaders: Any = None) -> list[Any]:
        """What ``predict_step`` returns for this rank's batches; of several loaders a list each. Every rank calls."""
        outputs = self._evaluate_alone("predict", model, dataloaders, "predict_dataloader")[1]
        return outputs[0] if len(outputs) == 1 else outputs

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Save what a ``ModelCheckpoint`` would; every rank calls."""
        self.fabric.save(Path(path), self.state)

    def _resume(self, ckpt_path: Any, objects: dict[str, Any]) -> None:
        """Go on from a checkpoint: the one that was named or, in the first fit, the newest of all callbacks."""
        self._fits += 1
        if self._fits > 1:
            for early in self.early_stopping_callbacks:
                early.reset()
        savers = [one.checkpoints for one in self.checkpoint_callbacks]
        if ckpt_path in ("best", "last"):
            found = [getattr(one, f"{ckpt_path}_model_path") for one in self.checkpoint_callbacks[:1]]
            if found in ([], [None]):
                raise FabricValueError(
                    "There is no checkpoint of that name: no ModelCheckpoint has saved one.",
                    given=f"{ckpt_path=}",
                    fix="ckpt_path=None, which goes on from the newest if there is one; or the path of a checkpoint",
                )
            ckpt_path = found[0]
        if ckpt_path is not None:
            self.fabric.load(ckpt_path, objects)
        elif self._fits == 1 and savers:
            saved = [one.entries() for one in savers]
            newest = self.fabric.broadcast([entries[0].step if entries else -1 for entries in saved])
            savers[newest.index(max(newest))].resume(objects)
        else:
            return
        for one in savers:
            one.go_on_at(self.global_step)
        for optimizer in self.optimizers:
            optimizer._opt_called = self.global_step > 0  # type: ignore[attr-defined]  # else schedulers warn

    def _evaluate_alone(
        self, stage: str, model: LightningModule | None, dataloaders: Any, method: str
    ) -> tuple[list[dict[str, float]], list[list[Any]]]:
        model = model or self.lightning_module
        if model is None:
            raise FabricValueError("There is no model.", given="model=None before any fit", fix="a LightningModule")
        with self._tells_of_errors():
            self._begin(model, stage)
            loaders = self.loaders.set_up(model, dataloaders, method)
            self._set_up_model(model)
            with evaluating(model):
                results = evaluate(self, stage, model, loaders)
                self.hooks.call(f"on_{stage}_end", state=self.state, metrics=self.callback_metrics, is_fitting=False)
            self.metrics.end_epoch(self.global_step)  # what these have logged
            for name, value in itertools.chain.from_iterable(result.items() for result in results[0]):
                self.fabric.print(f"{name:30} {value:.6g}")
            self._end(stage)
        return results

    def _begin(self, model: LightningModule, stage: str) -> None:
        check_model(model, stage)
        self.fabric.launch()
        model._trainer, self.lightning_module = self, model
        self.hooks.begin(model)
        self.metrics.rest()
        if stage == "fit":
            self.metrics.begin()
        with self.fabric.rank_zero_first(local=True):
            if self.fabric.local_rank == 0:
                self.hooks.call_model("prepare_data")
        self.hooks.call("setup", _PLAIN_NAMES.get(stage, stage))

    @contextlib.contextmanager
    def _tells_of_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # Ctrl+C too
            if self.lightning_module is not None:
                self.hooks.call("on_exception", error)
            raise

    def _end(self, stage: str) -> None:
        self.hooks.call("teardown", _PLAIN_NAMES.get(stage, stage))
        self.metrics.rest()

    def _set_up_model(self, model: LightningModule, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
        if self.fabric.has_set_up(model):
            if optimizers:
                self.fabric.setup_optimizers(*optimizers)
            return
        self.fabric.setup(model, *optimizers)
        # A step that goes backward itself can't be a part of forward: there its calls of the model are.
        steps = ["validation_step", "test_step", "predict_step"] + ["training_step"] * model.automatic_optimization
        for name in steps:
            if hasattr(model, name):
                model.mark_forward_method(name)  # type: ignore[operator]

    def state_dict(self) -> dict[str, Any]:
        """The place in the run, its totals, what ``on_save_checkpoint(checkpoint)`` adds; every rank calls."""
        assert self._loop is not None
        self._loop.send_late()
        extra: dict[str, Any] = {}
        self.hooks.call("on_save_checkpoint", extra)
        return {**self._loop.state_dict(), "metrics": self.metrics.state_dict(), "extra": extra}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        assert self._loop is not None
        self._loop.load_state_dict(state)
        self.metrics.load_state_dict(state["metrics"])
        self.hooks.call("on_load_checkpoint", dict(state["extra"]))


class _LastCheckpoint:
    """Saves after each epoch beside the logs; resumes nothing."""

    best_model_path: Path | None = None
    best_model_score: float | None = None

    def on_train_epoch_end(self, *, trainer: Trainer, state: Mapping[str, Any]) -> None:
        if self.best_model_path is None:
            fabric, folder = trainer.fabric, None
            if fabric.is_global_zero:
                folder = getattr(fabric.logger, "log_dir", None) or CSVLogger(trainer.default_root_dir).log_dir
            folder = fabric.broadcast(folder)
            self.best_model_path = Path(folder) / "checkpoints" / "last.ckpt"
        trainer.fabric.save(self.best_model_path, state)
