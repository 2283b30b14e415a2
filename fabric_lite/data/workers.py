"""Seeds of the worker processes: different per worker and rank, the same at every rerun."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

__all__ = ["WorkerSeed"]


@dataclasses.dataclass(frozen=True)
class WorkerSeed:
    """A ``worker_init_fn`` that seeds torch, numpy and random, then calls the user's own.

    Args:
        entropy: The numbers that tell one iterator on one rank from another; the worker's number is added. None
            keeps torch's own seed of the worker and adds ``rank`` to it.
        rank: The rank of the process that owns the worker.
        user_function: The user's ``worker_init_fn``.
    """

    entropy: tuple[int, ...] | None
    rank: int
    user_function: Callable[[int], Any] | None = None

    def __call__(self, worker_id: int) -> None:
        entropy = (*self.entropy, worker_id) if self.entropy is not None else (torch.initial_seed(), self.rank)
        if self.entropy is not None or self.rank > 0:
            seed = int(np.random.SeedSequence([part % 2**64 for part in entropy]).generate_state(1, np.uint64)[0]) >> 1
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            # Frozen for users, who read it to seed libraries of their own: it must differ over ranks too.
            object.__setattr__(get_worker_info(), "seed", seed)
        if self.user_function is not None:
            self.user_function(worker_id)
