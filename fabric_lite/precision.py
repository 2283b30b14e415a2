"""Precision is data: the dtypes of parameters, computation, reduction and outputs, and whether the loss is scaled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from fabric_lite.errors import FabricTypeError, FabricValueError
from fabric_lite.precision_float8 import to_float8
from fabric_lite.precision_layers import check_torchao
from fabric_lite.precision_low_bits import LowBits
from fabric_lite.precision_transformer_engine import (
    check_transformer_engine,
    in_transformer_engine,
    to_transformer_engine,
)

__all__ = ["PRECISIONS", "Precision", "parse_precision"]


@dataclasses.dataclass(frozen=True)
class Precision:
    """The dtypes of one run.

    Args:
        name: How it is written, for messages: ``"bf16-mixed"``.
        param_dtype: Dtype that ``setup`` gives to floating-point parameters and buffers and, in a pure ("true")
            precision, that float inputs of ``forward`` are cast to. None: they stay as they are.
        compute_dtype: Dtype of ``torch.autocast`` around ``forward``. None: no autocast.
        reduce_dtype: Dtype in which sharded strategies reduce gradients. None: the gradients' own.
        output_dtype: Dtype that float outputs of ``forward`` are cast to. None: they stay as they are.
        loss_scale: Whether the loss is scaled against underflow of float16 gradients.
        convert: Changes layers of a model in place, at ``setup``, and returns handles whose ``remove()`` undoes it at
            release, or None where nothing is to be undone. None: layers stay.
        context: Makes a context that ``forward`` runs in, inside autocast; made for each call. None: there is none.
        device_type: The one kind of device that has it: ``"cuda"``. None: all do.
    """

    name: str
    param_dtype: torch.dtype | None = None
    compute_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    loss_scale: bool = False
    convert: Callable[[nn.Module], Sequence[Any] | None] | None = None
    context: Callable[[], AbstractContextManager[Any]] | None = None
    device_type: str | None = None

    def __post_init__(self) -> None:
        for option in ("convert", "context"):
            given = getattr(self, option)
            if given is not None and not callable(given):
                raise FabricTypeError(
                    f"{option} of a Precision is a function.",
                    given=f"Precision({self.name!r}, {option}={given!r:.80})",
                    fix="convert=lambda model: [...] or context=lambda: torch.no_grad(), each called when it is needed",
                )

    @property
    def is_mixed(self) -> bool:
        """Whether ``forward`` runs under autocast."""
        return self.compute_dtype is not None

    @property
    def changes_forward(self) -> bool:
        """Whether ``forward`` needs anything around it; not so in ``32-true``."""
        own = (self.param_dtype, self.output_dtype, self.context)
        return self.is_mixed or any(one is not None for one in own)

    def __str__(self) -> str:
        return self.name


def _true(name: str, dtype: torch.dtype) -> Precision:
    return Precision(name, param_dtype=dtype, reduce_dtype=dtype)


def _mixed(name: str, dtype: torch.dtype, *, loss_scale: bool = False) -> Precision:
    return Precision(
        name, compute_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32, loss_scale=loss_scale
    )


# In 32-true nothing is cast, as in a loop written by hand: a model is float32 unless its author chose otherwise.
PRECISIONS: dict[str, Precision] = {
    "64-true": _true("64-true", torch.float64),
    "32-true": Precision("32-true"),
    "16-true": _true("16-true", torch.float16),
    "bf16-true": _true("bf16-true", torch.bfloat16),
    "16-mixed": _mixed("16-mixed", torch.float16, loss_scale=True),
    "bf16-mixed": _mixed("bf16-mixed", torch.bfloat16),
}
# With layers changed into those of packages that are extras: what raises without one, and the precision.
_BY_EXTRAS: dict[str, tuple[Callable[[str], None], Precision]] = {
    "fp8-mixed": (check_torchao, dataclasses.replace(PRECISIONS["bf16-mixed"], name="fp8-mixed", convert=to_float8)),
    "nf4-weights": (
        check_torchao,
        dataclasses.replace(PRECISIONS["bf16-true"], name="nf4-weights", convert=LowBits("nf4")),
    ),
    "int8-weights": (
        check_torchao,
        dataclasses.replace(PRECISIONS["bf16-true"], name="int8-weights", convert=LowBits("int8")),
    ),
    "transformer-engine": (
        check_transformer_engine,
        dataclasses.replace(
            PRECISIONS["bf16-mixed"],
            name="transformer-engine",
            convert=to_transformer_engine,
            context=in_transformer_engine,
            device_type="cuda",
        ),
    ),
}
AMBIGUOUS_ALIASES = {"16": "16-mixed", "bf16": "bf16-mixed"}
_ALIASES = {"64": "64-true", "32": "32-true", **AMBIGUOUS_ALIASES}


def parse_precision(precision: str | int | Precision | None) -> Precision:
    """Return the :class:`Precision` that ``precision`` names; None is ``32-true``.

    Raises:
        FabricTypeError: ``precision`` is neither a name, nor an int, nor a ``Precision``.
        FabricValueError: The name is unknown; the message lists all.
        FabricImportError: It is one of a package that is not installed.
    """
    if precision is None:
        return PRECISIONS["32-true"]
    if isinstance(precision, Precision):
        return precision
    if not isinstance(precision, (str, int)) or isinstance(precision, bool):
        raise FabricTypeError(
            "precision must be a name, a number of bits or a Precision.",
            given=f"precision={precision!r}",
            fix=f"one of {', '.join(PRECISIONS)}",
        )
    name = str(precision).lower()
    name = _ALIASES.get(name, name)
    if name in _BY_EXTRAS:
        check, with_layers = _BY_EXTRAS[name]
        check(f"precision={precision!r}")
        return with_layers
    if name not in PRECISIONS:
        raise FabricValueError(
            "This precision does not exist.",
            given=f"precision={precision!r}",
            fix=f"one of {', '.join([*PRECISIONS, *_BY_EXTRAS])} (or {', '.join(_ALIASES)})",
        )
    return PRECISIONS[name]
