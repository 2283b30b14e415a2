"""What a Fabric saves and loads, and what of its own belongs into a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_lite import checkpoint, collectives, run_config
from fabric_lite import seed as random_seed
from fabric_lite.checkpoint import SaveHandle
from fabric_lite.checkpoint.plain import Place, stateful_objects
from fabric_lite.collectives import Collectives
from fabric_lite.identity import Identity
from fabric_lite.loggers.sending import Sender
from fabric_lite.loss_scaling import LossScaler
from fabric_lite.preemption import Preemption
from fabric_lite.steps import Steps

__all__ = ["Checkpointing"]


class Checkpointing(Identity):
    """The checkpoints of a Fabric, and when it is time for one."""

    _scaler: LossScaler | None
    _collectives: Collectives
    _steps: Steps
    _preemption: Preemption | None
    _callbacks: tuple[Any, ...]
    _sender: Sender

    @property
    def steps(self) -> int:
        """The completed steps of the first optimizer that was set up, over all parts of a run that was resumed."""
        return self._steps.total

    @property
    def should_stop(self) -> bool:
        """Whether this run was asked to leave and has made the last of its steps: save, then exit.

        SIGTERM or SIGUSR1 to any one rank asks for all. It becomes true on every rank after the same step, the one
        that the ranks were in or the next, at no cost to the steps; between two steps it does not change. The first
        look at it, after ``setup``, is what makes the signals mean this; a repeated signal ends the process. ::

            if fabric.should_stop:
                fabric.save(path, state)
                raise SystemExit(fabric_lite.EXIT_PREEMPTED)
        """
        self._launched()
        return self._preemption is not None and self._preemption.should_stop

    def save(
        self,
        path: str | Path,
        state: Mapping[str, Any],
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
        state_dict_type: str | None = None,
        async_: bool = False,
    ) -> SaveHandle | None:
        """Write ``state`` to one file or a folder, old or new and never in between; every rank calls.

        ``state_dict_type`` is "full" for a file that plain ``torch.load`` reads, "sharded" for a folder into which
        every rank writes its own part; None asks the strategy. With ``async_`` it returns as soon as the state was
        copied once in memory, and gives a handle: ``done()``, and ``result()``, which waits and raises. See
        :func:`fabric_lite.checkpoint.save`.
        """
        self._launched()
        self._collectives.enter("save")
        if self.is_global_zero:
            self._sender.save()  # what is logged until here belongs to the checkpoint, whatever happens next
        path = run_config.redirected(path)
        # Shards that inference mode makes views of cannot be detached.
        held = self.strategy.holding_state(_objects_of(state), changes=False)
        with torch.inference_mode(False), torch.no_grad(), held:
            return checkpoint.save(
                path,
                state,
                filter=filter,
                state_dict_type=self.strategy.state_dict_type if state_dict_type is None else state_dict_type,
                origin={"strategy": type(self.strategy).__name__, "precision": self.precision.name},
                async_=async_,
            )

    def load(
        self,
        path: str | Path,
        state: dict[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Restore the objects and values in ``state`` in place; returns what the checkpoint holds beside them.

        Every rank calls it. The checkpoint may be of any strategy and world size, a file or a folder, also one of
        ``torch.save``, ``torch.distributed.checkpoint``, safetensors or Lightning Fabric. Each rank reads what it
        keeps. See :func:`fabric_lite.checkpoint.load`.
        """
        self._launched()
        self._collectives.enter("load")
        path = run_config.redirected(path, to_read=True)
        with self.strategy.holding_state(_objects_of(state), changes=True):
            return checkpoint.load(path, state, strict=strict, weights_only=weights_only)

    def load_raw(self, path: str | Path, obj: nn.Module | Optimizer, strict: bool = True) -> None:
        """Load one bare state dict, from anything that :meth:`load` reads, into a module or optimizer.

        Every rank calls it.
        """
        self._launched()
        self._collectives.enter("load_raw")
        path = run_config.redirected(path, to_read=True)
        with self.strategy.holding_state([obj], changes=True):
            checkpoint.load_raw(path, obj, strict=strict)

    def state_dict(self) -> dict[str, Any]:
        """The steps, random states of all ranks, states of loss scaler, callbacks and loggers; every rank calls."""
        random = collectives.gather_objects(random_seed.random_state())
        state: dict[str, Any] = {"random": random, "steps": self.steps}
        if self._scaler is not None:
            state["loss_scaler"] = self._scaler.state_dict()
        for name, companion in self._companions().items():
            state.setdefault("companions", {})[name] = companion.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; random state only at the world size that it was saved at, and what is here."""
        if "steps" in state:
            self._steps.restore(int(state["steps"]))
        if len(state["random"]) == self.world_size:
            random_seed.set_random_state(state["random"][self.global_rank])
        if self._scaler is not None and "loss_scaler" in state:
            self._scaler.load_state_dict(state["loss_scaler"])
        saved = state.get("companions", {})
        for name, companion in self._companions().items():
            if name in saved:
                companion.load_state_dict(saved[name])

    def _companions(self) -> dict[str, Any]:
        """The callbacks and loggers that have a state, by class; from the second of a class on with a number."""
        found: dict[str, Any] = {}
        for companion in (*self._callbacks, *self._loggers):
            if callable(getattr(companion, "state_dict", None)) and callable(
                getattr(companion, "load_state_dict", None)
            ):
                name = type(companion).__name__
                same = sum(type(other).__name__ == name for other in found.values())
                found[f"{name} {same + 1}" if same else name] = companion
        return found


def _objects_of(state: Any) -> list[Any]:
    """The objects with a state of their own that are nested in ``state``, in order."""
    return [instance for _, instance in stateful_objects(state, Place())]
