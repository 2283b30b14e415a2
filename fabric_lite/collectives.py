"""Collectives over nested data, written once for all strategies.

Every function must be called by all ranks, in the same order. In a process alone they do nothing. Leaves are
tensors, Python numbers and numpy arrays; dtypes are kept and inputs are never changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from fabric_lite.collective_check import CollectiveCheck
from fabric_lite.device import widest_dtype
from fabric_lite.errors import CollectiveError, FabricError, FabricValueError
from fabric_lite.trees import leaves, map_leaves

__all__ = [
    "REDUCE_OPS",
    "Collectives",
    "barrier",
    "broadcast_object",
    "gather_objects",
    "is_distributed",
    "raise_together",
    "rank",
    "results_together",
    "timeout_of_default_group",
    "world_size",
]

# Of an object, what the first exchange of objects carries; most have no more, and so need no second one.
_FIRST_BYTES = 1024
_HEADER_BYTES = 8  # the length of the whole

REDUCE_OPS = ("mean", "avg", "sum", "min", "max", "product")


def is_distributed() -> bool:
    """Whether this process is one of several that can communicate."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The rank of this process; 0 for a process alone."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """The number of processes; 1 for a process alone."""
    return dist.get_world_size() if is_distributed() else 1


def timeout_of_default_group() -> datetime.timedelta | None:
    """How long the ranks' collectives wait for each other; None where torch does not tell."""
    group: Any = dist.group.WORLD
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            timeout: datetime.timedelta = options._timeout
            return timeout
    return None


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """Return every rank's picklable ``value``, ordered by rank, on every rank of ``group`` (None: all ranks).

    Raises:
        CollectiveError: On every rank, when the value of any could not be pickled.
    """
    if not is_distributed():
        return [value]
    packed = _pack(value)
    mine = packed if isinstance(packed, bytes) else pickle.dumps(packed)
    return [_unpack(one) for one in _gather_bytes(mine, group)]


def broadcast_object(value: Any, src: int = 0, group: Any = None) -> Any:
    """Return rank ``src``'s picklable ``value`` on every rank of ``group`` (None: all ranks).

    Raises:
        CollectiveError: On every rank, when it could not be pickled.
    """
    if not is_distributed():
        return value
    box = [_pack(value) if rank() == src else None]
    dist.broadcast_object_list(box, src=src, group=group)
    return value if rank() == src and isinstance(box[0], bytes) else _unpack(box[0])


def barrier() -> None:
    """Wait until every rank is here."""
    if is_distributed():
        dist.barrier()


def raise_together(error: BaseException | None, what: str, kind: type[FabricError], group: Any = None) -> None:
    """Raise on every rank if ``error`` is set on any: the own error where there is one, else ``kind`` naming the rank.

    Args:
        error: What went wrong on this rank, or None.
        what: What was being done, for the message of the ranks where nothing went wrong.
        kind: An error type of :mod:`fabric_lite.errors`, raised on those ranks.
        group: Through which the ranks tell each other, one of all ranks; None is the default group.
    """
    _raise_first(error, gather_objects(None if error is None else _in_words(error), group), what, kind)


def results_together(function: Callable[[], Any], what: str, kind: type[FabricError], group: Any = None) -> list[Any]:
    """Call ``function`` and return the results of all ranks, by rank; raise as :func:`raise_together` does.

    One exchange, which every rank comes to also when its ``function`` raises. The results must be picklable.
    """
    error: Exception | None = None
    result: Any = None
    try:
        result = function()
    except Exception as exception:
        error = exception
    by_rank = gather_objects((None if error is None else _in_words(error), result), group)
    _raise_first(error, [message for message, _ in by_rank], what, kind)
    return [value for _, value in by_rank]


def _raise_first(
    error: BaseException | None, failures: Sequence[str | None], what: str, kind: type[FabricError]
) -> None:
    if error is not None:
        raise error
    for failed, message in enumerate(failures):
        if message is not None:
            raise kind(
                f"{what} failed on rank {failed}: {message}",
                given=f"no error on rank {rank()}, which stops because rank {failed} did not go on",
                fix=f"see the traceback of rank {failed}",
            )


@dataclasses.dataclass(frozen=True)
class Collectives:
    """The collectives of one run.

    Args:
        device: Device on which the tensors travel and come back.
        check: Whether each call first compares operation, shapes and dtypes over the ranks, through the store. A
            difference is raised on all ranks, with the lines of all, instead of hanging or mixing data up.
    """

    device: torch.device
    check: bool = False

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._compare("barrier", None)
        barrier()

    def broadcast(self, tree: Any, src: int = 0) -> Any:
        """Return rank ``src``'s ``tree`` on every rank; tensors keep their dtype, any picklable object may be in it."""
        if not 0 <= src < world_size():
            raise FabricValueError(
                "The source rank of a broadcast does not exist.",
                given=f"src={src} of {world_size()} ranks",
                fix=f"a rank from 0 to {world_size() - 1}",
            )
        if not is_distributed():
            return tree
        self._compare(f"broadcast from rank {src}", None)
        sends = rank() == src
        skeleton = map_leaves(lambda leaf: _TensorSpec(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)
        skeleton = broadcast_object(skeleton if sends else None, src)
        if sends:
            for leaf in leaves(tree):
                if isinstance(leaf, torch.Tensor):
                    dist.broadcast(_as_sent(leaf.detach().to(self.device).contiguous()), src)
            return tree

        def receive(leaf: Any) -> Any:
            if not isinstance(leaf, _TensorSpec):
                return leaf
            tensor = torch.empty(leaf.shape, dtype=leaf.dtype, device=self.device)
            dist.broadcast(_as_sent(tensor), src)
            return tensor

        return map_leaves(receive, skeleton)

    def all_gather(self, tree: Any, group: Any = None, *, sync_grads: bool = False) -> Any:
        """Return ``tree`` with each leaf of shape ``(*shape)`` replaced by a tensor of shape ``(group size, *shape)``.

        A process alone gets its leaves back as tensors, without the extra dim, detached too unless ``sync_grads``.
        Shapes and dtypes must be equal on all ranks.

        Args:
            tree: Nested tensors, numbers and numpy arrays.
            group: A process group; None is all ranks.
            sync_grads: Whether gradients flow back: each rank receives the sum over ranks of its part's gradients.
        """
        tree = map_leaves(self._as_tensor, tree)
        if not is_distributed():
            return tree if sync_grads else map_leaves(torch.Tensor.detach, tree)
        self._compare("all_gather", tree, group)
        if sync_grads:
            return map_leaves(lambda leaf: _DifferentiableGather.apply(leaf, group), tree)
        return map_leaves(lambda leaf: _gather(leaf.detach(), group), tree)

    def all_reduce(self, tree: Any, group: Any = None, reduce_op: str = "mean") -> Any:
        """Return ``tree`` with every leaf reduced over the ranks.

        The mean of integers and bools is a float64, never truncated; every other result keeps its dtype. Floats
        shorter than float32 travel as float32, so that only the result is rounded.

        Raises:
            FabricValueError: ``reduce_op`` is none of ``mean avg sum min max product``.
        """
        operation = str(reduce_op).lower()
        if operation not in REDUCE_OPS:
            raise FabricValueError(
                "This reduction does not exist.",
                given=f"reduce_op={reduce_op!r}",
                fix=f"one of {', '.join(REDUCE_OPS)}",
            )
        tree = map_leaves(self._as_tensor, tree)
        self._compare(f"all_reduce {operation}", tree, group)
        return map_leaves(lambda leaf: _reduce(leaf, operation, group), tree)

    def gather_uneven(self, tree: Any) -> Any:
        """Return ``tree`` with each leaf ``(n, *shape)`` replaced by all ranks' rows ``(sum of n, *shape)``, by rank.

        The number of rows ``n`` may differ from rank to rank; the other dims and the dtype may not. A number
        is one row.
        """
        tree = map_leaves(lambda leaf: _as_rows(self._as_tensor(leaf)), tree)
        if not is_distributed():
            return tree
        self._compare("gather", map_leaves(lambda leaf: leaf[:0], tree))
        return map_leaves(_gather_rows, tree)

    @contextlib.contextmanager
    def rank_zero_first(self, is_first: bool) -> Iterator[None]:
        """Run the block where ``is_first``, then on all other ranks.

        Raises:
            CollectiveError: On every other rank at once, when the block raised where it ran first, or ended there
                with ``SystemExit`` or ``KeyboardInterrupt``.
        """
        self._compare("rank_zero_first", None)
        error: BaseException | None = None
        if not is_first:
            raise_together(None, "rank_zero_first()", CollectiveError)
            yield
            return
        try:
            yield
        except BaseException as exception:
            error = exception
        raise_together(error, "rank_zero_first()", CollectiveError)

    def _as_tensor(self, leaf: Any) -> torch.Tensor:
        if isinstance(leaf, (bool, int)):
            return torch.tensor(leaf, device=self.device)
        if isinstance(leaf, (torch.Tensor, float, np.ndarray, np.generic)):
            # A Python float is a double.
            tensor = torch.tensor(leaf, dtype=torch.float64) if isinstance(leaf, float) else torch.as_tensor(leaf)
            is_wide = tensor.dtype == torch.float64 and tensor.device != self.device
            return tensor.to(self.device, widest_dtype(self.device) if is_wide else None)
        raise FabricValueError(
            "A collective takes tensors, numbers and numpy arrays.",
            given=f"{type(leaf).__name__}: {leaf!r:.80}",
            fix="fabric.broadcast for any other object, or take it out of the data",
        )

    def enter(self, operation: str, group: Any = None, site: str | None = None) -> None:
        """Compare a step that communicates by other ways than this object's, where calls are checked.

        ``site`` is said where none of the user's lines runs, as in a thread of torch's.
        """
        self._compare(operation, None, group, site)

    def leave(self) -> None:
        """Say that this rank makes no more calls, where calls are checked."""
        if "_checker" in vars(self):
            self._checker.leave()

    @functools.cached_property
    def _checker(self) -> CollectiveCheck:
        timeout = timeout_of_default_group()
        return CollectiveCheck(rank(), math.inf if timeout is None else timeout.total_seconds())

    def _compare(self, operation: str, tree: Any, group: Any = None, site: str | None = None) -> None:
        if not (self.check and is_distributed()):
            return
        specs = [f"{tuple(leaf.shape)} {leaf.dtype}" for leaf in leaves(tree)] if tree is not None else []
        self._checker.enter(operation, ", ".join(specs), dist.get_process_group_ranks(group), site)


class _TensorSpec:
    """Stands for a tensor in data that travels as an object; no dataclass, since those are containers of leaves."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype


class _Unpicklable:
    """Travels in place of an object that could not, so that no rank is left waiting for it."""

    def __init__(self, sender: int, reason: str) -> None:
        self.sender, self.reason = sender, reason

    def throw(self) -> NoReturn:
        raise CollectiveError(
            f"The object of rank {self.sender} cannot be pickled, so no rank received anything.",
            given=self.reason,
            fix="leave out what cannot be pickled (lambdas, locks, open files), or send tensors and plain data",
        )


def _pack(value: Any) -> bytes | _Unpicklable:
    try:
        return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # any: objects bring their own __reduce__
        return _Unpicklable(rank(), f"{type(value).__name__}; {_in_words(error)}")


def _unpack(packed: Any) -> Any:
    value = pickle.loads(packed) if isinstance(packed, bytes) else packed
    return value.throw() if isinstance(value, _Unpicklable) else value


def _gather_bytes(mine: bytes, group: Any) -> list[bytes]:
    """Every rank's bytes, by rank: in one exchange where those of all are few, else in a second one for the rest."""
    head = len(mine).to_bytes(_HEADER_BYTES, "little") + mine[:_FIRST_BYTES].ljust(_FIRST_BYTES, b"\0")
    heads = _exchange_alike(head, group)
    lengths = [int.from_bytes(one[:_HEADER_BYTES], "little") for one in heads]
    rest = max(lengths) - _FIRST_BYTES
    tails = _exchange_alike(mine[_FIRST_BYTES:].ljust(rest, b"\0"), group) if rest > 0 else [b""] * len(heads)
    return [(head[_HEADER_BYTES:] + tail)[:length] for head, tail, length in zip(heads, tails, lengths, strict=True)]


def _exchange_alike(mine: bytes, group: Any) -> list[bytes]:
    """Every rank's bytes, as many from each."""
    asked: Any = group or dist.group.WORLD
    devices = [device.type for device in asked._device_types]
    device = "cpu" if "cpu" in devices else devices[0]
    parts = _gather_parts(torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(device), group)
    return [part.cpu().numpy().tobytes() for part in parts]


def _in_words(error: BaseException) -> str:
    """Type and message; further lines, as of an error in three parts, are indented below ``Given:``."""
    message = str(error).replace("\n", "\n  ")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _as_sent(tensor: torch.Tensor) -> torch.Tensor:
    """Backends know no float8: its bytes travel."""
    return tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _gather(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    # contiguous() alone would keep channels_last strides from rank to rank
    return torch.stack(_gather_parts(tensor.contiguous(), group))


def _gather_parts(tensor: torch.Tensor, group: Any) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return parts


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()


def _gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    counts = [int(count) for count in _gather(torch.tensor(len(tensor), device=tensor.device), None)]
    padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    return torch.cat([part[:count] for part, count in zip(_gather(padded, None), counts, strict=True)])


def _reduce(tensor: torch.Tensor, operation: str, group: Any) -> torch.Tensor:
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    mean = operation in ("mean", "avg")
    if mean and not (tensor.is_floating_point() or tensor.is_complex()):
        tensor = tensor.to(widest_dtype(tensor.device))
    if not is_distributed():
        return tensor
    kept = tensor.dtype
    if kept == torch.bool:
        # Bytes, since sums of bools differ between backends: sum is "any", product is "all", as in torch.
        tensor = tensor.to(torch.uint8)
        operation = {"sum": "max", "product": "min"}.get(operation, operation)
    elif tensor.is_floating_point() and tensor.itemsize < 4:
        tensor = tensor.float()  # the sum of two float16 of 60000 is infinite, their mean is not
    operations = {"min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX, "product": dist.ReduceOp.PRODUCT}
    dist.all_reduce(tensor, op=operations.get(operation, dist.ReduceOp.SUM), group=group)
    return (tensor / dist.get_world_size(group) if mean else tensor).to(kept)


class _DifferentiableGather(torch.autograd.Function):
    """``all_gather`` whose gradient is the sum over ranks of the gradients of this rank's part."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return _gather(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, None]:
        # A copy: autograd may hand the same tensor to other branches, and this one is reduced in place.
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[dist.get_rank(ctx.group)], None
