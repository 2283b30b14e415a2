"""The parameters of an optimizer."""

from __future__ import annotations

import torch

__all__ = ["parameters_of"]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return all parameters of ``optimizer``, group by group."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
