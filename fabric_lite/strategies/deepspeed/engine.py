"""DeepSpeed's engine, told by the caller what it would read from environment variables; imports DeepSpeed."""

from __future__ import annotations

import contextlib
import os
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload
from deepspeed.utils import groups
from deepspeed.utils.debug import debug_clear_module_and_param_names
from torch import nn
from torch.optim import Optimizer

from fabric_lite.errors import StrategyError
from fabric_lite.strategies.base import Placement
from fabric_lite.strategies.deepspeed.config import is_offloaded
from fabric_lite.strategies.deepspeed.handle import Handle
from fabric_lite.strategies.deepspeed.ops import build_ops
from fabric_lite.strategies.deepspeed.optimizers import inner_optimizer, trained_of
from fabric_lite.strategies.deepspeed.partitions import partitions_of
from fabric_lite.strategies.deepspeed.state import keep_values
from fabric_lite.trees import map_leaves

__all__ = ["make_handle"]


def make_handle(
    module: nn.Module, optimizer: Optimizer, run: Callable[..., Any], config: dict[str, Any], placement: Placement
) -> Handle:
    """Lay ``module`` out over the ranks; every rank calls.

    Args:
        module: On its device, equal on all ranks.
        optimizer: Over its parameters; state that it has is taken over.
        run: What stands for a forward of the module.
        config: DeepSpeed's.
        placement: Device and mesh.

    Raises:
        StrategyError: DeepSpeed takes another kind of device for the machine's, or its operators cannot be built.
    """
    _check_device(placement.device)
    stage, offload = config["zero_optimization"]["stage"], is_offloaded(config, "offload_optimizer")
    build_ops(offload, placement.device)
    _use_current_group()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = [parameter for parameter in trained if parameter.requires_grad]
    shell = Shell(module, run)
    inner = inner_optimizer(optimizer, offload)
    # A cast to bfloat16 would lose what they are in float32, which the step begins with.
    with keep_values(trained if "bf16" in config else ()) as values:
        index = placement.device.index or 0
        with _told_by_local_rank(index):
            engine = ZeroEngine(
                args=types.SimpleNamespace(local_rank=index, device_rank=index),
                model=shell,
                optimizer=inner,
                dist_init_required=False,
                config=config,
                config_class=DeepSpeedConfig(config),
            )
        engine.partitions = partitions_of(engine.optimizer, stage)
        parameters = list(module.parameters()) if stage == 3 else trained
        handle = Handle(
            engine,
            shell,
            engine.partitions,
            weakref.ref(module),
            weakref.ref(optimizer),
            engine.optimizer.optimizer,
            trained_of(optimizer),
            placement.mesh,
            parameters,
        )
        engine.handle = shell.__dict__["handle"] = handle
        values.give_to(handle)
    return handle


@contextlib.contextmanager
def _told_by_local_rank(index: int) -> Iterator[None]:
    """Let LOCAL_RANK be the number of the device, for which stage 3 takes it.

    Neither Slurm nor mpirun sets it, and of ``--devices 2,3`` it would name others.
    """
    before = os.environ.get("LOCAL_RANK")
    if before == str(index):
        yield
        return
    os.environ["LOCAL_RANK"] = str(index)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


class ZeroEngine(DeepSpeedEngine):
    """An engine whose windows end with a step, and whose gradients can be seen between backward and step.

    DeepSpeed has a mode in which the caller owns the windows (``managed_gradient_accumulation``); there a step first
    makes gradients final, which is :meth:`settle` here.
    """

    handle: Handle
    partitions: Any
    _task = -1

    def _do_args_sanity_check(self, args: Any) -> None:
        """Nothing: DeepSpeed insists on the variable LOCAL_RANK, which no launcher but torchrun sets."""

    def _configure_with_arguments(self, args: Any, mpu: Any) -> None:
        self.local_rank = args.local_rank

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's own; stage 3 compares the order of the layers of all ranks in its first ones."""
        with _told_by_local_rank(self.local_rank):
            return super().forward(*args, **kwargs)

    def settle(self) -> None:
        """Make the gradients of all backwards since the last step final; every rank calls."""
        self._running_engine_step = True
        try:
            if self.zero_optimization_partition_gradients():
                self.optimizer.finalize_gradient_accumulation_boundary()
            else:
                self.allreduce_gradients()
        finally:
            self._running_engine_step = False

    def allreduce_gradients(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's own, but for a backward in which no parameter got a gradient: it would find no buffers."""
        if self._running_engine_step or getattr(self.optimizer, "ready_for_gradients", True):
            super().allreduce_gradients(*args, **kwargs)

    def take_step(self) -> bool:
        """Step on settled gradients; returns False if DeepSpeed skipped it over a norm that is not finite."""
        self._running_engine_step = True
        try:
            self._take_model_step(None)
        finally:
            self._running_engine_step = False
        self.micro_steps += 1
        return bool(self.was_step_applied())

    def before_backward(self) -> None:
        """Called by each output of a forward in each backward through it; acts once in each backward."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        self._task = task
        self.handle.before_backward()
        zero = self.optimizer
        while zero._backward_active_depth:  # of a backward that an exception has ended
            zero.exit_backward()
        # DeepSpeed counts backwards by forwards, so that the second of two over two forwards made before them would
        # overwrite the first one's gradients in stage 3.
        zero.clear_backward_seen_flag()
        super()._backward_prologue()

    def _backward_prologue(self) -> None:
        self.before_backward()

    def recover(self) -> None:
        """Put right what a forward that raised has left."""
        shell: Any = self.module
        if shell.is_running:
            shell.is_running = False
            self._forward_epilogue()
            self.partitions.recover()

    def let_go(self) -> None:
        """Take hooks off where this leaves the model usable, and forget it."""
        if not self.zero_optimization_partition_weights():
            self.destroy()
        debug_clear_module_and_param_names()  # by which DeepSpeed would keep every model for ever
        stack = parameter_offload.FWD_MODULE_STACK
        stack[:] = [module for module in stack if module is not self.module]


class Shell(nn.Module):
    """What DeepSpeed takes for the user's module: its submodules and tensors, under their names, and no other hooks.

    It is the engine of a set-up module as well: ``forward`` from outside goes to DeepSpeed's engine, which calls this
    module, and then it runs what the user's module runs.
    """

    handle: Handle

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["_users"] = module
        self._run = run
        self.is_running = self._is_called = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_called:
            return self._run(*args, **kwargs)
        self.is_running = self._is_called = True
        try:
            output = self.__dict__["handle"].engine(*args, **kwargs)
        finally:
            self._is_called = False
        self.is_running = False
        return map_leaves(self._watched, output) if torch.is_grad_enabled() else output

    def _watched(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            engine = self.__dict__["handle"].engine
            leaf.register_hook(lambda _: engine.before_backward())
        return leaf

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Iterator[Any]:
        for name, module in self.__dict__["_users"].named_modules(memo, prefix, remove_duplicate):
            yield name, self if module is self.__dict__["_users"] else module

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        return self.__dict__["_users"].named_children()

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.__dict__["_users"].named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return self.__dict__["_users"].named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_users"].state_dict(*args, **kwargs)

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        self.__dict__["_users"]._apply(function, recurse)
        return self


def _check_device(device: torch.device) -> None:
    found = get_accelerator().device_name()
    if found != device.type:
        raise StrategyError(
            "DeepSpeed takes another kind of device for this machine's than the run has.",
            given=f"{found} found by DeepSpeed {deepspeed.__version__}, the run is on {device.type}",
            fix=f"DS_ACCELERATOR={device.type} in the environment of the job",
        )


def _use_current_group() -> None:
    """Let DeepSpeed work over the process group that is there now; it keeps the first one that it sees."""
    module: Any = comm.comm
    seen = getattr(module.cdb, "_fabric_lite_group", None)
    if module.cdb is not None and (seen is None or seen() is not dist.group.WORLD):
        module.cdb = None
        groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        groups._ALL_TO_ALL_GROUP.clear()
    if module.cdb is None:
        comm.init_distributed(get_accelerator().communication_backend_name(), dist_init_required=False, verbose=False)
        backend: Any = module.cdb
        backend._fabric_lite_group = weakref.ref(dist.group.WORLD)
