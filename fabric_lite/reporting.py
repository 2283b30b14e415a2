"""What a Fabric tells the reader: lines, a bar, and metrics for loggers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fabric_lite.data import is_extended_loader, place_of
from fabric_lite.identity import Identity
from fabric_lite.loggers.logger import Hyperparameters
from fabric_lite.loggers.sending import Sender
from fabric_lite.progress_bar import ProgressBar

__all__ = ["Reporting"]


class Reporting(Identity):
    """From rank 0 alone; every rank may call, and none waits for another."""

    _sender: Sender
    _has_sent_record: bool

    def print(self, *args: Any, **kwargs: Any) -> None:
        """``print`` on rank 0."""
        if self.is_global_zero:
            print(*args, **kwargs)

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Send one scalar to every logger."""
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send scalars to every logger, from rank 0; without a logger this costs nothing.

        A backend that fails does not stop the training: the first failure of each is a warning.

        Raises:
            FabricTypeError: A value is no number, nor a tensor of one.
        """
        if self._loggers and self.is_global_zero:
            self._launched()
            if not self._has_sent_record:
                self._has_sent_record = True
                # Not the command line: what is secret in it would leave this machine.
                self._sender.log_hyperparams({"run": {k: v for k, v in self.run_record().items() if k != "command"}})
            self._sender.log_metrics(metrics, step)

    def log_hyperparams(self, params: Hyperparameters) -> None:
        """Send what the run was started with, a mapping, Namespace or dataclass, to the loggers that take it.

        Raises:
            FabricTypeError: It is something else.
        """
        if self._loggers and self.is_global_zero:
            self._launched()
            self._sender.log_hyperparams(params)

    def progress(
        self, loader: Iterable[Any], title: str = "", limit: int | None = None, is_shown: bool = True
    ) -> ProgressBar:
        """The loader with a bar on rank 0's terminal: how far it is, how fast, and what ``show`` is told.

        ::

            bar = fabric.progress(loader, f"epoch {epoch}")
            for batch in bar:
                ...
                bar.show(loss=loss)

        Nothing is drawn where standard error is not a terminal. Samples are those of all ranks.

        Args:
            loader: Any iterable.
            title: At the beginning of the line.
            limit: How many of its batches to take at most.
            is_shown: Whether to draw at all.
        """
        placement = self._launched()
        is_ours = is_extended_loader(loader)
        begin = (lambda: place_of(loader).batch) if is_ours else None
        shares = placement.data_world_size if is_ours else 1
        return ProgressBar(
            loader, title, limit=limit, begin=begin, shares=shares, is_shown=is_shown and self.is_global_zero
        )
