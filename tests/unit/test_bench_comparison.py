"""Records of two runs held against each other: what rounding allows, and what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_lite.bench.comparison import compared
from fabric_lite.bench.files import record_file


def recorded(
    folder: Path,
    *,
    gradient_off: float | tuple[float, ...] = 0.0,
    change_off: float | None = None,
    loss: float = 1.0,
    weights: float = 4.0,
    rank: int = 0,
    reasons: tuple[str, ...] = (),
) -> Path:
    """A record of steps of four weights, whose gradients are off by so much of their norm, one a step.

    The changes are off as the first gradient is, if nothing else is said.
    """
    folder.mkdir(exist_ok=True)
    all_off = gradient_off if isinstance(gradient_off, tuple) else (gradient_off,)
    record = {
        "data_rank": rank,
        "batches": {},
        "losses": [[loss] for _ in all_off],
        "gradients": [{"0.weight": off_by(off)} for off in all_off] if rank == 0 else [],
        "changes": {"0.weight": -0.1 * off_by(all_off[0] if change_off is None else change_off)} if rank == 0 else {},
        "sums": {"0.weight": weights},
        "reasons": list(reasons),
        "fed": "",
    }
    torch.save(record, record_file(folder, rank))
    return folder


def off_by(share: float) -> torch.Tensor:
    return torch.tensor([1.0, 1.0, 1.0, 1.0 + 2 * share])


@pytest.mark.parametrize(
    ("precision", "off", "of_rounded", "verdict"),
    [
        ("32-true", 1e-5, None, "same"),
        ("32-true", 1e-3, None, "differs"),
        ("bf16-mixed", 0.05, None, "same"),
        ("bf16-mixed", 0.15, None, "differs"),
        ("bf16-mixed", -0.1, 0.12, "same"),  # a model of which one process rounds as much
        ("bf16-mixed", -0.15, 0.01, "differs"),
        ("bf16-mixed", -0.25, 0.12, "differs"),
        ("bf16-mixed", 0.45, 0.4, "same"),  # close to what one process in this precision computes
        ("bf16-mixed", -0.05, 0.4, "same"),  # close to what one process in full precision computes
        ("bf16-mixed", -0.5, 0.4, "not comparable"),
        ("bf16-mixed", -0.9, 0.4, "differs"),
    ],
)
def test_a_gradient_may_be_off_by_what_rounding_does_to_this_model(
    tmp_path: Path, precision: str, off: float, of_rounded: float | None, verdict: str
) -> None:
    own = recorded(tmp_path / "own", gradient_off=off, change_off=0.0)
    reference = recorded(tmp_path / "reference")
    rounded = None if of_rounded is None else recorded(tmp_path / "rounded", gradient_off=of_rounded, change_off=0.0)
    found = compared(own, 1, reference, precision, rounded)
    assert found.verdict == verdict, found
    if verdict == "not comparable":
        assert found.reason == "rounding alone moves the gradients by 0.4 of their norm in this precision"


@pytest.mark.parametrize(
    ("off", "of_rounded", "verdict"),
    [
        (0.3, 0.0, "same"),  # Adam's first steps make a root of what a gradient is off
        (0.35, 0.0, "differs"),
        (-0.35, 0.2, "same"),
        (-0.45, 0.2, "differs"),
        (-0.5, 0.4, "not comparable"),
    ],
)
def test_changes_may_be_off_by_more(tmp_path: Path, off: float, of_rounded: float, verdict: str) -> None:
    own, reference = recorded(tmp_path / "own", change_off=off), recorded(tmp_path / "reference")
    rounded = recorded(tmp_path / "rounded", change_off=of_rounded)
    found = compared(own, 1, reference, "bf16-mixed", rounded)
    assert found.verdict == verdict, found
    assert verdict != "not comparable" or "what the steps change by 0.4 of its norm" in found.reason


def test_rounding_excuses_neither_ranks_nor_steps_nor_the_loss(tmp_path: Path) -> None:
    reference, rounded = recorded(tmp_path / "reference"), recorded(tmp_path / "rounded", gradient_off=0.4)
    own = recorded(tmp_path / "own", gradient_off=-0.5)
    assert compared(own, 1, reference, "bf16-mixed", rounded).verdict == "not comparable"
    recorded(own, rank=1, weights=4.5)
    assert "rank 1 has other weights" in compared(own, 2, reference, "bf16-mixed", rounded).reason
    more = recorded(tmp_path / "more", gradient_off=(-0.5, 0.0))
    assert "2 optimizer steps" in compared(more, 1, reference, "bf16-mixed", rounded).reason
    loss = recorded(tmp_path / "loss", gradient_off=-0.5, loss=1.15)
    assert compared(loss, 1, reference, "bf16-mixed", rounded).reason.startswith("the loss is 0.15 of itself off")


@pytest.mark.parametrize(
    "unusable",
    [
        {"gradient_off": 0.15, "reasons": ("a step was skipped by the loss scaler",)},
        {"gradient_off": float("nan")},
        {"gradient_off": (0.0, float("nan")), "change_off": 0.0},
        {"gradient_off": float("inf")},
        {"gradient_off": (0.15, 0.15, 0.15)},
        {"gradient_off": 0.15, "loss": float("nan")},
    ],
)
def test_a_rounded_reference_that_is_not_comparable_itself_allows_nothing(
    tmp_path: Path, unusable: dict[str, Any]
) -> None:
    own, reference = recorded(tmp_path / "own", gradient_off=(0.15, 0.15)), recorded(tmp_path / "reference")
    recorded(reference, gradient_off=(0.0, 0.0))
    found = compared(own, 1, reference, "bf16-mixed", recorded(tmp_path / "rounded", **unusable))
    assert (found.verdict, found.tolerance) == ("differs", 0.1), found


def test_ranks_with_other_weights_and_another_loss_are_found(tmp_path: Path) -> None:
    own, reference = recorded(tmp_path / "own"), recorded(tmp_path / "reference")
    recorded(own, rank=1)
    assert compared(own, 2, reference, "32-true").verdict == "same"
    recorded(own, rank=1, weights=4.5)
    assert compared(own, 2, reference, "32-true").reason == "rank 1 has other weights than rank 0"
    assert "the loss is" in compared(recorded(tmp_path / "other", loss=1.1), 1, reference, "32-true").reason
    assert compared(recorded(tmp_path / "nan", gradient_off=float("nan")), 1, reference, "32-true").verdict == "differs"
    later = recorded(tmp_path / "later", gradient_off=(0.0, float("nan")))
    finite = recorded(tmp_path / "finite", gradient_off=(0.0, 0.0))
    assert compared(finite, 1, later, "32-true").reason == "what one process computes is not finite"
    assert compared(later, 1, recorded(reference, gradient_off=(0.0, 0.0)), "32-true").verdict == "differs"


def test_ranks_that_have_drifted_apart_are_found_where_nothing_else_can_be_compared(tmp_path: Path) -> None:
    own = recorded(tmp_path / "own", reasons=("the steps draw random numbers",))
    reference = recorded(tmp_path / "reference")
    recorded(own, rank=1)
    assert compared(own, 2, reference, "32-true").verdict == "not comparable"
    recorded(own, rank=1, weights=4.5)
    assert compared(own, 2, reference, "32-true").reason == "rank 1 has other weights than rank 0"
    recorded(own, weights=float("nan"))
    recorded(own, rank=1, weights=float("nan"))
    assert compared(own, 2, reference, "32-true").verdict == "same"  # what is not a number is the same on both
