"""The state of a model and its optimizer for the length of a block: as sharded tensors, in the user's own objects.

A checkpoint looks at modules, optimizers and the tensors in them, not at strategies. DeepSpeed keeps values and
optimizer state elsewhere, flat, and parts of them begin anywhere. So for a save or a load they are brought to where
a checkpoint looks: each tensor by itself is made whole, and cut into rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fabric_lite.errors import StrategyError
from fabric_lite.movement import note_movement
from fabric_lite.strategies.deepspeed.handle import Handle
from fabric_lite.strategies.deepspeed.optimizers import from_inner, to_inner
from fabric_lite.strategies.deepspeed.partitions import Part

__all__ = ["holding_state", "keep_values"]


@contextlib.contextmanager
def holding_state(handles: Sequence[Handle], wanted: Container[int], changes: bool) -> Iterator[None]:
    """A context in which modules and optimizers hold their state themselves, in DTensors; every rank calls.

    Args:
        handles: Of the models.
        wanted: The ``id`` of what is looked at: an optimizer that is not among them gets no state.
        changes: Whether what is in the objects at the end is the state from then on, if the block does not raise.
    """
    with torch.no_grad(), contextlib.ExitStack() as stack:
        opened = [_Opened(handle, id(handle.optimizer()) in wanted) for handle in handles]
        for one in opened:
            stack.callback(one.close)
            one.open()
        yield
        if changes:
            for one in opened:
                one.take_over()


class _Opened:
    """One model and its optimizer, while they hold their state.

    Args:
        handle: Theirs.
        with_optimizer: Whether the optimizer's state is wanted too.
    """

    def __init__(self, handle: Handle, with_optimizer: bool) -> None:
        self._handle = handle
        self._module, self._optimizer = handle.module(), handle.optimizer()
        self._with_optimizer = with_optimizer and self._optimizer is not None
        # By the id of a parameter what stands for it, and by the id of that the parameter.
        self._shown: dict[int, nn.Parameter] = {}
        self._real: dict[int, Any] = {}
        self._state: Any = None if self._optimizer is None else self._optimizer.state

    def open(self) -> None:
        partitions = self._handle.partitions
        for flat, parameters in partitions.groups():
            for parameter in parameters:
                self._show(parameter, flat)
        if self._module is None:
            return
        for parameter in partitions.divided_beside(self._module):
            self._show(parameter, None)
        self._exchange(self._shown)
        if self._with_optimizer:
            self._fill_state()

    def _show(self, parameter: Any, flat: torch.Tensor | None) -> None:
        part = self._handle.partitions.part_of(parameter)
        if flat is None:
            flat = part.flat
        tensor = self._spread(parameter, part, flat)
        shown = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        self._shown[id(parameter)], self._real[id(shown)] = shown, parameter

    def close(self) -> None:
        """Give the objects back what they had."""
        if self._module is not None:
            self._exchange(self._real)
        if self._optimizer is not None and self._with_optimizer:
            self._optimizer.state = self._state

    def take_over(self) -> None:
        """Make what the objects hold now DeepSpeed's; every rank calls."""
        partitions = self._handle.partitions
        for shown in self._shown.values():
            parameter = self._real[id(shown)]
            part = partitions.part_of(parameter)
            _collect(shown.detach(), part, None if part is None else part.flat.detach())
        if self._with_optimizer:
            take_state(self._handle, self._optimizer, self._shown)
        if self._module is not None:
            self._exchange(self._real)  # DeepSpeed looks for its own
        partitions.publish()

    def _exchange(self, new: dict[int, Any]) -> None:
        """Put others in the place of parameters, wherever the module and the optimizer hold them."""
        assert self._module is not None
        for child in self._module.modules():
            for name, parameter in list(dict.items(child._parameters)):
                if id(parameter) in new:
                    child._parameters[name] = new[id(parameter)]
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                group["params"] = [new.get(id(parameter), parameter) for parameter in group["params"]]

    def _fill_state(self) -> None:
        assert self._optimizer is not None
        inner = self._handle.inner
        self._optimizer.state = type(self._state)(dict)
        for flat, parameters in self._handle.partitions.groups():
            entries = inner.state.get(flat, {})
            for parameter in parameters if entries else ():
                state = self._optimizer.state[self._shown[id(parameter)]] = {}
                part = self._handle.partitions.part_of(parameter)
                for name, value in entries.items():
                    by_element = isinstance(value, torch.Tensor) and value.shape == flat.shape
                    state[name] = self._spread(parameter, part, value) if by_element else from_inner(inner, name, value)

    def _spread(self, parameter: Any, part: Part | None, flat: torch.Tensor) -> torch.Tensor:
        """The whole tensor of which ``flat`` holds parts, cut into rows over the ranks; every rank calls."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        note_movement()
        mesh, shape = self._handle.mesh, self._handle.partitions.shape_of(parameter)
        whole = torch.zeros(shape.numel(), dtype=flat.dtype, device=mesh.device_type)
        if part is not None:
            whole[part.offset : part.offset + part.count] = flat.detach()[part.begin : part.begin + part.count]
        dist.all_reduce(whole, group=mesh.get_group())  # nobody else has these elements
        placement = Shard(0) if len(shape) else Replicate()
        return distribute_tensor(whole.view(shape), mesh, [placement], src_data_rank=None)


def take_state(handle: Handle, optimizer: Any, shown: dict[int, Any]) -> None:
    """Make the state in ``optimizer`` that of the step; every rank calls.

    Args:
        handle: Of the model.
        optimizer: The user's.
        shown: By the id of each parameter the one under which ``optimizer`` keeps its state.

    Raises:
        StrategyError: A number that DeepSpeed has once for a whole group differs between parameters.
    """
    inner = handle.inner
    for flat, parameters in handle.partitions.groups():
        entries = [(parameter, optimizer.state.get(shown[id(parameter)], {})) for parameter in parameters]
        names = list(dict.fromkeys(name for _, entry in entries for name in entry))
        former = inner.state.pop(flat, {})
        new: dict[str, Any] = {}
        for name in names:
            found = [(parameter, entry[name]) for parameter, entry in entries if name in entry]
            if all(_is_by_element(handle, parameter, name, value) for parameter, value in found):
                kept = former.get(name)
                new[name] = kept.zero_() if isinstance(kept, torch.Tensor) else torch.zeros_like(flat.detach())
                for parameter, value in found:
                    _collect(value, handle.partitions.part_of(parameter), new[name])
            else:
                new[name] = to_inner(inner, name, _the_only(name, [value for _, value in found]))
        if new:
            inner.state[flat] = new


def _is_by_element(handle: Handle, parameter: Any, name: str, value: Any) -> bool:
    is_alike = isinstance(value, torch.Tensor) and value.shape == handle.partitions.shape_of(parameter)
    return is_alike and (value.dim() > 0 or name != "step")


def _the_only(name: str, values: list[Any]) -> Any:
    first = values[0]
    different = [value for value in values if type(value) is not type(first) or bool(value != first)]
    if different:
        raise StrategyError(
            f"DeepSpeed keeps one {name!r} for a group of parameters, and these have several.",
            given=f"{first} and {different[0]}",
            fix="groups of parameters in the optimizer for those that were trained longer, or FSDPStrategy",
        )
    return first


def _collect(value: Any, part: Part | None, flat: torch.Tensor | None) -> None:
    """Put this rank's part of a tensor, plain or in rows over the ranks, into ``flat``; every rank calls."""
    note_movement()
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    if part is not None and flat is not None and part.count:
        flat[part.begin : part.begin + part.count] = whole.reshape(-1)[part.offset : part.offset + part.count]


class _Values:
    """What parameters and their optimizer held before DeepSpeed took them, which casts the ones and knows no others.

    Args:
        values: By the id of a parameter, what it held, where a cast loses some of it.
    """

    def __init__(self, values: dict[int, torch.Tensor]) -> None:
        self._values = values

    def give_to(self, handle: Handle) -> None:
        """Give it to the flat tensors; every rank calls."""
        optimizer = handle.optimizer()
        with torch.no_grad():
            for _, parameters in handle.partitions.groups():
                for parameter in parameters:
                    if id(parameter) in self._values:
                        part = handle.partitions.part_of(parameter)
                        _collect(self._values[id(parameter)], part, None if part is None else part.flat.detach())
            if optimizer is not None and optimizer.state:
                take_state(handle, optimizer, {id(parameter): parameter for parameter in handle.parameters})
                optimizer.state.clear()


@contextlib.contextmanager
def keep_values(parameters: Sequence[torch.Tensor]) -> Iterator[_Values]:
    """Remember values of ``parameters`` that a cast to another dtype in the block would lose."""
    before = {id(parameter): parameter.data for parameter in parameters if parameter.dtype == torch.float32}
    yield _Values(before)
    before.clear()
