"""Data parallelism: every rank holds the whole model and gradients are averaged (``DistributedDataParallel``)."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fabric_lite.errors import FabricTypeError, FabricValueError, StrategyError
from fabric_lite.strategies.base import Engine, Placement, Strategy

__all__ = ["COMMUNICATION_HOOKS", "DDPStrategy"]


@dataclasses.dataclass(frozen=True)
class DDPStrategy(Strategy):
    """``DistributedDataParallel`` with its own options.

    Buffers are broadcast from rank 0 after each training forward that synchronizes, so that a model evaluates alike
    on all ranks (torch does it before the next forward).

    Args:
        find_unused_parameters: Needed when a step does not use every trainable parameter.
        static_graph: Every step uses the same parameters in the same order.
        gradient_as_bucket_view: Gradients are views of the communication buckets: less memory.
        bucket_cap_mb: Size of a bucket in MiB; None is torch's default (25).
        broadcast_buffers: Whether buffers (BatchNorm's statistics) follow rank 0's.
        communication_hook: How gradients travel: ``"bf16"``, ``"fp16"``, ``"powersgd"``, or a function
            ``hook(state, bucket) -> Future[Tensor]`` as for ``register_comm_hook``. None: in their own dtype.
        communication_hook_state: The hook's state: for ``"powersgd"`` a ``PowerSGDState`` (None: rank 1 after 2 steps).
        process_group: The ranks that average; None is all.
        start_method: How ``launch(function)`` starts processes: ``"spawn"``, ``"fork"``; None chooses.
        ddp_options: Any further argument of ``DistributedDataParallel``.
    """

    find_unused_parameters: bool = False
    static_graph: bool = False
    gradient_as_bucket_view: bool = False
    bucket_cap_mb: float | None = None
    broadcast_buffers: bool = True
    communication_hook: str | Callable[..., Any] | None = None
    communication_hook_state: Any = None
    process_group: Any = None
    start_method: str | None = None
    ddp_options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        hook = self.communication_hook
        if isinstance(hook, str) and hook not in COMMUNICATION_HOOKS:
            raise FabricValueError(
                "This communication hook does not exist.",
                given=f"communication_hook={hook!r}",
                fix=f"one of {', '.join(COMMUNICATION_HOOKS)}, or a function hook(state, bucket)",
            )
        if hook is not None and not isinstance(hook, str) and not callable(hook):
            raise FabricTypeError(
                "communication_hook must be a name or a function.",
                given=f"communication_hook={hook!r}",
                fix=f"one of {', '.join(COMMUNICATION_HOOKS)}, or a function hook(state, bucket)",
            )
        unknown = set(self.ddp_options) - _DDP_OPTIONS
        if unknown:
            raise FabricValueError(
                "DistributedDataParallel has no such option, or Fabric sets it.",
                given=f"ddp_options with {', '.join(sorted(unknown))}",
                fix=f"any of {', '.join(sorted(_DDP_OPTIONS))}",
            )
        if self.start_method not in (None, "spawn", "fork"):
            raise FabricValueError(
                "This start method does not exist.",
                given=f"start_method={self.start_method!r}",
                fix="'spawn', 'fork' or None",
            )

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], run: Callable[..., Any], placement: Placement
    ) -> Engine:
        # Alone there is nobody to average with; a frozen teacher has nothing to average, and DDP refuses it.
        if placement.world_size == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
            return Engine()
        engine = _BufferSynchronizingDDP(
            _Inner(module, run),
            device_ids=None if placement.device.index is None else [placement.device.index],
            process_group=self.process_group,
            find_unused_parameters=self.find_unused_parameters,
            static_graph=self.static_graph,
            gradient_as_bucket_view=self.gradient_as_bucket_view,
            bucket_cap_mb=self.bucket_cap_mb,
            **({} if self.broadcast_buffers else _NO_BUFFER_BROADCAST),
            **self.ddp_options,
        )
        engine.follow_buffers = self.broadcast_buffers
        if self.communication_hook is not None:
            engine.register_comm_hook(*self._hook())
        return Engine(module=engine)

    def no_sync(self, module: nn.Module, engine: nn.Module | None) -> contextlib.AbstractContextManager[Any]:
        return engine.no_sync() if isinstance(engine, DistributedDataParallel) else contextlib.nullcontext()

    def _hook(self) -> tuple[Any, Callable[..., Any]]:
        hook, state = self.communication_hook, self.communication_hook_state
        if hook == "powersgd":
            from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd

            return state or powersgd.PowerSGDState(self.process_group, 1, 2), powersgd.powerSGD_hook
        if isinstance(hook, str):
            return self.process_group, _COMPRESSING_HOOKS[hook]
        assert hook is not None
        return state, hook


class _Inner(nn.Module):
    """What DDP wraps: it shows DDP the user's parameters and calls back into the route.

    The user's module is no child of it, since tools that follow the nesting of calls (``CommDebugMode``) would see the
    module both above and below its engine.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["_users"] = module
        self._run = run
        ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", None)
        if ignored is not None:
            self._ddp_params_and_buffers_to_ignore = ignored

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        return self.__dict__["_users"].named_modules(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.__dict__["_users"].named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return self.__dict__["_users"].named_buffers(*args, **kwargs)


class _BufferSynchronizingDDP(DistributedDataParallel):
    """DDP that broadcasts buffers after a forward instead of before the next one; not if ``follow_buffers`` is False.

    By torch's own rule the last forward before an evaluation is never followed by a broadcast, and BatchNorm then
    evaluates differently on rank 1. Within ``no_sync`` nothing is sent, so a window costs one broadcast, as in torch.
    """

    follow_buffers = True

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        try:
            return super().forward(*inputs, **kwargs)
        except RuntimeError as error:
            if "Expected to have finished reduction" not in str(error):
                raise
            raise StrategyError(
                "Some trainable parameters got no gradient in the last step, and DDP waits for all of them.",
                given="a loss that does not depend on the whole model",
                fix="strategy='ddp_find_unused_parameters_true', or freeze what is not used before setup",
            ) from error

    def _run_ddp_forward(self, *inputs: Any, **kwargs: Any) -> Any:
        # Not self.module(...): its hooks, and those that tools set on every module, are for the user's module alone.
        with self._inside_ddp_forward():
            return self.module.forward(*inputs, **kwargs)

    def _check_sync_bufs_pre_fwd(self) -> bool:
        return False

    def _check_sync_bufs_post_fwd(self) -> bool:
        wanted = self.follow_buffers and self.require_backward_grad_sync and torch.is_grad_enabled()
        return bool(wanted and self.modules_buffers)


_SET_BY_FABRIC = {"module", "device_ids", "output_device", "process_group", "broadcast_buffers", "forward_sync_buffers"}
_DDP_OPTIONS = {*inspect.signature(DistributedDataParallel).parameters} - _SET_BY_FABRIC

# torch 2.13 deprecates the older name; earlier versions know only that one.
_NO_BUFFER_BROADCAST: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)


def _compress_to(dtype: torch.dtype) -> Callable[..., Any]:
    # torch's own bf16 hook refuses gloo; this one does the same arithmetic on any backend. DDP looks the second
    # parameter up by its name, bucket, and refuses annotations that are strings.
    def hook(group, bucket):  # type: ignore[no-untyped-def]
        gradients = bucket.buffer()
        compressed = gradients.to(dtype).div_(dist.get_world_size(group))
        future = dist.all_reduce(compressed, group=group, async_op=True).get_future()
        return future.then(lambda done: gradients.copy_(done.value()[0]))

    return hook


_COMPRESSING_HOOKS = {"bf16": _compress_to(torch.bfloat16), "fp16": _compress_to(torch.float16)}
COMMUNICATION_HOOKS = (*_COMPRESSING_HOOKS, "powersgd")
