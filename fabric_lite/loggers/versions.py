"""The folders of an experiment's runs."""

from __future__ import annotations

import itertools
from pathlib import Path

from fabric_lite.collectives import rank
from fabric_lite.errors import FabricRuntimeError
from fabric_lite.loggers.logger import Logger

__all__ = ["FolderLogger", "versioned"]


class FolderLogger(Logger):
    """A logger whose runs are folders, counted from ``version_0`` on."""

    @property
    def log_dir(self) -> str:
        """The run's folder."""
        folder, self._version = versioned(self._root_dir / self._name, self._version)
        return str(folder)


def versioned(folder: Path, version: int | str | None) -> tuple[Path, int | str]:
    """A run's folder in that of its experiment, and its version; None takes the first number that is free.

    Taken is made: two runs that start together get two numbers.

    Raises:
        FabricRuntimeError: None, on another rank than 0.
    """
    if version is not None:
        return folder / (version if isinstance(version, str) else f"version_{version}"), version
    if rank() != 0:
        raise FabricRuntimeError(
            "Rank 0 alone knows the number of this run.",
            given="log_dir of a logger without a version, on another rank",
            fix="fabric.broadcast(logger.log_dir if fabric.is_global_zero else None), or version=...",
        )
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        try:
            (folder / f"version_{number}").mkdir()
        except FileExistsError:
            continue
        return folder / f"version_{number}", number
    raise AssertionError  # there are enough numbers
