"""A run that was stopped and goes on is bit for bit the run in one go."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from fabric_lite.testing import RankPool
from tests.distributed.layouts import pairwise
from tests.faults import resuming
from tests.faults.conftest import Figures
from tests.faults.resuming import Cell

CELLS = list(
    itertools.product(("ddp", "fsdp"), ("32-true", "bf16-mixed"), (0, 2), resuming.DATA, (1, 4), resuming.STOPS)
)


def cells_of(strategy: str, precision: str, is_full: bool) -> dict[Cell, list[str]]:
    """The stops of each run."""
    chosen: dict[Cell, list[str]] = {}
    for cell in CELLS if is_full else pairwise(CELLS):
        if cell[:2] == (strategy, precision):
            chosen.setdefault(Cell(*cell[:-1]), []).append(cell[-1])
    return chosen


@pytest.mark.parametrize(
    "is_full", [pytest.param(False, id="pairs"), pytest.param(True, id="all", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_stopped_anywhere_a_run_goes_on_bit_for_bit(
    ranks: RankPool, tmp_path: Path, figures: Figures, strategy: str, precision: str, is_full: bool
) -> None:
    chosen = cells_of(strategy, precision, is_full)
    wrong: list[Any] = []
    repeated = skipped = 0
    for number, (cell, stops) in enumerate(chosen.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for rank, results in enumerate(ranks.run(resuming.compare, cell, stops, str(folder), ranks=cell.ranks)):
            wrong += [(cell, rank, result) for result in results if result["differing"]]
            repeated += sum(result["repeated"] for result in results)
            skipped += sum(result["skipped"] for result in results)
    assert not wrong
    assert (repeated, skipped) == (0, 0)
    count = sum(map(len, chosen.values()))
    figures(f"exact resume: {strategy}, {precision}", cells=count, bitwise=count, repeated=repeated, skipped=skipped)


def test_every_cell_of_the_table_is_run_and_every_pair_of_values_in_plain_pytest() -> None:
    pairs = list(itertools.product(("ddp", "fsdp"), ("32-true", "bf16-mixed")))
    assert sum(len(stops) for pair in pairs for stops in cells_of(*pair, is_full=True).values()) == 256
    assert sum(len(stops) for pair in pairs for stops in cells_of(*pair, is_full=False).values()) >= 16
