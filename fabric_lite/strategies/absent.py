"""Strategies of Lightning Fabric that fabric_lite does not have: names that programs import, and errors on use."""

from __future__ import annotations

from typing import Any

from fabric_lite.errors import StrategyError
from fabric_lite.strategies.base import Strategy

__all__ = ["DeepSpeedStrategy"]


class DeepSpeedStrategy(Strategy):
    """Not here: it raises StrategyError."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise StrategyError(
            "fabric_lite has no DeepSpeed strategy.",
            given="DeepSpeedStrategy(...)",
            fix="FSDPStrategy(), which shards too",
        )
