"""See :mod:`fabric_lite.names`."""

from pathlib import Path

from torch.optim.lr_scheduler import LRScheduler

from fabric_lite.names.helpers import Optimizable

_PATH = str | Path

__all__ = ["_PATH", "LRScheduler", "Optimizable"]
