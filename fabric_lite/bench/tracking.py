"""Which tensors are alive, byte by byte, and what travels: a mode that looks at every operator and changes nothing."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from fabric_lite.bench.steps import Step
from fabric_lite.bench.torch_private import (
    DispatchMode,
    FakeTensorMode,
    fake_mode_of,
    flops_of,
    is_collective,
    local_part,
    ranks_of,
    storage_key,
    unwraps_itself,
)

__all__ = ["PARTS", "Tracker", "makers"]

PARTS = ("parameters", "gradients", "optimizer", "activations", "communication", "other")

# Modules of torch's engines: what is made there by itself, and not out of other tensors, is a buffer of theirs.
_ENGINES = ("torch.distributed.fsdp", "torch.nn.parallel.distributed", "torch.distributed._composable")
# Methods of a module in which its tensors are made, or made anew in another dtype.
_CONSTRUCTORS = ("__init__", "reset_parameters", "_apply")
# Here a module that was made on the meta device gets the values of its constructor.
_CONSTRUCTION = "fabric_lite.deferred"


class _Record:
    """One storage; lives on after it in the snapshot of the peak, so that what is learned late counts there too."""

    __slots__ = ("part", "reference", "size")

    def __init__(self, reference: weakref.ref[torch.UntypedStorage], size: int, part: str) -> None:
        self.reference, self.size, self.part = reference, size, part


class Tracker(DispatchMode):
    """A context in which the bytes of all new tensors, real and fake, are known at every moment.

    Tensors from before it count from the first operator on that uses them. A storage counts as long as it lives,
    however many tensors show it. What a kernel takes for itself and gives back is not seen.

    Args:
        fake_mode: Whose fake tensors count. Others do not: DTensor works out shapes of whole results with its own.
        counts_host: Whether real tensors count too: where models are fake those are data, which a device never sees.
        local_world_size: Ranks to a node; None: all are on one.
    """

    def __init__(
        self,
        fake_mode: FakeTensorMode | None = None,
        counts_host: bool = True,
        local_world_size: int | None = None,
    ) -> None:
        super().__init__()
        self._local_world_size = local_world_size or 2**31
        self._fake_mode = fake_mode
        self._counts_host = counts_host
        self._records: dict[int, _Record] = {}
        self._resizable: dict[int, _Record] = {}
        self._on_host: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._current = self._peak = 0
        self._peak_records: list[tuple[_Record, int]] = []
        self._peak_is_now = False
        self._steps: list[Step] = []
        self._start_step()
        self._in_step: weakref.ref[Optimizer] | None = None
        self._hooks: list[Any] = []

    # --- what it knows ------------------------------------------------------------------------------------------

    @property
    def current(self) -> int:
        """Bytes alive now."""
        self._measure_resized()
        return self._current

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once."""
        return self._peak

    def peak_parts(self) -> dict[str, int]:
        """The bytes at the peak by part (``PARTS``); their sum is :attr:`peak`."""
        self._take_snapshot()
        return _by_part(self._peak_records)

    def current_parts(self) -> dict[str, int]:
        """The bytes alive now by part."""
        self._measure_resized()
        return _by_part((record, record.size) for record in self._records.values())

    @property
    def steps(self) -> tuple[Step, ...]:
        """One for each step of an optimizer that has ended."""
        return tuple(self._steps)

    def end_step(self) -> None:
        """Let a new :class:`Step` begin."""
        step = Step(dict(self._calls), dict(self._bytes), dict(self._flops), self._touched_bytes, dict(self._traffic))
        self._steps.append(step)
        self._start_step()

    def _start_step(self) -> None:
        self._calls: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._flops: Counter[str] = Counter()
        self._traffic: defaultdict[str, float] = defaultdict(float)
        self._touched_bytes = 0

    def arrive(self) -> None:
        """Count what constructors have made: models come to the device when they are set up.

        Where the host counts too they do from the start. A sharded model never comes as a whole.
        """
        if self._on_host:
            gc.collect()  # what a construction has left in cycles does not come along
        for reference in list(self._on_host.values()):
            storage = reference()
            if storage is not None:
                del self._on_host[storage_key(storage)]
                self._see_storage(storage, "parameters")

    def label(self, tensors: Iterable[Any], part: str) -> None:
        """Say what tensors are, those that are gone included in the peak."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                record = self._see(local_part(tensor), part)
                if record is not None:
                    record.part = part

    # --- how it knows it ----------------------------------------------------------------------------------------

    def __enter__(self) -> Tracker:
        super().__enter__()
        self._hooks = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(unwraps_itself, types)):
            return NotImplemented
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(map(self._is_of_shapes_alone, inputs)):
            return func(*args, **kwargs)
        given = [self._see(tensor, "other") for tensor in inputs]
        if is_collective(func):
            self._count(func, args, inputs)
        out = func(*args, **kwargs)
        if func.is_view:
            return out  # nothing new; fully_shard cuts each parameter into as many views as there are ranks
        part = self._part_of_results(func, given)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if not is_collective(func):
            self._touched_bytes += sum(map(_bytes_of, [*inputs, *results]))
            flops = flops_of(func, args, kwargs, out)
            if flops:
                self._flops[str(results[0].dtype).removeprefix("torch.")] += flops
        if self._is_made_on_host(inputs, given, part):
            for leaf in results:
                self._leave_on_host(leaf)
        for leaf in results:
            record = self._see(leaf, part)
            if record is not None and part == "communication":
                self._resizable[storage_key(leaf.untyped_storage())] = record
        return out

    def _is_made_on_host(self, inputs: list[torch.Tensor], given: list[_Record | None], part: str) -> bool:
        """Whether a result waits for ``arrive``: what a constructor makes, and copies of it that no forward makes."""
        if self._counts_host or any(given):
            return False
        if not inputs:
            return part == "parameters"
        return any(map(self._waits_on_host, inputs)) and not makers() & {"engine", "module"}

    def _waits_on_host(self, tensor: torch.Tensor) -> bool:
        return fake_mode_of(tensor) is not None and storage_key(tensor.untyped_storage()) in self._on_host

    def _leave_on_host(self, tensor: torch.Tensor) -> None:
        if fake_mode_of(tensor) is None:
            return
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key not in self._records:
            self._on_host[key] = weakref.ref(storage, lambda _: self._on_host.pop(key, None))

    def _part_of_results(self, func: Any, given: list[_Record | None]) -> str:
        if self._in_step is not None:
            return "optimizer"
        if is_collective(func) or func.namespace == "fsdp":
            return "communication"
        if not given:
            kinds = makers()
            if "engine" in kinds:
                return "communication"
            return "parameters" if "constructor" in kinds else "other"
        return "activations" if any(record is not None and record.part != "other" for record in given) else "other"

    def _see(self, tensor: torch.Tensor, part: str) -> _Record | None:
        if self._is_of_shapes_alone(tensor):
            return None
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return None  # sparse tensors and wrappers have none
        if self._counts_host:
            return self._see_storage(storage, part)
        # Real tensors are data, and what was made by a constructor has not arrived.
        is_on_host = storage.device.type != "meta" or storage_key(storage) in self._on_host
        return None if is_on_host else self._see_storage(storage, part)

    def _see_storage(self, storage: torch.UntypedStorage, part: str) -> _Record | None:
        key, size = storage_key(storage), storage.nbytes()
        record = self._records.get(key)
        if record is None:
            if size == 0:
                return None
            record = self._records[key] = _Record(weakref.ref(storage, lambda _: self._freed(key)), 0, part)
        if size != record.size:
            self._resize(record, size)
        return record

    def _is_of_shapes_alone(self, tensor: torch.Tensor) -> bool:
        fake_mode = fake_mode_of(tensor)
        # A fake tensor answers is_meta by an operator of its own, which costs as much as all else here.
        return tensor.is_meta if fake_mode is None else fake_mode is not self._fake_mode

    def _resize(self, record: _Record, size: int) -> None:
        growth = size - record.size
        if growth < 0:
            self._take_snapshot()
        elif self._current + growth > self._peak:
            # fully_shard frees by storage.resize_(0), which is no operator: it is looked for when it matters.
            self._measure_resized()
        self._current += growth
        record.size = size
        if self._current > self._peak:
            self._peak, self._peak_is_now = self._current, True

    def _measure_resized(self) -> None:
        for record in self._resizable.values():
            storage = record.reference()
            size = 0 if storage is None else storage.nbytes()
            if size < record.size:
                self._take_snapshot()
                self._current += size - record.size
                record.size = size

    def _freed(self, key: int) -> None:
        self._take_snapshot()
        record = self._records.pop(key)
        self._resizable.pop(key, None)
        self._current -= record.size

    def _take_snapshot(self) -> None:
        if self._peak_is_now:
            self._peak_is_now = False
            self._peak_records = [(record, record.size) for record in self._records.values() if record.size]

    def _count(self, func: Any, args: Any, inputs: list[torch.Tensor]) -> None:
        name = func._schema.name.split("::")[1].strip("_")
        if name in ("barrier", "recv", "recv_any_source"):
            sent: list[torch.Tensor] = []
        else:
            named = [
                value for argument, value in zip(func._schema.arguments, args, strict=False) if "input" in argument.name
            ]
            sent = [leaf for leaf in tree_leaves(named or args) if isinstance(leaf, torch.Tensor)]
        if name not in ("wait_tensor", "wrap_tensor_autograd"):  # these send nothing
            size = sum(map(_bytes_of, sent))
            self._calls[name] += 1
            self._bytes[name] += size
            ranks = ranks_of(func, args)
            nodes = {rank // self._local_world_size for rank in ranks}
            self._traffic["network" if len(nodes) > 1 else "node"] += size * _sent_by_ring(name, len(ranks))

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._in_step is None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self.label(parameters, "parameters")
            self.label([parameter.grad for parameter in parameters], "gradients")
            self._in_step = weakref.ref(optimizer)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        # A step that calls that of its base class fires the hooks twice.
        if self._in_step is not None and self._in_step() is optimizer:
            self.label(tree_leaves(list(optimizer.state.values())), "optimizer")
            self._in_step = None


def makers() -> set[str]:
    """Who asks for a new tensor right now: ``"engine"`` (DDP, FSDP), or ``"constructor"`` or ``"module"``'s code."""
    return set(_makers())


def _makers() -> Iterator[str]:
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if frame.f_globals.get("__name__", "").startswith(_ENGINES):
            yield "engine"
            return
        if frame.f_globals.get("__name__", "").startswith(_CONSTRUCTION):
            yield "constructor"
            return
        if code.co_varnames[:1] == ("self",) and isinstance(frame.f_locals.get("self"), nn.Module):
            yield "constructor" if code.co_name in _CONSTRUCTORS else "module"
            return
        frame = frame.f_back  # type: ignore[assignment]


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _sent_by_ring(name: str, ranks: int) -> float:
    """How often a rank sends what it puts in, when ``ranks`` stand in a ring."""
    if "gather" in name:
        return ranks - 1
    if "reduce_scatter" in name or "alltoall" in name or "all_to_all" in name:
        return (ranks - 1) / ranks
    return 2 * (ranks - 1) / ranks if "allreduce" in name or "all_reduce" in name else 1


def _by_part(records: Iterable[tuple[_Record, int]]) -> dict[str, int]:
    parts = dict.fromkeys(PARTS, 0)
    for record, size in records:
        parts[record.part] += size
    return parts
