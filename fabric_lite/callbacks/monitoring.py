"""What callbacks that watch a value share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fabric_lite.collectives import broadcast_object, rank
from fabric_lite.errors import FabricError, FabricKeyError, FabricValueError
from fabric_lite.loggers.scalars import scalar

__all__ = ["check_mode", "monitored"]


def check_mode(mode: str) -> None:
    """Raise unless ``mode`` says which of two values is better.

    Raises:
        FabricValueError: It is neither ``"min"`` nor ``"max"``.
    """
    if mode not in ("min", "max"):
        raise FabricValueError("The best value is the least or the greatest.", given=f"mode={mode!r}", fix='"min"')


def monitored(metrics: Mapping[str, Any], name: str) -> float:
    """Rank 0's value of that name, on all ranks; every rank calls.

    Raises:
        FabricKeyError: It is not among ``metrics`` of rank 0; on all ranks.
        FabricTypeError: It is no number there; on all ranks.
    """
    found: float | FabricError = broadcast_object(_value_or_error(metrics, name) if rank() == 0 else None)
    if isinstance(found, FabricError):
        raise found
    return found


def _value_or_error(metrics: Mapping[str, Any], name: str) -> float | FabricError:
    if name not in metrics:
        return FabricKeyError(
            "The value that a callback watches is not among the metrics.",
            given=f"monitor={name!r}, metrics {', '.join(map(repr, metrics)) or 'none'}",
            fix=f"metrics={{{name!r}: ...}}, or another name for monitor",
        )
    try:
        return float(scalar(name, metrics[name]))
    except FabricError as error:
        return error
