"""Whether a combination computes what one process computes that is fed the batches of all ranks put together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fabric_lite.bench.files import record_file
from fabric_lite.bench.results import Comparison

__all__ = ["compared", "fed_to"]

# What rounding makes of a gradient, relative to its norm: some ten times the machine's epsilon of the dtype that the
# products are in, since errors add up over layers.
_TOLERANCES = {"64-true": 1e-9, "32-true": 1e-4, "16-true": 5e-2, "16-mixed": 5e-2, "bf16-true": 0.1, "bf16-mixed": 0.1}
# Some models round more. So many times what one process in the same precision is off is allowed, since several ranks
# round more often. Where that is more than a quarter of the gradients (what one of four ranks' make)
# or half of the changes (every second step), what is allowed is not said to be the same: a mistake could hide there.
_ROUNDING = 2
_LARGEST_GRADIENT, _LARGEST_CHANGE = 0.25, 0.5


@dataclasses.dataclass(frozen=True)
class _Off:
    """How far a record is off a reference: relative differences, of norms over all parameters, largest of all steps."""

    loss: float
    gradient: float
    change: float


def compared(folder: Path, ranks: int, reference: Path, precision: str, rounded: Path | None = None) -> Comparison:
    """Compare the records of the ranks in ``folder`` with the one of the reference.

    Each difference is the one to the nearer of the references. The loss may be off by what the precision's rounding
    does to any model, gradients and changes by twice what it does to this one if that is known and more.

    Args:
        folder: Of the ranks' records.
        ranks: How many there are.
        reference: Of the reference's.
        precision: Of the ranks, which says what rounding allows.
        rounded: Of a reference in that precision: how far that one is off shows what rounding does to this model. It
            is left aside where it is not comparable itself.
    """
    own = [_read(folder, rank) for rank in range(ranks)]
    other = _read(reference, 0)
    # Needs no reference, so it is seen where nothing else can be compared.
    if apart := _apart(own):
        return Comparison("differs", reason=apart)
    reasons = [reason for record in (*own, other) for reason in record["reasons"]]
    if not _is_finite(other):
        reasons.append("what one process computes is not finite")
    if reasons:
        return Comparison("not comparable", reason=reasons[0])
    off, rounding = _off(own, other), _Off(0.0, 0.0, 0.0)
    usable = None if rounded is None else _usable(_read(rounded, 0), other)
    if usable is not None:
        off, rounding = _nearer(off, _off(own, usable)), _off([usable], other)
    table = _TOLERANCES.get(precision, 0.1)
    steps, theirs = len(own[0]["gradients"]), len(other["gradients"])
    if steps != theirs:
        verdict, reason = "differs", f"{steps} optimizer steps where the reference makes {theirs}"
    else:
        verdict, reason = _judged(off, rounding, table)
    return Comparison(verdict, off.loss, off.gradient, off.change, max(table, _ROUNDING * rounding.gradient), reason)


def fed_to(folder: Path, ranks: int) -> tuple[str, ...]:
    """What the ranks were fed, by digests; a run that was fed the same can have the same reference."""
    return tuple(str(_read(folder, rank)["fed"]) for rank in range(ranks))


def _judged(off: _Off, rounding: _Off, table: float) -> tuple[str, str]:
    """The verdict, with its reason in words. Written so that a value that is not a number differs."""
    # The first steps of Adam change each weight by the sign of its gradient. Where gradients are off by some share of
    # their norm, about that share of the signs is the other one, and a norm is the root of that.
    table_of_changes = math.sqrt(table)
    gradient, change = max(table, _ROUNDING * rounding.gradient), max(table_of_changes, _ROUNDING * rounding.change)
    if not off.gradient <= gradient:
        return "differs", f"gradients are {off.gradient:.2g} of their norm off, where rounding allows {gradient:.2g}"
    if not off.loss <= table:
        return "differs", f"the loss is {off.loss:.2g} of itself off, where rounding allows {table:.2g}"
    if not off.change <= change:
        return (
            "differs",
            f"the steps' change is {off.change:.2g} of its norm off, where rounding allows {change:.2g}",
        )
    if off.gradient > table and gradient > _LARGEST_GRADIENT:
        moved = f"the gradients by {rounding.gradient:.2g} of their norm"
    elif off.change > table_of_changes and change > _LARGEST_CHANGE:
        moved = f"what the steps change by {rounding.change:.2g} of its norm"
    else:
        return "same", ""
    return "not comparable", f"rounding alone moves {moved} in this precision"


def _off(own: Sequence[Mapping[str, Any]], other: Mapping[str, Any]) -> _Off:
    """How far the ranks' records are off that of one process."""
    losses = zip(_means([record["losses"] for record in own]), _means([other["losses"]]), strict=False)
    gradients = zip(own[0]["gradients"], other["gradients"], strict=False)
    return _Off(
        loss=_worst(_loss_difference(mine, theirs) for mine, theirs in losses),
        gradient=_worst(_difference(mine, theirs) for mine, theirs in gradients),
        change=_difference(own[0]["changes"], other["changes"]),
    )


def _nearer(one: _Off, two: _Off) -> _Off:
    return _Off(min(one.loss, two.loss), min(one.gradient, two.gradient), min(one.change, two.change))


def _usable(rounded: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The rounded reference, unless its steps are others or its numbers are none, which says nothing of rounding."""
    is_comparable = not rounded["reasons"] and len(rounded["gradients"]) == len(other["gradients"])
    return rounded if is_comparable and _is_finite(rounded) else None


def _is_finite(record: Mapping[str, Any]) -> bool:
    numbers = [loss for losses in record["losses"] for loss in losses]
    tensors = [tensor for named in (*record["gradients"], record["changes"]) for tensor in named.values()]
    return all(map(math.isfinite, numbers)) and all(bool(tensor.isfinite().all()) for tensor in tensors)


def _apart(own: Sequence[Mapping[str, Any]]) -> str:
    """Which rank has other weights than the first, in words; empty where none has. Rounding has no part in that."""
    # As text, in which what is not a number equals itself.
    first, *others = [{name: repr(total) for name, total in record["sums"].items()} for record in own]
    apart = next((number for number, sums in enumerate(others, 1) if sums != first), None)
    return "" if apart is None else f"rank {apart} has other weights than rank 0"


def _read(folder: Path, rank: int) -> dict[str, Any]:
    record: dict[str, Any] = torch.load(record_file(folder, rank), weights_only=True)
    return record


def _means(of_ranks: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    """The mean loss of each step over all ranks and all backwards of the step."""
    steps = zip(*of_ranks, strict=True)
    return [_mean(loss for losses in of_step for loss in losses) for of_step in steps]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def _worst(differences: Iterable[float]) -> float:
    """The largest; not a number where one of them is none, which ``max`` would pass over."""
    found = list(differences)
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def _loss_difference(mine: float, theirs: float) -> float:
    return abs(mine - theirs) / max(abs(theirs), 1e-12)


def _difference(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """The norm of the difference over the norm of ``theirs``; one where the parameters are not the same ones."""
    if mine.keys() != theirs.keys():
        return 1.0
    apart = sum(float((mine[name].double() - theirs[name].double()).square().sum()) for name in theirs)
    norm = sum(float(theirs[name].double().square().sum()) for name in theirs)
    return float((apart / norm) ** 0.5) if norm else float(apart > 0)
