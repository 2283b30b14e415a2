"""One device, one process."""

from __future__ import annotations

import dataclasses

from fabric_lite.strategies.base import Strategy

__all__ = ["SingleDeviceStrategy"]


@dataclasses.dataclass(frozen=True)
class SingleDeviceStrategy(Strategy):
    """Everything on one device. ``model(x)`` is torch's own call; nothing is communicated."""

    @property
    def uses_several_processes(self) -> bool:
        return False
