"""Plugins by their names in Lightning Fabric; see :mod:`fabric_lite.names`."""

from fabric_lite.names.kinds import (
    BitsandbytesPrecision,
    CheckpointIO,
    ClusterEnvironment,
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
)
from fabric_lite.precision import Precision

__all__ = [
    "BitsandbytesPrecision",
    "CheckpointIO",
    "ClusterEnvironment",
    "DoublePrecision",
    "HalfPrecision",
    "MixedPrecision",
    "Precision",
]
