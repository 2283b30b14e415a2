"""Who is told what happens in a Trainer: the model first, then the callbacks, each by the method of that name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fabric_lite import FabricValueError
from fabric_lite.hooks import call_hook
from fabric_lite.trainer.module import LightningModule

if TYPE_CHECKING:
    from fabric_lite.trainer.trainer import Trainer

__all__ = ["Callback", "Hooks"]

# A batch pays for these, so that they are called only where somebody has them.
_OF_BATCHES = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
)


class Callback:
    """For those who like a base class: any object with methods of hooks' names is a callback."""


class Hooks:
    """Calls the hooks of a trainer's model and callbacks; who has none of a name is passed over."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.of_batches: set[str] = set()  # those of single batches that anybody has

    def begin(self, model: LightningModule) -> None:
        """See which hooks there are."""
        owners = (model, *self._trainer.callbacks)
        self.of_batches = {name for name in _OF_BATCHES if any(callable(getattr(one, name, None)) for one in owners)}

    def call(self, name: str, *args: Any, **named: Any) -> None:
        """The model's and the callbacks': see the two below."""
        self.call_model(name, *args)
        self.call_callbacks(name, *args, **named)

    def begin_batch(self, batch: Any, number: int) -> None:
        """``on_train_batch_start``.

        Raises:
            FabricValueError: The model's answers -1, with which Lightning leaves the epoch.
        """
        answers = self.call_model("on_train_batch_start", batch, number)
        if any(type(answer) is int and answer == -1 for answer in answers):
            raise FabricValueError(
                "This Trainer does not leave an epoch because a hook says so.",
                given="-1 from on_train_batch_start",
                fix="None from training_step, which passes over the batch; or trainer.should_stop, on all ranks alike",
            )
        self.call_callbacks("on_train_batch_start", batch, number)

    def call_model(self, name: str, *args: Any) -> list[Any]:
        """The model's, with as many of ``args`` as it takes; returns what it answers."""
        return call_hook([self._trainer.lightning_module], name, *args)

    def call_callbacks(self, name: str, *args: Any, **named: Any) -> None:
        """The callbacks', with ``(trainer, pl_module, *args)`` and what else they name."""
        trainer = self._trainer
        named |= {"trainer": trainer, "fabric": trainer.fabric}
        trainer.fabric.call(name, trainer, trainer.lightning_module, *args, **named)
