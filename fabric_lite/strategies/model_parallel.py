"""Tensor parallelism by the user's plan, with sharded data parallelism around it: a mesh of two axes."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fabric_lite.activation_checkpointing import checkpoint_activations, release_activations
from fabric_lite.collectives import gather_objects
from fabric_lite.errors import FabricTypeError, FabricValueError, StrategyError
from fabric_lite.parameters import local_part, mesh_of, settle_gradient
from fabric_lite.policy import Policy, check_policy
from fabric_lite.seed import set_shared_random_state, shared_random_state
from fabric_lite.strategies import sharding
from fabric_lite.strategies.base import Engine, Placement, Strategy
from fabric_lite.strategies.blocks import choose_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ModelParallelStrategy"]

DATA_AXIS, TENSOR_AXIS = "data_parallel", "tensor_parallel"

Plan: TypeAlias = Callable[[Any, "DeviceMesh"], Any] | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelParallelStrategy(Strategy):
    """Tensor parallelism as ``parallelize_fn`` says, and ``fully_shard`` over the axis of the data.

    The ranks form a mesh with the axes ``"data_parallel"`` and ``"tensor_parallel"``. The ranks of one tensor-parallel
    group work on the same batch and draw the same random numbers: ``setup`` gives them the random state of the group's
    first rank, and loaders are dealt out along ``"data_parallel"`` alone. All ranks start from rank 0's values.

    What the plan leaves out stays whole on every rank of a group, and its gradients must come out alike on them. Where
    activations are sharded (sequence parallelism) they do not; this is checked in the first backward.

    Args:
        parallelize_fn: ``f(model, device_mesh) -> model`` lays the model out in place, as a rule by torch's
            ``parallelize_module(model, device_mesh["tensor_parallel"], plan)``; it may also ``fully_shard`` parts over
            ``device_mesh["data_parallel"]``. Or the plan alone, a mapping of names of submodules (``*`` matches within
            one part of a name) to torch's ``ParallelStyle``.
        data_parallel_size: Into how many shares the data is dealt. ``"auto"``: what is left, or the number of nodes.
        tensor_parallel_size: The ranks of a group. ``"auto"``: what is left, or the ranks of a node.
        reshard_after_forward: Of parameters that are sharded over the data axis, as in ``FSDPStrategy``.
        auto_wrap_policy: Which modules are gathered one by one, as in ``FSDPStrategy``. None: the repeated layers.
        activation_checkpointing_policy: Which modules run forward again in backward, as in ``FSDPStrategy``.
        state_dict_type: ``"sharded"``: checkpoints are folders; ``"full"``: one file.
    """

    parallelize_fn: Plan = dataclasses.field(hash=False)
    data_parallel_size: int | str = "auto"
    tensor_parallel_size: int | str = "auto"
    reshard_after_forward: bool | int | None = dataclasses.field(default=None, kw_only=True)
    auto_wrap_policy: Policy | None = dataclasses.field(default=None, kw_only=True, hash=False)
    activation_checkpointing_policy: Policy | None = dataclasses.field(default=None, kw_only=True, hash=False)
    state_dict_type: str = dataclasses.field(default="sharded", kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.parallelize_fn) and not isinstance(self.parallelize_fn, Mapping):
            raise FabricTypeError(
                "parallelize_fn is a function that lays the model out, or a mapping of names to styles.",
                given=f"parallelize_fn={self.parallelize_fn!r:.80}",
                fix="def parallelize(model, device_mesh): ...; return model",
            )
        for option in ("data_parallel_size", "tensor_parallel_size"):
            size = getattr(self, option)
            if size != "auto" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise FabricValueError(
                    "The size of an axis of the mesh is a number of ranks.",
                    given=f"{option}={size!r}",
                    fix=f"{option}= a positive whole number, or 'auto'",
                )
        check_policy(self.auto_wrap_policy, "auto_wrap_policy")
        check_policy(self.activation_checkpointing_policy, "activation_checkpointing_policy")
        if self.state_dict_type not in ("sharded", "full"):
            raise FabricValueError(
                "This kind of checkpoint does not exist.",
                given=f"state_dict_type={self.state_dict_type!r}",
                fix="'sharded' for a folder, 'full' for one file",
            )

    @property
    def is_sharded(self) -> bool:
        return True

    @property
    def data_axes(self) -> tuple[str, ...]:
        return (DATA_AXIS,)

    def mesh_axes(self, world_size: int, local_world_size: int) -> Mapping[str, int]:
        data, tensor = self.data_parallel_size, self.tensor_parallel_size
        if not isinstance(tensor, int):
            tensor = max(1, world_size // data) if isinstance(data, int) else local_world_size
        if not isinstance(data, int):
            data = max(1, world_size // tensor)
        if data * tensor != world_size:
            raise FabricValueError(
                "The sizes of the mesh do not multiply to the number of ranks.",
                given=f"data_parallel_size={self.data_parallel_size!r} and tensor_parallel_size="
                f"{self.tensor_parallel_size!r} at a world size of {world_size}: {data} x {tensor} = {data * tensor}",
                fix=f"sizes whose product is {world_size}, or 'auto' for one of them",
            )
        return {DATA_AXIS: data, TENSOR_AXIS: tensor}

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], run: Callable[..., Any], placement: Placement
    ) -> Engine:
        mesh = placement.mesh
        assert mesh is not None
        group = mesh[TENSOR_AXIS].get_group()
        state = gather_objects(shared_random_state(placement.device), group)[0]
        sharding.follow_rank_zero(module, placement.device)
        if self.activation_checkpointing_policy is not None:
            checkpoint_activations(module, self.activation_checkpointing_policy)
        if not any(map(_is_cut, module.parameters())):  # else it was set up before; the plan's hooks are still there
            tied = _tied_names(module)
            self._parallelize(module, mesh)
            _tie_again(module, tied)
        engine = self._shard(module, mesh, placement)
        engine = dataclasses.replace(engine, handles=(*engine.handles, *_watch_gradients(module, group)))
        # Last: laying out may draw numbers, and on an accelerator torch makes all states of a mesh equal in it.
        set_shared_random_state(state, placement.device)
        return engine

    def unwrap(self, module: nn.Module) -> None:
        release_activations(module)

    def no_sync(self, module: nn.Module, engine: nn.Module | None) -> contextlib.AbstractContextManager[Any]:
        return sharding.no_sync(module)

    def forget_unsynchronized(self, module: nn.Module, parameters: Container[int] | None = None) -> None:
        sharding.forget_unsynchronized(module, parameters)

    def _parallelize(self, module: nn.Module, mesh: DeviceMesh) -> None:
        plan = self.parallelize_fn
        if isinstance(plan, Mapping):
            from torch.distributed.tensor.parallel import parallelize_module

            _check_names(module, plan)
            # Each rank has the same values already, so it takes its part of its own.
            parallelize_module(module, mesh[TENSOR_AXIS], dict(plan), src_data_rank=None)
            return
        returned = plan(module, mesh)
        if returned is not module:
            raise StrategyError(
                "parallelize_fn must change the model in place and return it.",
                given=f"it returned {'None' if returned is None else f'another {type(returned).__name__}'}",
                fix="def parallelize(model, device_mesh): ...; return model",
            )

    def _shard(self, module: nn.Module, mesh: DeviceMesh, placement: Placement) -> Engine:
        """Shard what is not sharded yet over the data axis; alone on it, move what is left to the device."""
        is_by_user = any(_is_fully_sharded(part) for part in module.modules())
        if mesh[DATA_AXIS].size() > 1 or is_by_user:
            blocks = choose_blocks(module, self.auto_wrap_policy)
            sharding.check_shardable(module, blocks)
            return sharding.shard_module(
                module,
                blocks,
                mesh[DATA_AXIS],
                placement,
                reshard_after_forward=self.reshard_after_forward,
            )
        if not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()]):
            module.to(placement.device)
        return Engine(hooked=True)  # of the plan: a style on the model itself is made of hooks


def _is_cut(parameter: torch.Tensor) -> bool:
    """Whether ``parameter`` is laid out over the axis of the plan."""
    mesh = mesh_of(parameter)
    return mesh is not None and TENSOR_AXIS in (mesh.mesh_dim_names or ())


def _is_fully_sharded(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _check_names(module: nn.Module, plan: Mapping[str, Any]) -> None:
    """torch only warns of a name that fits nothing, and the layer would stay whole on every rank."""
    names = [name.split(".") for name, _ in module.named_modules()]
    for pattern in plan:
        parts = pattern.split(".")
        fits = [name for name in names if len(name) == len(parts) and all(map(fnmatch.fnmatch, name, parts))]
        if pattern and not fits:
            shown = sorted({".".join("*" if part.isdigit() else part for part in name) for name in names} - {""})
            raise StrategyError(
                "A name in the plan fits no submodule of the model.",
                given=f"{pattern!r} for a {type(module).__name__}",
                fix=f"one of {', '.join(shown[:12])}",
            )


def _tied_names(module: nn.Module) -> list[list[str]]:
    """The names of parameters that are one, as of an embedding and the last layer."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _tie_again(module: nn.Module, tied: list[list[str]]) -> None:
    """Make one of parameters that were one before the plan: torch lays out each by itself, and they would part."""
    for names in tied:
        first, *others = (module.get_parameter(name) for name in names)
        if all(other is first for other in others):
            continue
        layouts = {(mesh_of(parameter), getattr(parameter, "placements", None)) for parameter in (first, *others)}
        if len(layouts) > 1 or any(_is_fully_sharded(part) for part in module.modules()):
            raise StrategyError(
                "parallelize_fn lays tied parameters out in different ways, or shards them apart.",
                given=f"{' and '.join(names)}, which are one parameter",
                fix="styles that lay them out alike (RowwiseParallel for an embedding, ColwiseParallel for a linear "
                "layer), or none for all of them; and leave fully_shard to the strategy",
            )
        for name in names[1:]:
            path, _, own_name = name.rpartition(".")
            module.get_submodule(path).register_parameter(own_name, first)


def _watch_gradients(module: nn.Module, group: dist.ProcessGroup) -> list[RemovableHandle]:
    """Settle gradients that autograd leaves as parts of a sum, and check those that the plan leaves to every rank.

    Returns:
        The hooks' handles, for the release of the module.
    """
    handles = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        mesh = mesh_of(parameter)
        if mesh is not None and _is_cut(parameter):
            if mesh.ndim == 1:  # fully_shard settles the others
                handles.append(parameter.register_post_accumulate_grad_hook(settle_gradient))
        elif group.size() > 1:
            handles.append(parameter.register_post_accumulate_grad_hook(_AlikeOnAllRanks(name, group)))
    return handles


@dataclasses.dataclass
class _AlikeOnAllRanks:
    """A hook on a parameter that every rank of a tensor-parallel group holds: its first gradient must be the same.

    Under sequence parallelism a norm that is not in the plan sees only this rank's tokens. Its gradient is a part of
    the true one, and each rank would train a norm of its own.
    """

    name: str
    group: dist.ProcessGroup
    is_armed: bool = True

    def __call__(self, parameter: torch.Tensor) -> None:
        if not self.is_armed or parameter.grad is None:
            return
        gradient = local_part(parameter.grad).flatten()
        sample = gradient[:: max(1, gradient.numel() // _SAMPLED)].to(torch.float32)
        extremes = torch.stack([sample, -sample])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.group)
        largest, spread = extremes.abs().amax(0).norm(), extremes.sum(0).norm()
        # Zeros tell nothing, nor do overflows: then the next backward is asked.
        self.is_armed = not (0 < largest.item() < float("inf"))
        if not self.is_armed and spread > _TOLERANCE * largest:
            raise StrategyError(
                f"The gradients of {self.name} differ between the ranks of a tensor-parallel group.",
                given=f"a parameter that parallelize_fn leaves out, in a spread of {spread / largest:.0%}",
                fix="SequenceParallel() for it in the plan, if its inputs are sharded; else the same inputs and "
                "random numbers on all ranks of a group",
            )


# Elements of a gradient that are compared: few enough to cost nothing, also of a large embedding.
_SAMPLED = 65536
# Kernels that add in no fixed order differ by far less, parts of a sum by far more.
_TOLERANCE = 0.05
