"""Models without memory in an ordinary script: what a model makes is fake, the script's data stays real."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from fabric_lite.bench.torch_private import (
    DispatchMode,
    fakes_like_real_ones,
    finished_work,
    is_collective,
    is_fake,
    make_fake_mode,
    unwraps_itself,
)
from fabric_lite.bench.tracking import makers
from fabric_lite.call_site import frames_of, is_users

__all__ = ["Faking"]


class Faking(DispatchMode):
    """A context in which modules, and the engines around them, make tensors that have shapes and no memory.

    What they are computed with becomes fake with them. All else stays real: data sets, orders of samples, the steps
    that an optimizer counts, what ranks tell each other.

    **A fake tensor is taken to be full of ones** where the script asks for its numbers: ``item()`` is 1, a logarithm of
    it is 0, a division by it is possible, ``isnan`` is False, ``isfinite`` True and ``x == y`` True. So where a script
    branches on one it may do something else than in a real run; :attr:`first_read` tells whether it can.

    Collectives of fake tensors are over at once.

    Attributes:
        first_read: The first line of the user's, ``train.py:12``, that asked for such a number or let torch's optimizer
            ask; None while there is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake_mode = make_fake_mode()
        self._truths = WeakIdKeyDictionary()  # of fake tensors of bools: what they hold if all numbers are one
        self._fakes = fakes_like_real_ones(self._number)
        self.first_read: str | None = None

    def __enter__(self) -> Faking:
        super().__enter__()
        self._fakes.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._fakes.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(unwraps_itself, types)):
            return NotImplemented
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if is_collective(func) and func.namespace == "c10d":
            return self._communicate(func, args, kwargs, tensors)
        if all(tensor.is_meta and not is_fake(tensor) for tensor in tensors):  # out of nothing, or of a shape
            if not _is_for_a_model(kwargs):
                return func(*args, **kwargs)
        elif not any(map(is_fake, tensors)):
            return func(*args, **kwargs)
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
            return self._number(args[0])
        if func is torch.ops.aten.equal.default:
            self._note_reader()
            return True
        if func is torch.ops.aten.new_empty.default and 0 in args[1]:
            # fully_shard makes one for each rank that gets nothing of a parameter; a fake one costs 50 times as much.
            return torch.empty(args[1], dtype=kwargs.get("dtype") or args[0].dtype)
        with self.fake_mode:
            out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.dtype == torch.bool:
            self._truths[out] = self._truth(func, args, kwargs)
        return out

    def _communicate(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        results = args[0]
        is_real = not any(map(is_fake, tensors))
        if is_real:
            # Between copies of this rank: what is gathered is this rank's, so that ranks agree on everything.
            func(*args, **kwargs)
        work = finished_work(func, [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)])
        return work if len(func._schema.returns) == 1 else (results, work)

    def _number(self, tensor: torch.Tensor) -> Any:
        self._note_reader()
        if tensor.dtype == torch.bool:
            return self._truths.get(tensor, False)
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _note_reader(self) -> None:
        """Note the user's line, if it is one: not what engines or Fabric read, in which nothing depends on it."""
        if self.first_read is not None:
            return
        is_optimizers = False
        for frame in frames_of(sys._getframe(1)):
            name = str(frame.f_globals.get("__name__", ""))
            is_optimizers = is_optimizers or name.startswith("torch.optim.")
            if is_users(frame.f_code.co_filename):
                self.first_read = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
                return
            if name.startswith("fabric_lite.") and not (is_optimizers or name.startswith("fabric_lite.bench.")):
                return

    def _truth(self, func: Any, args: Any, kwargs: Any) -> bool:
        """What an operator on ones gives, where it gives a bool."""

        def one(tensor: torch.Tensor) -> torch.Tensor:
            value = self._truths.get(tensor, False) if tensor.dtype == torch.bool else 1
            return torch.full((), value, dtype=tensor.dtype)

        try:
            return bool(func(*tree_map_only(torch.Tensor, one, args), **tree_map_only(torch.Tensor, one, kwargs)))
        except (RuntimeError, IndexError):
            return False  # an operator on dims, such as any(dim=1)


def _is_for_a_model(options: Any) -> bool:
    """Whether a new tensor, made out of nothing with these options, is one that a simulated device would hold."""
    if torch.device(options.get("device") or "cpu").type == "meta":
        return False
    kinds = makers()
    # Engines make integers only to compare shapes and orders over the ranks: they read them at once.
    is_compared = "engine" in kinds and not (options.get("dtype") or torch.get_default_dtype()).is_floating_point
    return bool(kinds) and not is_compared
