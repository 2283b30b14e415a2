"""The data of a Trainer: dealt out to the ranks, as much of it as is wanted, behind a bar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fabric_lite import Fabric, FabricValueError

__all__ = ["Loaders"]


class Loaders:
    """What is done to every loader.

    Args:
        fabric: Sets them up.
        limits: By stage (``train``, ``validation``, ...) how many batches are wanted, or as a float which part of them.
        use_distributed_sampler: Whether to deal the data out to the ranks.
        has_bar: Whether to draw a bar.
    """

    def __init__(
        self, fabric: Fabric, limits: Mapping[str, float], use_distributed_sampler: bool, has_bar: bool
    ) -> None:
        self._fabric, self._limits, self._shards, self._has_bar = fabric, limits, use_distributed_sampler, has_bar

    def takes_all(self, stage: str) -> bool:
        """Whether no batch of the stage's loaders is left out."""
        return isinstance(self._limits[stage], float) and self._limits[stage] == 1.0

    def set_up(
        self, model: Any, loaders: Any, method: str, *, pad: bool | None = False, is_needed: bool = True
    ) -> list[Any]:
        """Loaders that are set up: those given, or those that the model makes; every rank calls.

        Args:
            model: The ``LightningModule``.
            loaders: One, several (in a dict too, by its order), or None.
            method: The model's, which makes them where none are given.
            pad: False: to evaluate on, with each sample once, where that can be had. None: as Fabric does.
            is_needed: Whether there has to be one.

        Raises:
            FabricValueError: There is none.
        """
        make = getattr(model, method, None)
        loaders = make() if loaders is None and callable(make) else loaders
        if loaders is None and is_needed:
            raise FabricValueError("There is no data.", given="no loader", fix=f"a loader, or {method}() of the model")
        loaders = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
        loaders = [] if loaders is None else loaders if isinstance(loaders, (list, tuple)) else [loaders]
        return [one if self._fabric.has_set_up(one) else self._set_up(one, pad) for one in loaders]

    def _set_up(self, loader: Any, pad: bool | None) -> Any:
        try:
            return self._fabric.setup_dataloaders(loader, use_distributed_sampler=self._shards, pad=pad)
        except FabricValueError as error:
            if pad is None:
                raise
            self._fabric.print(f"evaluation repeats samples, or leaves it to the data: {str(error).splitlines()[0]}")
            return self._fabric.setup_dataloaders(loader, use_distributed_sampler=self._shards)

    def count(self, loader: Any, stage: str) -> int | None:
        """How many of its batches are wanted; None: all, and how many these are is not known.

        Raises:
            FabricValueError: A part is wanted that can't be counted, or is less than a batch.
        """
        limit = self._limits[stage]
        try:
            length = len(loader)
        except TypeError:
            if isinstance(limit, int) or limit == 0.0:
                return int(limit)
            if limit == 1.0:
                return None
            raise FabricValueError(
                "There is no part of a loader whose length is not known.",
                given=f"{limit} of the {stage} loader",
                fix="a whole number of batches",
            ) from None
        count = min(limit, length) if isinstance(limit, int) else int(length * limit)
        if count == 0 < min(limit, length):
            raise FabricValueError(
                "This part of a loader is less than a batch.",
                given=f"{limit} of the {length} batches of the {stage} loader",
                fix=f"1, or at least {1 / length:.3g}",
            )
        return int(count)

    def bar(self, loader: Any, total: int | None, done: int, title: str) -> Any:
        """The loader behind a bar, up to batch ``total`` of its epoch, of which ``done`` are taken already."""
        limit = None if total is None else max(0, total - done)
        return self._fabric.progress(loader, title, limit=limit, is_shown=self._has_bar)
