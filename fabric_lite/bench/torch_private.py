"""The private parts of torch that a simulation stands on; they are touched here alone, each with its reason."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork, Work
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.futures import Future
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

__all__ = [
    "DispatchMode",
    "FakeTensorMode",
    "fake_mode_of",
    "fakes_like_real_ones",
    "finished_work",
    "flops_of",
    "is_collective",
    "is_fake",
    "join_fake_group",
    "local_part",
    "make_fake_mode",
    "ranks_of",
    "storage_key",
    "unwraps_itself",
]

# Torch has no public way to see, or to answer, the operators that its engines call from C++; it says of this one that
# it is there for users, under this name.
DispatchMode = TorchDispatchMode

_COLLECTIVES = ("c10d", "c10d_functional", "_c10d_functional")


def join_fake_group(rank: int, world_size: int) -> None:
    """Make a default process group of ``world_size`` ranks of which this process is one and no other exists.

    Torch has it for its own tests of large worlds; the backend registers itself when the module is imported.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


class _OneMode(FakeTensorMode):
    """A mode of which there are no copies: a fake tensor's deep copy, as in ``TransformerEncoder``, would get one."""

    def __deepcopy__(self, memo: Any) -> _OneMode:
        return self


def make_fake_mode() -> FakeTensorMode:
    """The mode whose tensors have shapes and no memory; real ones that meet them are taken for fake ones.

    Torch's compiler is built on it; there is no public one.
    """
    return _OneMode(allow_non_fake_inputs=True)


@contextlib.contextmanager
def fakes_like_real_ones(value_of: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """Fake tensors do here what torch refuses them: ``format``, ``numpy`` and, held weakly, ``Module.to(dtype)``.

    ``_apply`` gives a real parameter new data in place and swaps a fake one, which it refuses where a weak reference
    is left. That reference is to the parameter, which stays: it may go on.

    Args:
        value_of: The number that all elements of a fake tensor are taken to be.
    """
    swap_tensors = torch.utils.swap_tensors

    def no_references(_: object) -> list[object]:
        return []

    def swap(first: torch.Tensor, second: torch.Tensor) -> None:
        if not is_fake(first):
            return swap_tensors(first, second)
        # A function: a Mock would remember the tensors that it was called with, and keep their memory.
        with mock.patch.object(weakref, "getweakrefs", no_references):
            return swap_tensors(first, second)

    def numpy(tensor: torch.Tensor, *, force: bool = False) -> Any:
        value = value_of(tensor)
        with _disable_current_modes():
            # Torch itself refuses what it refuses for real ones: gradients without force, and bfloat16.
            full = torch.full(tensor.shape, value, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            return full.numpy(force=force)

    def formatted(tensor: torch.Tensor, specification: str) -> str:
        if tensor.dim():
            return object.__format__(tensor, specification)
        return format(value_of(tensor), specification)

    with (
        mock.patch.object(torch.utils, "swap_tensors", swap),
        mock.patch.object(FakeTensor, "numpy", numpy, create=True),
        mock.patch.object(FakeTensor, "__format__", formatted, create=True),
    ):
        yield


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` has no memory."""
    return isinstance(tensor, FakeTensor)


def fake_mode_of(tensor: torch.Tensor) -> FakeTensorMode | None:
    """The mode that a fake tensor belongs to; None for a real one."""
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else None


def unwraps_itself(kind: type) -> bool:
    """Whether tensors of this class hold others and turn each operator into operators on those, as DTensor does.

    A mode that gives way to them sees what they do: local tensors and collectives.
    """
    return hasattr(kind, "__tensor_flatten__")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor; other tensors as they are. ``to_local`` would need autograd and wait."""
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def storage_key(storage: torch.UntypedStorage) -> int:
    """The same for every Python object that stands for one storage, as long as it lives."""
    return int(storage._cdata)


def is_collective(func: Any) -> bool:
    """Whether an operator communicates; Python's calls, DTensor's and those that DDP makes from C++ come to these."""
    return func.namespace in _COLLECTIVES


def ranks_of(func: Any, args: Any) -> list[int]:
    """The ranks that a collective is between; none where it names no group.

    Operators of ``c10d`` are given the group in a box, functional ones its name; there is no public way from either.
    """
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.name == "process_group":
            return dist.get_process_group_ranks(dist.ProcessGroup.unbox(value))
        if argument.name == "group_name":
            return dist.get_process_group_ranks(_resolve_process_group(value))
    return []


class _FinishedReduction(Work):
    """What an all-reduce returns that is over: the fake group's own has no tensors in its future, and DDP wants them.

    They are held weakly, since the object must outlive the call, see :func:`finished_work`.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self._references = [weakref.ref(tensor) for tensor in tensors]

    def wait(self, timeout: Any = None) -> bool:
        return True

    def get_future(self) -> Any:
        future: Future[Any] = Future()
        future.set_result([tensor for reference in self._references if (tensor := reference()) is not None])
        return future


# Torch keeps the C++ half of a Work alone alive. Without its Python half it waits for ever.
_finished: list[Work] = []


def finished_work(func: Any, tensors: list[torch.Tensor]) -> Any:
    """A ``Work`` that is over, in the form in which the collective ``func`` of ``c10d`` returns it."""
    if "allreduce" not in func._schema.name:
        return FakeWork().boxed()
    _finished.append(_FinishedReduction(tensors))
    return _finished[-1].boxed()


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating point operations of an operator, by torch's own formulas; 0 for those that have none."""
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
