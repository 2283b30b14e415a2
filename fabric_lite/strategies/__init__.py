"""Strategies by name, and the classes behind them."""

from __future__ import annotations

from collections.abc import Callable

from fabric_lite.errors import FabricTypeError, FabricValueError
from fabric_lite.strategies.base import Engine, Placement, Strategy
from fabric_lite.strategies.ddp import DDPStrategy
from fabric_lite.strategies.deepspeed import DeepSpeedStrategy
from fabric_lite.strategies.fsdp import FSDPStrategy
from fabric_lite.strategies.model_parallel import ModelParallelStrategy
from fabric_lite.strategies.single import SingleDeviceStrategy
from fabric_lite.strategies.xla import XLAStrategy

__all__ = [
    "STRATEGY_REGISTRY",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "Engine",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "Placement",
    "SingleDeviceStrategy",
    "Strategy",
    "XLAStrategy",
    "parse_strategy",
]

STRATEGY_REGISTRY: dict[str, Callable[[], Strategy]] = {
    "single_device": SingleDeviceStrategy,
    "ddp": DDPStrategy,
    "ddp_find_unused_parameters_true": lambda: DDPStrategy(find_unused_parameters=True),
    "ddp_spawn": lambda: DDPStrategy(start_method="spawn"),
    "ddp_fork": lambda: DDPStrategy(start_method="fork"),
    "ddp_notebook": lambda: DDPStrategy(start_method="fork"),
    "fsdp": FSDPStrategy,
    "fsdp_cpu_offload": lambda: FSDPStrategy(cpu_offload=True),
    "hsdp": lambda: FSDPStrategy(replicas="auto"),
    "deepspeed": DeepSpeedStrategy,
    "deepspeed_stage_1": lambda: DeepSpeedStrategy(stage=1),
    "deepspeed_stage_1_offload": lambda: DeepSpeedStrategy(stage=1, offload_optimizer=True),
    "deepspeed_stage_2": lambda: DeepSpeedStrategy(stage=2),
    "deepspeed_stage_2_offload": lambda: DeepSpeedStrategy(stage=2, offload_optimizer=True),
    "deepspeed_stage_3": lambda: DeepSpeedStrategy(stage=3),
    "deepspeed_stage_3_offload": lambda: DeepSpeedStrategy(stage=3, offload_optimizer=True, offload_parameters=True),
    "xla": XLAStrategy,
    "xla_spmd": lambda: XLAStrategy(spmd=True),
}
"""What each name of a strategy makes; add a name to have an own strategy known by it."""


def parse_strategy(strategy: str | Strategy, world_size: int) -> Strategy:
    """Return the strategy that a name means; ``"auto"`` is ``ddp`` for several ranks, else ``single_device``.

    Raises:
        FabricTypeError: Neither a name nor a :class:`Strategy`.
        FabricValueError: An unknown name, or ``single_device`` for several ranks.
    """
    if isinstance(strategy, str):
        name = strategy.lower()
        if name == "auto":
            name = "ddp" if world_size > 1 else "single_device"
        if name == "dp":
            raise FabricValueError(
                "Strategy 'dp' is gone: one process for several devices is slow.", fix="strategy='ddp'"
            )
        if name not in STRATEGY_REGISTRY:
            raise FabricValueError(
                "This strategy does not exist.",
                given=f"strategy={strategy!r}",
                fix=f"one of auto, {', '.join(STRATEGY_REGISTRY)}, or a Strategy object",
            )
        strategy = STRATEGY_REGISTRY[name]()
    if not isinstance(strategy, Strategy):
        raise FabricTypeError(
            "strategy must be a name or a Strategy object.",
            given=f"strategy={strategy!r}",
            fix=f"one of auto, {', '.join(STRATEGY_REGISTRY)}, or DDPStrategy(...)",
        )
    if world_size > 1 and not strategy.uses_several_processes:
        raise FabricValueError(
            "A strategy for one process cannot use several.",
            given=f"strategy={type(strategy).__name__} with {world_size} processes",
            fix="strategy='ddp', or devices=1",
        )
    return strategy
