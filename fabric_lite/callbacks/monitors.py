"""Callbacks that log what a run is like, after its optimizers' steps, with no call in the loop."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch.optim import Optimizer

from fabric_lite.clipping import total_norm
from fabric_lite.device import bytes_in_use
from fabric_lite.errors import FabricValueError
from fabric_lite.parameters import mesh_of, parameters_of

__all__ = ["DeviceMemoryMonitor", "GradientNormMonitor", "LearningRateMonitor"]


class _Names:
    """A name for each optimizer: its class, from the second of a class on with a number."""

    def __init__(self) -> None:
        self._names: weakref.WeakKeyDictionary[Optimizer, str] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> Any:
        return _Names, ()  # of other processes' optimizers nothing is known

    def of(self, optimizer: Optimizer) -> str:
        if optimizer not in self._names:
            kind = type(optimizer).__name__
            same = sum(name.split("-")[0] == kind for name in self._names.values())
            self._names[optimizer] = f"{kind}-{same}" if same else kind
        return self._names[optimizer]


class LearningRateMonitor:
    """Logs the learning rate that each step was made with: ``lr-AdamW``, of several groups ``lr-AdamW/pg1`` and so on.

    Args:
        every_n_steps: After which steps, by ``fabric.steps``.
        log_momentum: Whether to log momentum too, or the first of Adam's betas: ``lr-AdamW-momentum``.
    """

    def __init__(self, every_n_steps: int = 1, log_momentum: bool = False) -> None:
        self._every = _checked(every_n_steps)
        self._log_momentum = log_momentum
        self._names = _Names()

    def on_after_optimizer_step(self, *, fabric: Any, optimizer: Optimizer) -> None:
        """Log, if it is time to."""
        name = self._names.of(optimizer)
        if fabric.steps % self._every:
            return
        groups, metrics = optimizer.param_groups, {}
        for number, group in enumerate(groups, 1):
            suffix = f"/pg{number}" if len(groups) > 1 else ""
            metrics[f"lr-{name}{suffix}"] = group["lr"]
            momentum = group.get("momentum", group["betas"][0] if "betas" in group else None)
            if self._log_momentum and momentum is not None:
                metrics[f"lr-{name}-momentum{suffix}"] = momentum
        fabric.log_dict(metrics, step=fabric.steps)


class GradientNormMonitor:
    """Logs the norm of the gradients that a step was made with, over all ranks: ``grad_norm-AdamW``.

    After clipping, if there was any: ``fabric.clip_gradients`` returns the norm before. That of a step that was skipped
    because its gradients overflowed is not finite.

    Args:
        every_n_steps: Of which steps; each costs a pass over the gradients and, when sharded, a reduction.
        norm_type: The p of the p-norm.
    """

    def __init__(self, every_n_steps: int = 1, norm_type: float = 2.0) -> None:
        self._every, self._norm_type = _checked(every_n_steps), norm_type
        self._names = _Names()

    def on_after_optimizer_step(self, *, fabric: Any, optimizer: Optimizer) -> None:
        """Log, if it is time to; with sharded gradients every rank calls."""
        name, step = self._names.of(optimizer), fabric.steps
        if step % self._every:
            return
        parameters = parameters_of(optimizer)
        # Whether this rank has a gradient is not for it alone to say where all reduce.
        if any(parameter.grad is not None or mesh_of(parameter) is not None for parameter in parameters):
            fabric.log(f"grad_norm-{name}", total_norm(parameters, self._norm_type), step=step)


class DeviceMemoryMonitor:
    """Logs the most memory that any rank has: of the accelerator, or of the process where there is none.

    ``memory/allocated_bytes``, ``memory/reserved_bytes`` and ``memory/peak_bytes`` of an accelerator's allocator,
    ``memory/resident_bytes`` and ``memory/peak_bytes`` of a process.

    Args:
        every_n_steps: After which steps, by ``fabric.steps``; each costs a reduction over the ranks.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self._every = _checked(every_n_steps)
        self._logged_at: int | None = None

    def on_after_optimizer_step(self, *, fabric: Any) -> None:
        """Log, if it is time to; every rank calls."""
        step = fabric.steps
        if step % self._every or step == self._logged_at:  # another optimizer's step
            return
        self._logged_at = step
        own = _bytes(fabric.device)
        most = fabric.all_reduce(torch.tensor(list(own.values())), reduce_op="max")
        fabric.log_dict(dict(zip(own, most.tolist(), strict=True)), step=step)


def _bytes(device: torch.device) -> dict[str, int]:
    if device.type == "cpu":
        return {"memory/resident_bytes": _resident_bytes(), "memory/peak_bytes": _peak_resident_bytes()}
    return {f"memory/{name}_bytes": count for name, count in bytes_in_use(device).items()}


def _resident_bytes() -> int:
    import resource

    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux
        return _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _checked(every_n_steps: int) -> int:
    if every_n_steps < 1:
        raise FabricValueError(
            "Something is logged after each step at most.", given=f"every_n_steps={every_n_steps}", fix="1 or more"
        )
    return every_n_steps
