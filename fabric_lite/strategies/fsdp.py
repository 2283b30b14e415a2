"""Sharded data parallelism: every rank holds a part of each parameter (``fully_shard``, FSDP2)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_lite.activation_checkpointing import checkpoint_activations, release_activations
from fabric_lite.errors import FabricTypeError, FabricValueError
from fabric_lite.notices import rank_zero_info
from fabric_lite.policy import Policy, check_policy
from fabric_lite.strategies import sharding
from fabric_lite.strategies.base import Engine, Placement, Strategy
from fabric_lite.strategies.blocks import choose_blocks

__all__ = ["FSDPStrategy"]

_SHARDING_STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")


@dataclasses.dataclass(frozen=True)
class FSDPStrategy(Strategy):
    """``fully_shard`` of the model and of its blocks: parameters, gradients and optimizer state are in shards.

    A block's parameters are gathered just before it runs and freed after. Under a mixed precision they are gathered in
    its compute dtype. Runs on CPU too.

    Args:
        auto_wrap_policy: What is a block: classes of modules, a function ``f(module) -> bool``, or one of torch's wrap
            policies. None: the repeated layers of the model that have modules in them. Modules whose weights are tied
            to others are in no block.
        reshard_after_forward: Whether parameters are freed after forward and gathered again for backward; a number:
            they stay in shards over that many ranks. None: yes, except those that are in no block.
        replicas: Into how many groups the ranks are divided, each of which holds the whole model in its shards (HSDP:
            gathering stays within a group). ``"auto"``: one per node; on one node two, if at least 4 ranks are even.
        cpu_offload: Whether shards, gradients and optimizer state stay in the host's memory; also torch's
            ``CPUOffload`` or ``OffloadPolicy``, which say it.
        activation_checkpointing_policy: Which modules do not keep their activations but run forward again in backward:
            classes or a function, as above. None: none.
        state_dict_type: ``"sharded"``: checkpoints are folders to which every rank writes its own shards; ``"full"``:
            one file.
        sharding_strategy: FSDP1's word for the layout: ``FULL_SHARD``, ``SHARD_GRAD_OP``
            (``reshard_after_forward=False``), ``HYBRID_SHARD`` (``replicas="auto"``).
        limit_all_gathers: FSDP1's; FSDP2 always does. Accepted and of no effect.
    """

    auto_wrap_policy: Policy | None = dataclasses.field(default=None, hash=False)
    reshard_after_forward: bool | int | None = None
    replicas: int | str = 1
    cpu_offload: Any = False
    activation_checkpointing_policy: Policy | None = dataclasses.field(default=None, hash=False)
    state_dict_type: str = "sharded"
    sharding_strategy: Any = None
    limit_all_gathers: bool | None = None

    def __post_init__(self) -> None:
        check_policy(self.auto_wrap_policy, "auto_wrap_policy")
        check_policy(self.activation_checkpointing_policy, "activation_checkpointing_policy")
        replicas, reshards = self.replicas, self.reshard_after_forward
        if replicas != "auto" and (isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 1):
            raise FabricValueError(
                "replicas is the number of groups that hold the whole model.",
                given=f"replicas={replicas!r}",
                fix="1, a divisor of the number of ranks, or 'auto'",
            )
        if reshards is not None and (not isinstance(reshards, int) or reshards < 0):
            raise FabricValueError(
                "reshard_after_forward says whether parameters are freed after forward, or over how many ranks.",
                given=f"reshard_after_forward={reshards!r}",
                fix="True, False, a divisor of the number of ranks, or leave it out",
            )
        if self.state_dict_type not in ("sharded", "full"):
            raise FabricValueError(
                "This kind of checkpoint does not exist.",
                given=f"state_dict_type={self.state_dict_type!r}",
                fix="'sharded' for a folder, 'full' for one file",
            )
        object.__setattr__(self, "cpu_offload", _offloads(self.cpu_offload))
        self._take_over(getattr(self.sharding_strategy, "name", self.sharding_strategy))

    def _take_over(self, sharding_strategy: Any) -> None:
        """Translate FSDP1's word into the two options that it means."""
        if sharding_strategy is None:
            return
        sharding_strategy = str(sharding_strategy).upper()
        if sharding_strategy not in _SHARDING_STRATEGIES:
            raise FabricValueError(
                "This sharding strategy does not exist under FSDP2.",
                given=f"sharding_strategy={self.sharding_strategy!r}",
                fix=f"one of {', '.join(_SHARDING_STRATEGIES[:3])}; strategy='ddp' for NO_SHARD",
            )
        if "HYBRID" in sharding_strategy:
            object.__setattr__(self, "replicas", "auto" if self.replicas == 1 else self.replicas)
        if sharding_strategy in ("SHARD_GRAD_OP", "_HYBRID_SHARD_ZERO2"):
            object.__setattr__(self, "reshard_after_forward", False)

    @property
    def is_sharded(self) -> bool:
        return True

    def mesh_axes(self, world_size: int, local_world_size: int) -> Mapping[str, int]:
        replicas = self.replicas
        if isinstance(replicas, str):
            replicas = world_size // local_world_size
            if replicas == 1 and world_size >= 4 and world_size % 2 == 0:
                replicas = 2
        if world_size % replicas:
            raise FabricValueError(
                "The ranks cannot be divided into groups of equal size.",
                given=f"{world_size} ranks, replicas={replicas}",
                fix=f"replicas= a divisor of {world_size}",
            )
        return {"replicate": replicas, "shard": world_size // replicas} if replicas > 1 else {"shard": world_size}

    def materialize(self, module: nn.Module, placement: Placement, fill: Callable[[torch.device], None] | None) -> None:
        home = dataclasses.replace(placement, device=torch.device("cpu")) if self.cpu_offload else placement
        super().materialize(module, home, fill)
        if self.cpu_offload:  # parameters alone: what is computed with them is on the device
            for child in module.modules():
                for name, buffer in child.named_buffers(recurse=False, remove_duplicate=False):
                    child._buffers[name] = buffer.to(placement.device)

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], run: Callable[..., Any], placement: Placement
    ) -> Engine:
        if self.limit_all_gathers is not None:
            rank_zero_info("limit_all_gathers has no effect: FSDP2 always limits them")
        blocks = choose_blocks(module, self.auto_wrap_policy)
        sharding.check_shardable(module, blocks)
        sharding.follow_rank_zero(module, placement.device)
        if self.activation_checkpointing_policy is not None:
            checkpoint_activations(module, self.activation_checkpointing_policy)
        return sharding.shard_module(
            module,
            blocks,
            placement.mesh,
            placement,
            reshard_after_forward=self.reshard_after_forward,
            cpu_offload=self.cpu_offload,
        )

    def unwrap(self, module: nn.Module) -> None:
        release_activations(module)

    def no_sync(self, module: nn.Module, engine: nn.Module | None) -> contextlib.AbstractContextManager[Any]:
        return sharding.no_sync(module)

    def forget_unsynchronized(self, module: nn.Module, parameters: Container[int] | None = None) -> None:
        sharding.forget_unsynchronized(module, parameters)


def _offloads(cpu_offload: Any) -> bool:
    """What a bool, FSDP1's ``CPUOffload`` or FSDP2's ``OffloadPolicy`` says; the last two are true as objects."""
    if isinstance(cpu_offload, bool):
        return cpu_offload
    if hasattr(cpu_offload, "offload_params"):
        return bool(cpu_offload.offload_params)
    if type(cpu_offload).__name__ in ("OffloadPolicy", "CPUOffloadPolicy"):
        return type(cpu_offload).__name__ == "CPUOffloadPolicy"
    raise FabricTypeError(
        "cpu_offload says whether shards stay in the host's memory.",
        given=f"cpu_offload={cpu_offload!r:.80}",
        fix="True or False",
    )
