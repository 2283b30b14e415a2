"""What a Fabric does with its loggers, on rank 0: a backend that fails never stops the training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fabric_lite.errors import FabricTypeError
from fabric_lite.loggers.guard import Guard
from fabric_lite.loggers.logger import Hyperparameters, Logger, as_mapping
from fabric_lite.loggers.scalars import scalars

__all__ = ["Sender"]


class Sender:
    """Calls every logger, each through a guard of its own.

    Args:
        loggers: Objects with ``log_metrics(metrics, step)``, and perhaps ``log_hyperparams``, ``save``, ``finalize``.

    Raises:
        FabricTypeError: One has no ``log_metrics``, or is a class.
    """

    def __init__(self, loggers: Sequence[Any]) -> None:
        for logger in loggers:
            _check(logger)
        self._loggers = loggers  # to which more may be added
        self._guards: dict[int, Guard] = {}  # by id, of those that have none of their own

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Send scalars to every logger.

        Raises:
            FabricTypeError: One is no scalar.
        """
        values = scalars(metrics)
        self._each(lambda logger: logger.log_metrics(metrics=dict(values), step=step))

    def log_hyperparams(self, params: Hyperparameters) -> None:
        """Send parameters to those that take them."""
        values = as_mapping(params)

        def send(logger: Any) -> None:
            # Lightning's own loggers that take no parameters say it so.
            with contextlib.suppress(NotImplementedError):
                logger.log_hyperparams(dict(values))

        self._each(send, "log_hyperparams")

    def save(self) -> None:
        """Let those that hold something back write it out."""
        self._each(lambda logger: logger.save(), "save")

    def finalize(self, status: str) -> None:
        """Let those that can end with this status, and say how often each has failed."""
        self._each(lambda logger: logger.finalize(status), "finalize", even_at_rest=True)
        for logger in self._loggers:
            self._guard(logger).report()

    def _each(self, call: Callable[[Any], None], needed: str = "log_metrics", *, even_at_rest: bool = False) -> None:
        for logger in self._loggers:
            if needed != "finalize":
                _check(logger)
            if getattr(type(logger), needed, None) is getattr(Logger, needed):
                call(logger)  # which asks its guard itself
            elif callable(getattr(logger, needed, None)):
                self._guard(logger).attempt(call, logger, even_at_rest=even_at_rest)

    def _guard(self, logger: Any) -> Guard:
        if isinstance(logger, Logger):
            return logger.guard
        return self._guards.setdefault(id(logger), Guard(type(logger).__name__))


def _check(logger: Any) -> None:
    if isinstance(logger, type) or not callable(getattr(logger, "log_metrics", None)):
        raise FabricTypeError(
            "A logger is an object with log_metrics(metrics, step).",
            given=f"the class {logger.__name__}" if isinstance(logger, type) else f"{logger!r:.80}",
            fix='loggers=CSVLogger("runs")',
        )
