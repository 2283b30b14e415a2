"""A run that was stopped and goes on is bit for bit the run in one go."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from fabric_lite.testing import RankPool
from tests.distributed.launching import fabric_run, write
from tests.distributed.layouts import pairs_of, pairwise
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
@pytest.mark.timeout(1200)
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


@pytest.mark.parametrize("data", ["shuffled map", "weighted sampler"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_saved_within_a_window_a_run_without_dropout_goes_on_bit_for_bit_from_before_it(
    ranks: RankPool, tmp_path: Path, figures: Figures, strategy: str, data: str
) -> None:
    # Random numbers of the ranks themselves are those of the moment: only what workers draw belongs to a batch.
    cell = Cell(strategy, "32-true", 2, data, 4, dropout=0.0)
    results = ranks.run(resuming.compare_within_a_window, cell, str(tmp_path), ranks=2)
    assert [result.pop("said") for result in results] == [1, 0]
    assert all(result == {"stop": "within", "differing": [], "repeated": 0, "skipped": 0} for result in results)
    figures(f"exact resume within a window, no dropout: {strategy}, {data}", cells=1, bitwise=1, repeated=0, skipped=0)


WORLDS = list(itertools.product((1, 2, 3, 4), repeat=2))


@pytest.mark.parametrize("is_full", [False, pytest.param(True, marks=pytest.mark.full)], ids=["few", "all"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_at_another_world_size_the_state_is_the_same_and_the_rest_of_the_epoch_is_seen_once(
    ranks: RankPool, tmp_path: Path, figures: Figures, strategy: str, is_full: bool
) -> None:
    few = [(1, 2), (2, 3), (3, 1), (2, 2)] if strategy == "ddp" else [(2, 1), (3, 2), (1, 3), (3, 3)]
    worlds = WORLDS if is_full else few
    saved: dict[int, Any] = {}
    for old, new in worlds:
        path = str(tmp_path / f"{old}.ckpt")
        cell = Cell(strategy, "32-true", 0, "shuffled map", 1)
        if old not in saved:
            before = dataclasses.replace(cell, ranks=old)
            saved[old] = ranks.run(resuming.save_midway, before, path, 2, ranks=old)
        after = ranks.run(resuming.go_on_elsewhere, dataclasses.replace(cell, ranks=new), path, ranks=new)
        for name in ("weights", "moments"):
            assert len({result[name] for result in saved[old] + after}) == 1, f"{name}, from {old} to {new} ranks"
        seen = [index for result in saved[old] for index in result["seen"]]
        rest = [index for result in after for index in result["rest"]]
        assert len(seen) == old * 2 * 2
        assert sorted(seen + rest) == list(range(resuming.SAMPLES)), f"from {old} to {new} ranks"
        assert len({result["batches"] for result in after}) == 1, "every rank has as many batches"
        assert {(result["place"].repeated, result["place"].skipped) for result in after} == {(0, 0)}
    count = len(worlds)
    figures(f"resume at another world size: {strategy}", cells=count, states_equal=count, repeated=0, skipped=0)


SCRIPT = """
    import json, sys

    sys.path.insert(0, {root!r})
    from tests.faults.resuming import Cell, Run

    is_resumed = sys.argv[1] == "resume"
    run, trace, first = Run(Cell("fsdp", "bf16-mixed", 2, "shuffled map", 1)), [], 0
    if is_resumed:
        run.state.update(run.fabric.load("saved", run.state))
    for epoch, batch, _ in run.batches(trace):
        if (epoch, batch) == (1, 5) and not is_resumed:
            run.fabric.save("saved", run.state)
            first = len(trace)
    with open(f"{{sys.argv[1]}}-{{run.fabric.global_rank}}.json", "w") as file:
        json.dump([trace[first:], run.ends()], file)
    run.fabric.close()
"""


def test_new_processes_go_on_bit_for_bit(tmp_path: Path, figures: Figures) -> None:
    script = write(tmp_path, SCRIPT.format(root=str(Path(__file__).parents[2])))
    for word in ("whole", "resume"):
        result = fabric_run("--devices", 2, script, word, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    for rank in range(2):
        whole, resumed = (json.loads((tmp_path / f"{word}-{rank}.json").read_text()) for word in ("whole", "resume"))
        assert resumed == whole
    figures("exact resume in new processes", cells=1, bitwise=1)


def test_every_cell_of_the_table_is_run_and_every_pair_of_values_in_plain_pytest() -> None:
    def run(*, is_full: bool) -> list[tuple[Any, ...]]:
        pairs = itertools.product(("ddp", "fsdp"), ("32-true", "bf16-mixed"))
        stops = [item for pair in pairs for item in cells_of(*pair, is_full).items()]
        return [(*dataclasses.astuple(cell)[: len(CELLS[0]) - 1], stop) for cell, each in stops for stop in each]

    assert sorted(run(is_full=True)) == sorted(CELLS)
    assert len(CELLS) == 320
    assert set().union(*map(pairs_of, run(is_full=False))) == set().union(*map(pairs_of, CELLS))
