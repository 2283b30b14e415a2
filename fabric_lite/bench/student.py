"""Student's t distribution for whole degrees of freedom, so that bench needs no statistics package."""

from __future__ import annotations

import functools
import math

__all__ = ["p_value", "quantile"]


def p_value(t: float, degrees: int) -> float:
    """The chance that Student's t lies at least this far from 0, on either side.

    The finite series of Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4; exact but for
    rounding, which leaves about 1e-15.
    """
    angle = math.atan2(abs(t), math.sqrt(degrees))
    square = math.cos(angle) ** 2
    is_odd = degrees % 2
    term = math.cos(angle) if is_odd else 1.0
    total = 0.0
    for power in range(is_odd, degrees - 1, 2):
        total += term
        term *= square * (power + 1) / (power + 2)
    within = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + within) if is_odd else within)


@functools.lru_cache(maxsize=1024)
def quantile(chance: float, degrees: int) -> float:
    """What Student's t exceeds, on either side, with this chance: the inverse of :func:`p_value`."""
    low, high = 0.0, 1.0
    while p_value(high, degrees) > chance:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, degrees) > chance else (low, middle)
    return (low + high) / 2
