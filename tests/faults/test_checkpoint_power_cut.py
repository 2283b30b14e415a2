"""A power cut in the middle of a save, which drops what was not synced, leaves the old checkpoint or the new one."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fabric_lite.checkpoint import save
from tests.faults.conftest import Figures
from tests.faults.disk import Disk, State, written_out
from tests.faults.nursery import Nursery
from tests.faults.operations import Operation
from tests.faults.saves import Way, found, operations_of, saved, state_of

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the watch reads /proc/self/fd")

FILE, SHARDED = Way("full"), Way("sharded", ranks=2)
IN_TWO_STEPS = Way("sharded", ranks=2, in_two_steps=True)
NOTHING, SAME, OTHER_KIND = "new", "overwrite", "overwrite the other kind"
CELLS = [(way, before) for way in (FILE, SHARDED, IN_TWO_STEPS) for before in (NOTHING, SAME, OTHER_KIND)]
CELLS += [(Way("full", async_=True), SAME), (Way("sharded", ranks=2, async_=True), SAME)]
CELLS += [(Way("full", keep=1), SAME)]
SAMPLE = [(FILE, NOTHING), (FILE, SAME), (SHARDED, SAME)]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.mark.parametrize(
    ("way", "before", "every"),
    [(*cell, 6) for cell in SAMPLE] + [pytest.param(*cell, 1, marks=pytest.mark.full) for cell in CELLS],
    ids=str,
)
def test_a_power_cut_at_any_operation_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, nursery: Nursery, way: Way, before: str, every: int, figures: Figures
) -> None:
    folder, rebuilt = tmp_path / "now", tmp_path / "rebuilt"
    path, inside = folder / "runs" / "a" / "last", Path("runs/a/last")
    folder.mkdir()
    if before != NOTHING:
        other = Way("sharded" if way.kind == "full" else "full", way.ranks)
        for _ in range(way.keep or 1):
            saved(nursery, path, way if before == SAME else other, 1)
    disk = Disk(folder)
    operations = in_order(operations_of(nursery, folder, path, way, 2))
    old = None if before == NOTHING else 1
    cuts, checked = 0, 0
    for number, operation in enumerate([None, *operations]):
        if operation is not None:
            disk.do(operation)
        last = number == len(operations)
        if number % every and not last and (operation is None or operation.kind not in ("rename", "exchange")):
            continue
        cuts += 1
        for state in different(disk.states(limit=8 if way.keep else 256)):
            shutil.rmtree(rebuilt, ignore_errors=True)
            rebuilt.mkdir()
            written_out(state, rebuilt)
            assert found(rebuilt / inside, way) in ((2,) if last else (old, 2)), (operation, sorted(state))
            check_next_save(nursery, rebuilt / inside, way)
            checked += 1
    figures(f"power cut: {way}, {before}", cuts=cuts, states_of_the_disk=checked, lost=0, mixed=0, leftovers=0)


def check_next_save(nursery: Nursery, path: Path, way: Way) -> None:
    """It goes well, and leaves nothing of the one that the power cut interrupted."""
    if way.keep:
        saved(nursery, path, way, 3)
        assert found(path, way) == 3
        assert len(list(path.iterdir())) == way.keep
    else:
        save(path, state_of(3, ranks=1), state_dict_type=way.kind)
        assert [name.name for name in path.parent.iterdir()] == ["last"]


def test_the_model_of_the_disk_finds_what_was_not_synced(tmp_path: Path) -> None:
    """A program that renames before it syncs, and one that does not sync the folder: both can lose."""
    name, other = str(tmp_path / "new"), str(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"old")
    create, write = Operation("create", name), Operation("write", name, data=b"new")
    sync, rename, settle = Operation("sync", name), Operation("rename", name, other), Operation("sync", str(tmp_path))

    def contents(*operations: Operation) -> set[bytes | None]:
        disk = Disk(tmp_path)
        for operation in operations:
            disk.do(operation)
        return {state["a"] for state in disk.states()}

    assert contents(create, write, rename, settle) == {b"", b"n", b"new"}
    assert contents(create, write, sync, rename) == {b"old", b"new"}
    assert contents(create, write, sync, rename, settle) == {b"new"}
    assert contents(create, write, sync) == {b"old"}


def in_order(ranks: list[list[Operation]]) -> list[Operation]:
    """The operations of all ranks as they came."""
    return sorted((operation for own in ranks for operation in own), key=lambda operation: operation.when)


def different(states: Iterator[State]) -> Iterator[State]:
    """Each state once."""
    seen = set()
    for state in states:
        key = frozenset(state.items())
        if key not in seen:
            seen.add(key)
            yield state
