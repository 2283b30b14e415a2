"""One call of the log: which operation, on which pieces of which storages."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from fabric_lite.deferred.randomness import Draw
from fabric_lite.errors import StrategyError

__all__ = ["Constant", "Entry", "Facts", "Piece", "facts_of", "storage_key"]

# In place, and nothing of what the tensor held before matters.
_OVERWRITING = {
    *("bernoulli_", "cauchy_", "copy_", "exponential_", "fill_", "geometric_", "log_normal_", "normal_"),
    *("random_", "uniform_", "zero_"),
}
# Their tensor argument gives a shape and a dtype, its values are not read.
_SHAPED_LIKE = {
    *("empty_like", "full_like", "ones_like", "zeros_like", "rand_like", "randn_like", "randint_like"),
    *("new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros"),
}
# What operations write although their schema does not say so.
_STATISTICS = frozenset({"running_mean", "running_var"})
_WRITTEN_UNSAID = dict.fromkeys(("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"), _STATISTICS)
# A real tensor above this is kept by reference, not copied.
_COPIED_BYTES = 2**20


def storage_key(tensor: torch.Tensor) -> int:
    """What identifies the tensor's storage for as long as the storage lives."""
    return tensor.untyped_storage()._cdata


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a storage that a tensor shows; views, detached and tied tensors are pieces of one storage."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conjugated: bool
    negated: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Piece:
        place = (tuple(tensor.size()), tuple(tensor.stride()), int(tensor.storage_offset()))
        return cls(storage_key(tensor), tensor.dtype, *place, tensor.is_conj(), tensor.is_neg())

    def within(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The tensor that shows this piece of ``storage``."""
        tensor: Any = torch.empty(0, dtype=self.dtype, device=storage.device)
        tensor.set_(storage, self.offset, self.size, self.stride)
        tensor = tensor.conj() if self.conjugated else tensor
        return torch._neg_view(tensor) if self.negated else tensor

    def is_all_of(self, storage: torch.UntypedStorage) -> bool:
        """Whether each byte of ``storage`` belongs to exactly one element."""
        expected = 1
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size == 1:
                continue
            if stride != expected:
                return False
            expected *= size
        return self.offset == 0 and expected * self.dtype.itemsize == storage.nbytes()


class Constant:
    """A real tensor that a recorded operation read, as it was at that time."""

    def __init__(self, tensor: torch.Tensor) -> None:
        small = tensor.numel() * tensor.element_size() <= _COPIED_BYTES
        self._tensor = tensor.detach().clone() if small else tensor
        self._version = self._tensor._version

    def value(self) -> torch.Tensor:
        """Return the tensor.

        Raises:
            StrategyError: It was too large to copy, and was written since.
        """
        if self._tensor._version != self._version:
            raise StrategyError(
                "A tensor that fabric.init_module(empty_init=True) has to read again was changed after it was used.",
                given=f"{self._tensor.dtype} of shape {tuple(self._tensor.shape)}",
                fix="leave it unchanged until setup, or build with fabric.init_module() without empty_init",
            )
        return self._tensor


@dataclasses.dataclass(frozen=True)
class Facts:
    """What an operation does, as far as its schema says."""

    written: frozenset[str]  # arguments that it writes
    overwritten: frozenset[str]  # those of them of which nothing old is left, when they are whole storages
    shape_only: bool
    random: bool
    draws_in_place: bool
    takes_device: bool
    data_dependent: bool


@functools.cache
def facts_of(operation: Any) -> Facts:
    """Read the schema of an ``OpOverload``."""
    schema = operation._schema
    name = schema.name.split("::")[-1]
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    written |= _WRITTEN_UNSAID.get(name, frozenset())
    overwritten = {a.name for a in schema.arguments if a.is_out}
    if name in _OVERWRITING:
        overwritten |= written
    takes_generator = any("Generator" in str(a.type) for a in schema.arguments)
    random = takes_generator or torch.Tag.nondeterministic_seeded in operation.tags
    return Facts(
        written=frozenset(written),
        overwritten=frozenset(overwritten),
        shape_only=name in _SHAPED_LIKE,
        random=random,
        draws_in_place=random and name in _OVERWRITING,
        takes_device=any(a.name == "device" for a in schema.arguments),
        data_dependent=torch.Tag.data_dependent_output in operation.tags,
    )


def named_arguments(operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Each argument under its name in the schema."""
    positional = zip((a.name for a in operation._schema.arguments), args, strict=False)
    return {**dict(positional), **kwargs}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One call of the log; meta tensors are written as :class:`Piece`, real ones as :class:`Constant`."""

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    created: tuple[tuple[int, Piece], ...]  # by position among the outputs: tensors with a new storage
    default_dtype: torch.dtype
    draw: Draw | None
    inputs: frozenset[int]  # storages that it reads
    writes: frozenset[int]  # storages that it makes or writes
    overwrites: frozenset[int]  # those of them of which nothing old is left
    touched: frozenset[int]

    @classmethod
    def of(
        cls,
        operation: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        created: Iterable[tuple[int, Piece]],
        draw: Draw | None,
        storages: Mapping[int, torch.UntypedStorage],
    ) -> Entry:
        """The entry of a call whose meta tensors are replaced by pieces already."""
        facts, made = facts_of(operation), {piece.storage for _, piece in created}
        inputs, writes, overwrites, touched = set(), set(made), set(made), set(made)
        for name, argument in named_arguments(operation, args, kwargs).items():
            for piece in tree_leaves(argument):
                if not isinstance(piece, Piece):
                    continue
                touched.add(piece.storage)
                if name in facts.written:
                    writes.add(piece.storage)
                    if name in facts.overwritten and piece.is_all_of(storages[piece.storage]):
                        overwrites.add(piece.storage)
                elif not facts.shape_only:
                    inputs.add(piece.storage)
        return cls(
            *(operation, args, kwargs, tuple(created), torch.get_default_dtype(), draw),
            *(frozenset(inputs), frozenset(writes), frozenset(overwrites - inputs), frozenset(touched)),
        )

    def run(self, tensor_of: Callable[[Piece], torch.Tensor]) -> list[Any]:
        """Call the operation on real tensors and return the leaves of its outputs."""

        def real(value: Any) -> Any:
            if isinstance(value, Piece):
                return tensor_of(value)
            return value.value() if isinstance(value, Constant) else value

        return tree_leaves(self.operation(*tree_map(real, self.args), **tree_map(real, self.kwargs)))
