"""Whether a combination computes what one process computes that is fed the batches of all ranks put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fabric_lite.bench.files import record_file
from fabric_lite.bench.results import Comparison

__all__ = ["compared", "fed_to"]

# What rounding makes of a gradient, relative to its norm: some ten times the machine's epsilon of the dtype that the
# products are in, since errors add up over layers. The first steps of Adam divide by the gradient, so that what is next
# to nothing in it decides over the sign of a change: a small transformer in 32 bit is 4e-4 off where nothing is wrong.
_TOLERANCES = {"64-true": 1e-9, "32-true": 1e-4, "16-true": 5e-2, "16-mixed": 5e-2, "bf16-true": 0.1, "bf16-mixed": 0.1}
_CHANGES, _LARGEST_CHANGE = 100, 0.5
# So many times what one process in the same precision is off: several ranks round more often.
_ROUNDING = 2


def compared(folder: Path, ranks: int, reference: Path, precision: str, rounded: Path | None = None) -> Comparison:
    """Compare the records of the ranks in ``folder`` with the one of the reference.

    Relative differences are of norms over all parameters, the largest over the recorded steps.

    Args:
        folder: Of the ranks' records.
        ranks: How many there are.
        reference: Of the reference's.
        precision: Of the ranks, which says what rounding allows.
        rounded: Of a reference in that precision: how far that one is off shows what rounding does to this model.
    """
    own = [_read(folder, rank) for rank in range(ranks)]
    other = _read(reference, 0)
    reasons = [reason for record in (*own, other) for reason in record["reasons"]]
    if reasons:
        return Comparison("not comparable", reason=reasons[0])
    loss = max(map(_loss_difference, _means([record["losses"] for record in own]), _means([other["losses"]])))
    pairs = list(zip(own[0]["gradients"], other["gradients"], strict=False))
    gradient = max((_difference(mine, theirs) for mine, theirs in pairs), default=0.0)
    change = _difference(own[0]["changes"], other["changes"])
    tolerance = _TOLERANCES.get(precision, 0.1)
    if rounded is not None:
        pairs = list(zip(_read(rounded, 0)["gradients"], other["gradients"], strict=False))
        tolerance = max(tolerance, _ROUNDING * max((_difference(mine, theirs) for mine, theirs in pairs), default=0.0))
    reason = _reason(own, other, loss, gradient, change, tolerance)
    return Comparison("differs" if reason else "same", loss, gradient, change, tolerance, reason)


def fed_to(folder: Path, ranks: int) -> tuple[str, ...]:
    """What the ranks were fed, by digests; a run that was fed the same can have the same reference."""
    return tuple(str(_read(folder, rank)["fed"]) for rank in range(ranks))


def _reason(
    own: Sequence[Mapping[str, Any]],
    other: Mapping[str, Any],
    loss: float,
    gradient: float,
    change: float,
    tolerance: float,
) -> str:
    """What differs, in words; empty where nothing does."""
    first, *others = [record["sums"] for record in own]
    apart = next((number for number, sums in enumerate(others, 1) if sums != first), None)
    if apart is not None:
        return f"rank {apart} has other weights than rank 0"
    if len(own[0]["gradients"]) != len(other["gradients"]):
        return f"{len(own[0]['gradients'])} optimizer steps where the reference makes {len(other['gradients'])}"
    # Written so that a value that is not a number differs.
    if not gradient <= tolerance:
        return f"gradients are {gradient:.2g} off, relative to their norm"
    if not loss <= tolerance:
        return f"the loss is {loss:.2g} off"
    if not change <= min(_CHANGES * tolerance, _LARGEST_CHANGE):
        return f"the steps change the weights by {change:.2g} more or less than they should"
    return ""


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


def _loss_difference(mine: float, theirs: float) -> float:
    return abs(mine - theirs) / max(abs(theirs), 1e-12)


def _difference(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """The norm of the difference over the norm of ``theirs``; one where the parameters are not the same ones."""
    if mine.keys() != theirs.keys():
        return 1.0
    apart = sum(float((mine[name].double() - theirs[name].double()).square().sum()) for name in theirs)
    norm = sum(float(theirs[name].double().square().sum()) for name in theirs)
    return float((apart / norm) ** 0.5) if norm else float(apart > 0)
