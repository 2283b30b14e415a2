"""Records of two runs held against each other: what rounding allows, and what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fabric_lite.bench.comparison import compared
from fabric_lite.bench.files import record_file


def recorded(
    folder: Path, *, gradient_off: float = 0.0, loss: float = 1.0, weights: float = 4.0, rank: int = 0
) -> Path:
    """A record of one step of four weights, whose gradient is off by so much of its norm."""
    folder.mkdir(exist_ok=True)
    gradient = torch.tensor([1.0, 1.0, 1.0, 1.0 + 2 * gradient_off])
    record = {
        "data_rank": rank,
        "batches": {},
        "losses": [[loss]],
        "gradients": [{"0.weight": gradient}] if rank == 0 else [],
        "changes": {"0.weight": -0.1 * gradient} if rank == 0 else {},
        "sums": {"0.weight": weights},
        "reasons": [],
        "fed": "",
    }
    torch.save(record, record_file(folder, rank))
    return folder


@pytest.mark.parametrize(
    ("precision", "off", "of_rounded", "verdict"),
    [
        ("32-true", 1e-5, None, "same"),
        ("32-true", 1e-3, None, "differs"),
        ("bf16-mixed", 0.05, None, "same"),
        ("bf16-mixed", 0.15, None, "differs"),
        ("bf16-mixed", 0.15, 0.1, "same"),  # a model of which one process rounds as much
        ("bf16-mixed", 0.15, 0.01, "differs"),
        ("bf16-mixed", 0.25, 0.1, "differs"),
    ],
)
def test_a_gradient_may_be_off_by_what_rounding_does_to_this_model(
    tmp_path: Path, precision: str, off: float, of_rounded: float | None, verdict: str
) -> None:
    own, reference = recorded(tmp_path / "own", gradient_off=off), recorded(tmp_path / "reference")
    rounded = None if of_rounded is None else recorded(tmp_path / "rounded", gradient_off=of_rounded)
    found = compared(own, 1, reference, precision, rounded)
    assert found.verdict == verdict, found
    assert found.gradient == pytest.approx(off, rel=1e-2)  # float32


def test_ranks_with_other_weights_and_another_loss_are_found(tmp_path: Path) -> None:
    own, reference = recorded(tmp_path / "own"), recorded(tmp_path / "reference")
    recorded(own, rank=1)
    assert compared(own, 2, reference, "32-true").verdict == "same"
    recorded(own, rank=1, weights=4.5)
    assert compared(own, 2, reference, "32-true").reason == "rank 1 has other weights than rank 0"
    assert "the loss is" in compared(recorded(tmp_path / "other", loss=1.1), 1, reference, "32-true").reason
    assert compared(recorded(tmp_path / "nan", gradient_off=float("nan")), 1, reference, "32-true").verdict == "differs"
