"""What a logger is, and what all share: rank 0 alone, plain numbers, flat names, steps that do not come twice."""

from __future__ import annotations

import abc
import argparse
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from fabric_lite.collectives import rank
from fabric_lite.errors import FabricImportError, FabricTypeError
from fabric_lite.loggers.guard import Guard
from fabric_lite.loggers.scalars import scalars

__all__ = [
    "Hyperparameters",
    "Logger",
    "as_mapping",
    "check_options",
    "flat",
    "needs",
    "rank_zero_experiment",
]

Hyperparameters = Mapping[str, Any] | argparse.Namespace | Any  # the last: a dataclass


class Logger(abc.ABC):
    """Where the metrics of a run go. One of your own writes :meth:`write_metrics` and :meth:`write_params`.

    To be used after ``Fabric()``, on any rank: on others than 0 the public methods do nothing. Nothing is made on the
    disk or in the backend before the first metrics. A backend that fails is a warning. As part of a checkpoint (a
    Fabric's own loggers are) a logger goes on where that was saved, in the same version.

    Args:
        root_dir: Where it writes.
        name: Of the experiment.
        version: Of the run; None: a new one.
        prefix: Before every metric's name, with a ``/`` between.
    """

    handles: tuple[str, ...] = ()  # the attributes that hold what cannot be pickled; None when nothing is open

    def __init_subclass__(cls, **options: Any) -> None:
        """Look whether a logger was written for Lightning's base class, whose methods these are not.

        Raises:
            FabricTypeError: It has ``log_metrics`` of its own, and no ``write_metrics``.
        """
        super().__init_subclass__(**options)
        if cls.log_metrics is not Logger.log_metrics and cls.write_metrics is Logger.write_metrics:
            raise FabricTypeError(
                "A logger that derives from Logger writes metrics in write_metrics(metrics, step).",
                given=f"class {cls.__name__} with log_metrics",
                fix=f"class {cls.__name__}: without a base, since any object with log_metrics is a logger; "
                "or write_metrics and write_params instead of log_metrics and log_hyperparams",
            )

    def __init__(self, root_dir: Any, name: str, version: int | str | None = None, prefix: str = "") -> None:
        self._root_dir, self._name, self._prefix = Path(root_dir), name, prefix
        self._version = self._asked_version = version
        self._step = -1  # the last one that was logged
        self._resumed_at: int | None = None  # of a run that goes on, the last step that it has
        self._params: dict[str, Any] = {}  # that wait for the first metrics, when it is known which run they are of
        self._compared: dict[str, float] = {}  # values that came with them, and wait too
        self.guard = Guard(type(self).__name__)

    @property
    def name(self) -> str:
        """Of the experiment."""
        return self._name

    @property
    def version(self) -> int | str | None:
        """Of the run; None before the first use, and on other ranks than 0 unless it was asked for."""
        return self._version

    @property
    def root_dir(self) -> str:
        """Where it writes."""
        return str(self._root_dir)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log scalars: numbers, or tensors and arrays of one.

        Args:
            metrics: By name.
            step: Which they are of; None: the one after the last, 0 at first.

        Raises:
            FabricTypeError: A value is no scalar.
        """
        if rank() != 0:
            return
        step = self._step + 1 if step is None else int(step)
        values = scalars(metrics, self._prefix)
        self._write_waiting()
        self.guard.attempt(self.write_metrics, values, step)
        self._step = max(self._step, step)

    def log_hyperparams(self, params: Hyperparameters, metrics: Mapping[str, Any] | None = None) -> None:
        """Log what a run was started with: a mapping, Namespace or dataclass, nested names joined by ``/``.

        They are written with the first metrics, or by :meth:`save`.

        Args:
            params: By name.
            metrics: Scalars by which runs are compared, written with them, for the last step; for 0 at first.

        Raises:
            FabricTypeError: The parameters have no names, or a value of the metrics is no scalar.
        """
        if rank() == 0:
            compared = scalars(metrics or {}, self._prefix)
            self._params |= flat(as_mapping(params))
            self._compared |= compared

    def save(self) -> None:
        """Write out what waits in memory."""
        if rank() == 0:
            self._write_waiting()
            self.guard.attempt(self.flush)

    def finalize(self, status: str = "success") -> None:
        """The run ends with this status: ``"success"``, ``"failed"`` or ``"aborted"``."""
        if rank() == 0:
            self._write_waiting()
            self.guard.attempt(self.close, status, even_at_rest=True)

    @abc.abstractmethod
    def write_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Write the scalars; on rank 0."""

    @abc.abstractmethod
    def write_params(self, params: dict[str, Any]) -> None:
        """Write parameters with flat names; on rank 0."""

    def flush(self) -> None:  # noqa: B027 - most backends hold nothing back
        """Let the backend write out what it holds back; on rank 0."""

    def close(self, status: str) -> None:
        """Let the backend end the run; on rank 0. What is logged after it opens it again."""
        self.flush()

    def state_dict(self) -> dict[str, Any]:
        """Which run this is, and the last step that was logged; those of rank 0 count."""
        return {"name": self._name, "version": self._version, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in that run after that step; not if it is one of another name, or another version was asked for.

        What this process has logged before, if anything, stays in its own version.
        """
        version, asked = state["version"], self._asked_version
        if state["name"] != self._name or version is None or asked not in (None, version):
            return
        if rank() == 0 and any(getattr(self, name) is not None for name in self.handles):
            self.guard.attempt(self.close, "aborted", even_at_rest=True)
        self._version, self._step = version, int(state["step"])
        self._resumed_at = self._step
        self.go_on(state)

    def go_on(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most need no more than version and step
        """Take from :meth:`state_dict` what a subclass has added to it."""

    def _write_waiting(self) -> None:
        params, self._params = self._params, {}
        if params and not self.guard.attempt(self.write_params, params):
            self._params = {**params, **self._params}
        compared, self._compared = self._compared, {}
        if compared and not self.guard.attempt(self.write_metrics, compared, max(self._step, 0)):
            self._compared = {**compared, **self._compared}

    def __getstate__(self) -> dict[str, Any]:
        # For ranks that are started with a pickle of it: they open their own.
        return {**self.__dict__, **dict.fromkeys(self.handles)}


def as_mapping(params: Hyperparameters) -> Mapping[str, Any]:
    """Parameters by name.

    Raises:
        FabricTypeError: They are neither a mapping, nor a Namespace, nor a dataclass.
    """
    if isinstance(params, argparse.Namespace):
        return vars(params)
    if dataclasses.is_dataclass(params) and not isinstance(params, type):
        return {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    if not isinstance(params, Mapping):
        raise FabricTypeError(
            "Parameters have names.",
            given=f"{type(params).__name__}: {params!r:.80}",
            fix='{"lr": 0.1}, or a Namespace',
        )
    return params


def flat(params: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Parameters by names that are joined with ``/``; of nested mappings, Namespaces and dataclasses.

    >>> flat({"optimizer": {"lr": 0.1}, "seed": 1})
    {'optimizer/lr': 0.1, 'seed': 1}
    """
    found: dict[str, Any] = {}
    for name, value in params.items():
        own = f"{above}/{name}" if above else str(name)
        is_data = dataclasses.is_dataclass(value) and not isinstance(value, type)
        is_nested = is_data or isinstance(value, (Mapping, argparse.Namespace))
        found |= flat(as_mapping(value), own) if is_nested else {own: value}
    return found


def needs(logger: str, *packages: str) -> None:
    """Look whether one of these packages is there, without importing it.

    Raises:
        FabricImportError: None is.
    """
    specs = [importlib.util.find_spec(package) for package in packages]
    if not any(spec is not None and spec.origin is not None for spec in specs):  # a folder of that name is no package
        raise FabricImportError(
            f"{logger} needs a package that is not installed.",
            given=" or ".join(packages),
            fix=f"pip install {packages[0]}",
        )


def check_options(logger: str, options: Collection[str], taken: Collection[str], of: str) -> None:
    """Look whether what a logger was given for the backend's own function is taken there.

    Args:
        logger: Its class.
        options: Their names.
        taken: Those that are.
        of: The function.

    Raises:
        FabricTypeError: One is not: every write would fail.
    """
    unknown = [name for name in options if name not in taken]
    if unknown:
        raise FabricTypeError(
            f"{logger} takes the options of {of}, and no others.",
            given=", ".join(f"{name}=" for name in unknown),
            fix=", ".join(taken),
        )


def rank_zero_experiment(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """For a property that makes the backend's own object: other ranks than 0 get one whose calls do nothing."""

    @functools.wraps(function)
    def experiment(self: Any) -> Any:
        return function(self) if rank() == 0 else _Nothing()

    return experiment


class _Nothing:
    """Takes every call, item and attribute, and does nothing."""

    def __getattr__(self, _: str) -> _Nothing:
        return self

    def __call__(self, *_: Any, **__: Any) -> _Nothing:
        return self

    def __getitem__(self, _: Any) -> _Nothing:
        return self

    def __setitem__(self, *_: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())
