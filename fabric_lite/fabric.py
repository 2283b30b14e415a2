"""``Fabric``: the one stateful object. Every method is a few lines that call down."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import gc
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_lite import checkpoint, collectives, process_end, run_config
from fabric_lite import seed as random_seed
from fabric_lite.agreement import check_agreement, compare_circumstances
from fabric_lite.checked_calls import compare_calls
from fabric_lite.checkpointing import Checkpointing
from fabric_lite.collectives import Collectives
from fabric_lite.communication import Communication
from fabric_lite.data import Window, check_loaders, extend_loader, move_to_device
from fabric_lite.device import Accelerator
from fabric_lite.errors import FabricValueError
from fabric_lite.hooks import as_callbacks, call_hook, made_by_name
from fabric_lite.init import tensors_on
from fabric_lite.loggers.sending import Sender
from fabric_lite.loss_scaling import LossScaler
from fabric_lite.mesh import build_mesh, data_share, join, leave
from fabric_lite.notices import rank_zero_info
from fabric_lite.optim import check_belongs
from fabric_lite.precision import Precision
from fabric_lite.preemption import Preemption
from fabric_lite.registry import Registry, release_from_others
from fabric_lite.reporting import Reporting
from fabric_lite.run import Arguments, resolve
from fabric_lite.setting_up import Setup
from fabric_lite.stepping import Stepping
from fabric_lite.steps import Steps
from fabric_lite.strategies import Placement, Strategy
from fabric_lite.watch import HangWatch, choose_hang_timeout, group_timeout_seconds

__all__ = ["Fabric", "call_with_fabric"]

Module = TypeVar("Module", bound=nn.Module)


class Fabric(Stepping, Communication, Checkpointing, Reporting):
    """Your loop on any hardware: devices, processes, precision, data and checkpoints behind a few calls.

    Args:
        accelerator: ``auto cpu cuda gpu mps tpu xpu``; auto takes the best one present.
        strategy: ``auto single_device ddp ...`` or a strategy object.
        devices: Per node: a count, a list of indices, ``"0,2"``, ``-1`` or ``"auto"``. On CPU a count of processes.
        num_nodes: Number of nodes; under a launcher it is the launcher's.
        precision: ``64-true 32-true 16-true bf16-true 16-mixed bf16-mixed``, by extras ``fp8-mixed nf4-weights
            int8-weights transformer-engine``, or a ``Precision``. None is 32-true.
        callbacks: Objects whose methods :meth:`call` calls by name.
        loggers: Those of :mod:`fabric_lite.loggers`, or objects with ``log_metrics(metrics, step)``.
        plugins: A ``Precision``, instead of ``precision``.
        check_collectives: Whether the ranks compare each collective before they enter it; slow, for finding bugs.
        hang_timeout: Of a job in which nothing has moved on any rank for so many seconds, it is said who did not
            arrive, and it is ended. 0: never; None: 600. Not where the process group was there already.

    Raises:
        FabricValueError: A value is not allowed.
        FabricTypeError: A value has the wrong type.
        LaunchError: The processes that are there are not those asked for, or cannot be connected.
    """

    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: int | str | Sequence[int] = "auto",
        num_nodes: int = 1,
        precision: str | int | Precision | None = None,
        callbacks: Any = None,
        loggers: Any = None,
        plugins: Any = None,
        check_collectives: bool = False,
        hang_timeout: float | None = None,
    ) -> None:
        arguments = Arguments(accelerator, strategy, devices, num_nodes, precision)
        self._arguments = {**vars(arguments), "callbacks": callbacks, "loggers": loggers, "plugins": plugins}
        self._started = datetime.datetime.now(datetime.timezone.utc)
        self._arguments |= {"check_collectives": check_collectives, "hang_timeout": hang_timeout}
        self._run = resolve(arguments, plugins, run_config.current(), os.environ)
        self._callbacks = as_callbacks(callbacks)
        config = self._run.config
        if config.callback is not None:
            self._callbacks += (made_by_name(config.callback, config.callback_options),)
        self._loggers = list(loggers) if isinstance(loggers, (list, tuple)) else [] if loggers is None else [loggers]
        self._sender, self._has_sent_record = Sender(self._loggers), False
        self._collectives = Collectives(self.device, check=check_collectives or self._run.config.check_collectives)
        self._hang_timeout = choose_hang_timeout(hang_timeout, self._run.config.hang_timeout)
        self._watch: HangWatch | None = None
        self._has_compared_circumstances = False
        self._scaler = LossScaler(self.device.type) if self.precision.loss_scale else None
        self._owns_group = False
        self._placement: Placement | None = None
        self._set_up = Registry(self, self.strategy, self._scaler)
        self._steps = Steps(self)
        self._window = Window()
        self._loaders_set_up = 0
        self._preemption: Preemption | None = None
        self._setup = Setup(self, self._run, self._scaler, self._callbacks, self._set_up, self._steps, self._window)
        self._is_closed = False
        # With the Fabric or, as most scripts end with it, with the process: a backend may hold back what it was sent.
        self._end_logging = weakref.finalize(self, _end_logging, self._sender)
        if self._run.needs_launch or not self.is_global_zero:
            self._end_logging.detach()
        if not self._run.needs_launch:
            self._connect()

    @property
    def device_mesh(self) -> Any:
        """The ``DeviceMesh`` of the strategy's axes (``"shard"``, ``"tensor_parallel"``, ...); None without axes."""
        return self._launched().mesh

    # --- launch -------------------------------------------------------------------------------------------------

    def launch(self, function: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Start the processes, where no launcher has; otherwise go on.

        Without a function, ``python script.py`` becomes the supervisor of ranks that run the script from its top. With
        one, ``function(fabric, *args, **kwargs)`` runs on every rank and rank 0's result is returned.

        Raises:
            FabricTypeError: ``function`` cannot be called with a fabric.
        """
        # Not needed where a launcher started the ranks, which is most runs.
        from fabric_lite.launch import in_script

        if function is not None:
            in_script.check_function(function)
        if self._run.needs_launch:
            if function is None:
                in_script.supervise_script(self._run.config)
            start_method = in_script.choose_start_method(getattr(self.strategy, "start_method", None))
            return in_script.run_function(
                call_with_fabric,
                (self._arguments, function, args),
                kwargs,
                ranks=self.world_size,
                start_method=start_method,
                config=self._run.config,
            )
        if function is None:
            return None
        return collectives.broadcast_object(function(self, *args, **kwargs))

    # --- setup --------------------------------------------------------------------------------------------------

    def setup(
        self,
        module: nn.Module,
        *optimizers: Optimizer,
        scheduler: Any = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> Any:
        """Lay out a model, and its optimizers, as the strategy says; returns the same objects, extended in place.

        Every rank calls, with the same model. Works before and after ``torch.compile`` and ``module.compile()``.

        Args:
            module: Any module; without trainable parameters it is only moved and cast.
            optimizers: Optimizers over its parameters, made before or after.
            scheduler: Given back as it is, last; stateful schedulers need nothing.
            move_to_device: Whether to move the module to this rank's device.

        Returns:
            ``module`` alone, or a tuple in the order given.

        Raises:
            FabricValueError: One of the objects is set up already.
            FabricTypeError: Not a module or optimizer, or a class that cannot be extended.
        """
        self._launched()
        self._set_up.check_new(optimizers, Optimizer)
        self._set_up.check_new([module], nn.Module)
        for optimizer in optimizers:
            check_belongs(optimizer, module)
        self.setup_module(module, move_to_device=move_to_device, _optimizers=optimizers)
        for optimizer in optimizers:
            self._setup.attach(optimizer)
        given = (module, *optimizers) if scheduler is None else (module, *optimizers, scheduler)
        return given if len(given) > 1 else module

    def setup_module(
        self, module: Module, move_to_device: bool = True, *, _optimizers: Sequence[Optimizer] = ()
    ) -> Module:
        """:meth:`setup` of a model alone."""
        placement = self._launched()
        self._set_up.check_new([module], nn.Module)
        self._check_agreement(module, _optimizers)
        self._setup.lay_out(module, _optimizers, placement, move_to_device)
        if self._collectives.check:
            group = getattr(self.strategy, "process_group", None)
            compare_calls(module, lambda call, site: self._collectives.enter(call, group, site))
        return module

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Set up optimizers alone; one comes back as it is, several as a tuple."""
        self._launched()
        if not optimizers:
            raise FabricValueError(
                "setup_optimizers() needs at least one optimizer.", fix="setup_optimizers(optimizer)"
            )
        self._set_up.check_new(optimizers, Optimizer)
        self._check_agreement(None, optimizers)
        for optimizer in optimizers:
            self._setup.attach(optimizer)
        return optimizers[0] if len(optimizers) == 1 else optimizers

    def setup_dataloaders(
        self,
        *dataloaders: Any,
        use_distributed_sampler: bool = True,
        move_to_device: bool = True,
        pad: bool | None = None,
        uneven: str | None = None,
    ) -> Any:
        """Let loaders give each rank its share, on its device; the same objects, extended in place.

        ``batch_size`` is per rank. Orders are those of torch's ``DistributedSampler``.

        Args:
            dataloaders: Any ``DataLoader`` or other iterable of batches.
            use_distributed_sampler: Whether to shard; else every rank sees all.
            move_to_device: Whether batches come on this rank's device.
            pad: False: every sample exactly once over all ranks and as many batches on each. None, True: samples are
                repeated so that the ranks' shares are of equal size, as ``DistributedSampler`` does.
            uneven: ``"stop"``: all ranks end when the first one does, for loaders of unknown length.

        Returns:
            The loader, or a list of several.
        """
        placement = self._launched()
        if not dataloaders:
            raise FabricValueError("setup_dataloaders() needs at least one loader.", fix="setup_dataloaders(loader)")
        check_loaders(
            dataloaders,
            world_size=placement.data_world_size,
            shard=use_distributed_sampler,
            pad=pad,
            uneven=uneven,
            owner=self,
        )
        release_from_others(dataloaders)
        for loader in dataloaders:
            call_hook(self._callbacks, "on_before_setup_dataloader", fabric=self, loader=loader)
        extended = [
            extend_loader(
                loader,
                rank=placement.data_rank,
                world_size=placement.data_world_size,
                device=self.device if move_to_device else None,
                shard=use_distributed_sampler,
                pad=pad,
                uneven=uneven,
                owner=self,
                window=self._window,
                number=self._loaders_set_up + position,
                collectives=self._collectives,
            )
            for position, loader in enumerate(dataloaders)
        ]
        self._loaders_set_up += len(dataloaders)
        for loader in extended:
            self._set_up.add(loader)
            call_hook(self._callbacks, "on_after_setup_dataloader", fabric=self, loader=loader)
        if placement.data_world_size > 1 and use_distributed_sampler:
            for loader in dataloaders:
                self._say_global_batch(getattr(loader, "batch_size", None), placement)
        return extended[0] if len(extended) == 1 else extended

    def has_set_up(self, target: Any) -> bool:
        """Whether this Fabric has set the object up and not released it; :func:`is_wrapped` asks whether any has."""
        return self._set_up.has(target)

    def release(self, *objects: Any) -> Any:
        """Give back plain objects: what ``setup`` added is taken off.

        Returns:
            The object, or a tuple of several.

        Raises:
            FabricValueError: One of them was not set up by this Fabric, or is given twice; then none is released.
        """
        plain_objects = self._set_up.release(objects)
        return plain_objects[0] if len(plain_objects) == 1 else plain_objects

    def close(self) -> None:
        """Release everything and leave the process group, if it was made here; the Fabric cannot be used any more.

        Waits for an asynchronous save; what went wrong there, and was not raised yet, is raised when all else is done.
        """
        save_error = checkpoint.finish()
        if self._preemption is not None:
            self._preemption.close()
        self._collectives.leave()
        if self._watch is not None:
            self._watch.close()
        self._set_up.release_all()
        if self.world_size > 1:
            # What DDP leaves in reference cycles holds the process group: alive at the interpreter's end, gloo aborts.
            gc.collect()
        self._placement, self._is_closed = None, True
        if self._owns_group:
            leave()
            self._owns_group = False
        self._finish_logging(process_end.status(is_at_exit=False))  # last, since a backend may have much to send
        if save_error is not None:
            raise save_error

    def _finish_logging(self, status: str) -> None:
        if self._end_logging.detach() is not None:  # not yet
            self._sender.finalize(status)

    # --- placement ----------------------------------------------------------------------------------------------

    def to_device(self, data: Any) -> Any:
        """Move a module in place, or return nested data with everything that has ``.to`` on this rank's device."""
        return data.to(self.device) if isinstance(data, nn.Module) else move_to_device(data, self.device)

    def init_tensor(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which new tensors are on this rank's device, floats in the dtype of parameters."""
        return tensors_on(self.device, self.precision.param_dtype)

    def init_module(self, empty_init: bool | None = None) -> contextlib.AbstractContextManager[Any]:
        """A context in which a module is made in place and dtype.

        Args:
            empty_init: True leaves parameters uninitialized, for a model whose weights are loaded next. Under a sharded
                strategy it makes them on the meta device instead: ``setup`` shards the model before any rank holds it
                whole, and fills in the values that the same construction has otherwise. Then every rank calls, and all
                take on rank 0's random state.
        """
        if not (empty_init and self.strategy.is_sharded):
            return tensors_on(self.device, self.precision.param_dtype, skip_initialization=bool(empty_init))
        if self._launched().world_size > 1:
            # The values are made from the random state at this point, and all ranks keep shards of the same ones.
            state = collectives.broadcast_object(random_seed.shared_random_state(self.device))
            random_seed.set_shared_random_state(state, self.device)
        return tensors_on(self.device, self.precision.param_dtype, deferred=True)

    # --- the rest -----------------------------------------------------------------------------------------------

    def call(self, hook_name: str, *args: Any, **kwargs: Any) -> None:
        """Call the method of that name on every callback that has it, with the arguments that it takes."""
        call_hook(self._callbacks, hook_name, *args, **kwargs)

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool = True, deterministic: bool | None = None) -> int:
        """Seed Python, numpy and torch; see :func:`fabric_lite.seed_everything`."""
        return random_seed.seed_everything(seed, workers, deterministic)

    # --- inside -------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Join the other ranks and take this rank's device; the first thing that communicates."""
        self.strategy.start()
        if self.device.index is not None:
            torch.accelerator.set_device_index(self.device.index)
        axes = self.strategy.mesh_axes(self.world_size, self._run.topology.local_world_size)
        if self.world_size > 1 or axes:
            self._owns_group = join(self._run.topology, self.device, group_timeout_seconds(self._hang_timeout))
        if self._owns_group:
            atexit.register(_close_at_exit, weakref.ref(self))
        mesh = build_mesh(self.device, axes)
        share = data_share(mesh, self.strategy.data_axes, (self.global_rank, self.world_size))
        self._placement = Placement(self.device, self.precision, self.world_size, mesh, *share)
        self._preemption = Preemption(self._steps, self.global_rank, self.world_size)
        # Its thread would keep it, and with it the meaning of the signals, for a Fabric that nobody has any more.
        weakref.finalize(self, self._preemption.let_go).atexit = False
        self._collectives.enter("Fabric()")
        if self._owns_group and self.world_size > 1 and self._hang_timeout:
            self._watch = HangWatch(self.global_rank, self.world_size, self._hang_timeout, self._set_up.movement)
        for notice in self._run.notices:
            rank_zero_info(notice)

    def _check_agreement(self, module: nn.Module | None, optimizers: Sequence[Optimizer]) -> None:
        """Raise on all ranks unless all set up the same; say at the first setup in what else they differ."""
        is_trained = module is None or any(parameter.requires_grad for parameter in module.parameters())
        if not (is_trained or optimizers or self.strategy.is_sharded):
            return  # it is moved and cast, on whichever ranks want it
        self._collectives.enter("setup")
        facts = {"strategy": type(self.strategy).__name__, "precision": str(self.precision.name)}
        group, follows = (
            getattr(self.strategy, "process_group", None),
            getattr(self.strategy, "broadcast_buffers", True),
        )
        check_agreement(module, optimizers, facts, group, follows_buffers=follows)
        if not self._has_compared_circumstances:
            self._has_compared_circumstances = True
            compare_circumstances()

    @staticmethod
    def _say_global_batch(batch_size: int | None, placement: Placement) -> None:
        if batch_size is not None:
            shares = placement.data_world_size
            who = "ranks" if shares == placement.world_size else "shares of the data"
            rank_zero_info(f"batch_size={batch_size} on each of {shares} {who}: {batch_size * shares} samples a step")


def _end_logging(sender: Sender) -> None:
    sender.finalize(process_end.status(is_at_exit=True))


def _close_at_exit(reference: weakref.ref[Fabric]) -> None:
    fabric = reference()
    if fabric is not None and not fabric._is_closed:
        checkpoint.finish_at_exit()
        fabric._finish_logging(process_end.status(is_at_exit=True))
        fabric.close()


def call_with_fabric(
    arguments: dict[str, Any], function: Callable[..., Any], args: Sequence[Any], **kwargs: Any
) -> Any:
    """In each started rank: make its Fabric and call the user's function."""
    fabric = Fabric(**arguments)
    try:
        return function(fabric, *args, **kwargs)
    finally:
        fabric._finish_logging(process_end.status(is_at_exit=False))  # a forked process ends without exit handlers
