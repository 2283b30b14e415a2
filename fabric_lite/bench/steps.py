"""What one rank does in one step, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = ["Step"]


@dataclasses.dataclass(frozen=True)
class Step:
    """What one rank did from the end of one optimizer step to the end of the next.

    Args:
        calls: Collectives by the name of their operator.
        bytes: By the same names, what the rank puts into them.
        flops: Floating point operations of matrix products, convolutions and attention, by the dtype of the result.
        touched_bytes: What operators read and write, each by itself.
        traffic: Bytes that the rank sends, by the slowest link on the way: ``"node"`` or ``"network"``. By rings, as
            NCCL does for large messages.
    """

    calls: Mapping[str, int]
    bytes: Mapping[str, int]
    flops: Mapping[str, float]
    touched_bytes: float
    traffic: Mapping[str, float]
