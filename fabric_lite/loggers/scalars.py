"""What is given for a metric, as a number: for loggers, callbacks and checkpoints alike."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from fabric_lite.errors import FabricTypeError

__all__ = ["scalar", "scalars"]


def scalar(name: str, value: Any) -> float:
    """A metric as a plain int or float; True is 1.

    Raises:
        FabricTypeError: It is none, nor a tensor or array of one.
    """
    size = getattr(value, "numel", None)
    count = size() if callable(size) else getattr(value, "size", 1)
    item = value.item() if hasattr(value, "item") and count == 1 else value
    if not isinstance(item, numbers.Real):
        raise FabricTypeError(
            "A metric is a number.", given=f"{name}={value!r:.80}", fix="a number, or a tensor with one element"
        )
    return int(item) if isinstance(item, int) else float(item)


def scalars(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Metrics as numbers, each under its name with ``prefix/`` before it.

    Raises:
        FabricTypeError: One is no number, nor a tensor or array of one.

    >>> scalars({"loss": 0.5}, "train")
    {'train/loss': 0.5}
    """
    before = f"{prefix}/" if prefix else ""
    return {f"{before}{name}": scalar(name, value) for name, value in metrics.items()}
