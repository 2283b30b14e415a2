"""``LightningModule``: a model that says itself what a step is and which optimizers it has."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from fabric_lite import AttributeDict, Fabric, FabricKeyError, FabricRuntimeError, checkpoint
from fabric_lite.errors import unknown_arguments
from fabric_lite.loggers.logger import as_mapping
from fabric_lite.notices import rank_zero_info

if TYPE_CHECKING:
    from fabric_lite.trainer.trainer import Trainer

__all__ = ["LightningModule"]

_PLAIN = (bool, int, float, str, type(None), torch.Tensor)
Module = TypeVar("Module", bound="LightningModule")


class LightningModule(nn.Module):
    """A model with its steps. ::

        class LitModel(LightningModule):
            def training_step(self, batch, batch_idx):  # the loss, or a dict with "loss"; None: no step
                x, y = batch
                loss = nn.functional.cross_entropy(self.model(x), y)
                self.log("train_loss", loss)
                return loss

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), lr=1e-3)

    ``validation_step`` and ``test_step`` are like it, for what they log, ``predict_step`` for what it returns; where
    there are several loaders, all get a ``dataloader_idx``. A method with the name of a callback's hook
    (``on_train_epoch_end``, ...) is called too, without ``trainer`` and ``pl_module``. Where ``automatic_optimization``
    is False, the training step calls ``self.manual_backward(loss)`` and steps by itself; under several ranks it then
    calls ``self(...)``, or methods marked with ``self.mark_forward_method(name)``, for what is to be synchronized.
    """

    automatic_optimization = True
    logs_hparams = True
    _trainer: Trainer | None = None
    _hparams: AttributeDict | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``self.model`` says; for another model, override it."""
        return self.model(*args, **kwargs)  # type: ignore[operator]

    def configure_optimizers(self) -> Any:
        """An optimizer; a list of them; a list of optimizers and one of schedulers; or a dict, or several.

        A dict has ``"optimizer"`` and perhaps ``"lr_scheduler"``: a scheduler, or a dict of ``scheduler``,
        ``interval`` (``"epoch"`` or ``"step"``), ``frequency`` and, for ``ReduceLROnPlateau``, ``monitor``. None: no
        optimizer.
        """

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """What the model says of the batch."""
        return self(batch)

    @property
    def trainer(self) -> Trainer:
        """The trainer that runs it."""
        if self._trainer is None:
            raise FabricRuntimeError(f"No Trainer runs this {type(self).__name__}.", fix="trainer.fit(model, loader)")
        return self._trainer

    @property
    def fabric(self) -> Fabric:
        """The trainer's Fabric."""
        return self.trainer.fabric

    @property
    def device(self) -> torch.device:
        """Where its first parameter is."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    @property
    def current_epoch(self) -> int:
        """Counted from 0."""
        return 0 if self._trainer is None else self._trainer.current_epoch

    @property
    def global_step(self) -> int:
        """The steps of the first optimizer."""
        return 0 if self._trainer is None else self._trainer.global_step

    @property
    def logger(self) -> Any:
        """The first logger, or None."""
        return None if self._trainer is None else self._trainer.fabric.logger

    @property
    def hparams(self) -> AttributeDict:
        """What :meth:`save_hyperparameters` has kept."""
        if self._hparams is None:
            self._hparams = AttributeDict()
        return self._hparams

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool = True,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str = "mean",
        sync_dist: bool = False,
        batch_size: int | None = None,
    ) -> None:
        """Log a number, or a tensor of one, from within a step.

        Args:
            name: With both ``on_step`` and ``on_epoch`` it becomes ``name_step`` and ``name_epoch``.
            value: On every rank, if ``sync_dist``.
            prog_bar: Whether to show it beside the bar.
            logger: Whether to send it to the loggers.
            on_step: Whether to log each value; None: in training steps. Those of other steps are not sent to loggers.
            on_epoch: Whether to log what the values of an epoch come to; None: in all other steps.
            reduce_fx: What they come to: ``mean`` (by batch size), ``sum``, ``min`` or ``max``.
            sync_dist: Whether over all ranks; else it is rank 0's.
            batch_size: For the mean; None: the length of the first tensor in the batch.
        """
        trainer = self._trainer or self.trainer
        trainer.metrics.log(name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, sync_dist, batch_size)

    def log_dict(self, metrics: Mapping[str, Any], **options: Any) -> None:
        """:meth:`log` of each."""
        for name, value in metrics.items():
            self.log(name, value, **options)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """``print`` on rank 0."""
        self.fabric.print(*args, **kwargs)

    def optimizers(self) -> Any:
        """The optimizer, or a list of several; for steps made by hand."""
        optimizers = self.trainer.optimizers
        return optimizers[0] if len(optimizers) == 1 else optimizers

    def lr_schedulers(self) -> Any:
        """The learning rate scheduler, a list of several, or None; for steps made by hand."""
        schedulers = [one.scheduler for one in self.trainer.schedulers]
        return schedulers[0] if len(schedulers) == 1 else schedulers or None

    def manual_backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """``fabric.backward``; for steps made by hand."""
        self.fabric.backward(loss, *args, **kwargs)

    def save_hyperparameters(
        self, *names: Any, ignore: str | Sequence[str] = (), logger: bool = True, **values: Any
    ) -> None:
        """Called in ``__init__``: keep its arguments in :attr:`hparams`, in checkpoints and for loggers.

        Args:
            names: Of those to keep; none: all but modules. Or one mapping or Namespace, to keep instead.
            ignore: Names of those not to keep.
            logger: Whether to send them to the loggers.
            values: More to keep.

        Raises:
            FabricKeyError: ``__init__`` has no argument of this name.
        """
        self.logs_hparams = logger
        if len(names) == 1 and not isinstance(names[0], str):
            self._hparams = AttributeDict({**self.hparams, **as_mapping(names[0]), **values})
            return
        frame = inspect.currentframe()
        assert frame is not None
        assert frame.f_back is not None
        arguments = inspect.getargvalues(frame.f_back)
        given = {name: arguments.locals[name] for name in arguments.args[1:]}
        given |= arguments.locals[arguments.keywords] if arguments.keywords else {}
        if unknown := [name for name in names if name not in given]:
            raise FabricKeyError(
                "__init__ has no such arguments.", given=", ".join(map(str, unknown)), fix=", ".join(given)
            )
        left_out = {ignore} if isinstance(ignore, str) else set(ignore or ())
        kept = {name: given[name] for name in names or given if name not in left_out}
        plain = {name: value for name, value in kept.items() if not isinstance(value, nn.Module)}
        self._hparams = AttributeDict({**self.hparams, **plain, **values})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer": None}  # a copy of a model is no copy of all that trains it

    @classmethod
    def load_from_checkpoint(
        cls: type[Module], checkpoint_path: Any, map_location: Any = None, strict: bool = True, **values: Any
    ) -> Module:
        """The model in a Trainer's checkpoint, made with the hyperparameters in it and with ``values`` instead.

        On several ranks every rank calls.

        Args:
            checkpoint_path: A file or folder.
            map_location: The device of the model; None: where its ``__init__`` makes it.
            strict: Whether the names of the parameters have to be the same.
            values: Arguments of ``__init__``, instead of those that were saved.
        """
        parameters = inspect.signature(cls.__init__).parameters
        if "hparams_file" in values and "hparams_file" not in parameters:
            instead = {"hparams_file": "what is in it, by name"}
            raise unknown_arguments("load_from_checkpoint", ["hparams_file"], parameters, instead)
        saved = checkpoint.load(checkpoint_path)
        wanted = {**saved.get("hyper_parameters", {}), **values}
        if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            wanted = {name: value for name, value in wanted.items() if name in parameters}
        model = cls(**wanted)
        hook = getattr(model, "on_load_checkpoint", None)
        if callable(hook):
            hook(dict(saved["trainer"]["extra"]))
        model.load_state_dict(saved["state_dict"], strict=strict)
        return model if map_location is None else model.to(map_location)


def savable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of hyperparameters those that a checkpoint can hold, also in lists and dicts; the others are said once."""
    kept = {name: copy.deepcopy(value) for name, value in values.items() if _is_plain(value)}
    left_out = [name for name in values if name not in kept]
    if left_out:
        rank_zero_info(f"hyperparameters that a checkpoint can't hold are left out of it: {', '.join(left_out)}")
    return kept


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(type(key) is str and _is_plain(one) for key, one in value.items())
    return all(map(_is_plain, value)) if type(value) in (list, tuple) else type(value) in _PLAIN


_CALLS = {
    "training_step": "fit",
    "validation_step": "validate, or fit with val_dataloaders",
    "test_step": "test",
    "predict_step": "predict",
}


def step_of(module: LightningModule, name: str, most: int = 2) -> Callable[..., Any]:
    """A step that gets of ``(batch, batch_idx, dataloader_idx)`` as many as it needs, and of others at most so many."""
    method = getattr(module, name, None)
    if method is None:
        raise FabricRuntimeError(
            f"{type(module).__name__} has no {name}.",
            given=f"trainer.{_CALLS[name]}",
            fix=f"def {name}(self, batch, batch_idx)",
        )
    parameters = inspect.signature(method).parameters.values()
    own = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    takes = most if any(one.kind is one.VAR_POSITIONAL for one in parameters) else min(most, len(own))
    # What comes after has a meaning and a default of its own: validation_step(self, batch, batch_idx, name="val").
    count = max(takes, sum(one.default is one.empty for one in own))
    if name == "training_step" and count == most:  # a batch pays for a function around it, and gives no third
        return method
    return lambda *args: method(*args[:count])
