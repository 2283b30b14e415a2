"""What ranks say to each other through a Fabric."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from fabric_lite.collectives import Collectives
from fabric_lite.identity import Identity

__all__ = ["Communication"]


class Communication(Identity):
    """The collectives of a Fabric; every rank calls each, in the same order."""

    _collectives: Collectives

    def barrier(self, name: str | None = None) -> None:
        """Wait until every rank is here; ``name`` is for the reader."""
        del name
        self._launched()
        self._collectives.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return rank ``src``'s object, of any kind, on every rank; tensors keep their dtype."""
        self._launched()
        return self._collectives.broadcast(obj, src)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Return each leaf ``(*shape)`` of all ranks as ``(world_size, *shape)``; a process alone: no extra dim."""
        self._launched()
        return self._collectives.all_gather(data, group, sync_grads=sync_grads)

    def all_reduce(self, data: Any, group: Any = None, reduce_op: str = "mean") -> Any:
        """Return each leaf reduced over the ranks: ``mean avg sum min max product``. The input is not changed."""
        self._launched()
        return self._collectives.all_reduce(data, group, reduce_op)

    def gather(self, data: Any) -> Any:
        """Return each leaf ``(n, *shape)`` as the rows of all ranks, ``(sum of n, *shape)``; n may differ by rank."""
        self._launched()
        return self._collectives.gather_uneven(data)

    @contextlib.contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """Run the block on rank 0 (of each node, if ``local``) first, then on the others.

        Raises:
            CollectiveError: On the others, at once, when it raised on the first.
        """
        self._launched()
        with self._collectives.rank_zero_first((self.local_rank if local else self.global_rank) == 0):
            yield
