"""Moving nested data to a device."""

from __future__ import annotations

from typing import Any

import torch

from fabric_lite.trees import map_leaves

__all__ = ["move"]


def move(data: Any, device: torch.device) -> Any:
    """Return ``data`` with every leaf that has ``.to`` on ``device``; containers keep their type."""

    def to_device(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.to(device, non_blocking=device.type != "cpu" and leaf.is_pinned())
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    return map_leaves(to_device, data)
