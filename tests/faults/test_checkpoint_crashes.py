"""A save that is killed before or after any single operation of it leaves exactly the old checkpoint or the new one."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Figures
from tests.faults.nursery import Nursery
from tests.faults.operations import Operation
from tests.faults.saves import Kill, Way, found, interrupted, operations_of, saved

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the watch reads /proc/self/fd")

FILE, SHARDED = Way("full"), Way("sharded", ranks=2)
IN_TWO_STEPS = Way("sharded", ranks=2, in_two_steps=True)
ASYNC_FILE, ASYNC_SHARDED = Way("full", async_=True), Way("sharded", ranks=2, async_=True)
# What is there before.
NOTHING, SAME, OTHER_KIND = "new", "overwrite", "overwrite the other kind"
CELLS = [
    *itertools.product(
        [FILE, ASYNC_FILE, Way("full", ranks=2), SHARDED, ASYNC_SHARDED, IN_TWO_STEPS], [NOTHING, SAME, OTHER_KIND]
    ),
    *[
        (dataclasses.replace(way, keep=keep), SAME)
        for way in (FILE, ASYNC_FILE, SHARDED, ASYNC_SHARDED)
        for keep in (1, 3)
    ],
]
SAMPLE = [(FILE, NOTHING), (ASYNC_FILE, SAME), (SHARDED, SAME), (IN_TWO_STEPS, SAME), (CELLS[-8][0], SAME)]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


def kills(operations: list[list[Operation]], full: bool) -> list[Kill]:
    """Before and after every operation of every rank; of a sample, around those that put things in place."""
    chosen = []
    for rank, own in enumerate(operations):
        for number, operation in enumerate(own):
            if full:
                chosen += [Kill(rank, number, moment) for moment in ("before", "after")]
                chosen += [Kill(rank, number, "before", alone=True)] if len(operations) > 1 else []
            elif operation.kind in ("rename", "exchange"):
                chosen += [Kill(rank, number, moment) for moment in ("before", "after")]
            elif number % 9 == rank:
                chosen.append(Kill(rank, number, "before"))
    return chosen


@pytest.mark.parametrize(
    ("way", "before", "full"),
    [(*cell, False) for cell in SAMPLE] + [pytest.param(*cell, True, marks=pytest.mark.full) for cell in CELLS],
    ids=str,
)
def test_a_save_killed_at_any_operation_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, nursery: Nursery, way: Way, before: str, full: bool, figures: Figures
) -> None:
    prepared, folder = tmp_path / "prepared", tmp_path / "now"
    path = folder / "runs" / "a" / "last"
    prepared.mkdir()
    if before != NOTHING:
        other = Way("sharded" if way.kind == "full" else "full", way.ranks)
        for _ in range(way.keep or 1):
            saved(nursery, prepared / path.relative_to(folder), way if before == SAME else other, 1)
    shutil.copytree(prepared, folder)
    operations = operations_of(nursery, folder, path, way, 2)
    old = None if before == NOTHING else 1
    seen: list[int | None] = []
    for kill in kills(operations, full):
        shutil.rmtree(folder)
        shutil.copytree(prepared, folder)
        interrupted(nursery, folder, path, way, 2, kill)
        seen.append(found(path, way))
        assert seen[-1] in (old, 2), kill
        saved(nursery, path, dataclasses.replace(way, ranks=1, async_=False), 3)
        assert found(path, way) == 3
        left = sorted(name.name for name in (path if way.keep else path.parent).iterdir())
        if way.keep:
            left.remove("run.json")
            assert len(left) == way.keep, (kill, left)
            assert all(re.fullmatch(r"step-\d{7}", name) for name in left), (kill, left)
        else:
            assert left == ["last"], (kill, left)
    assert {old, 2} == set(seen), "the kills do not reach from the old one to the new one"
    figures(
        f"killed at an operation: {way}, {before}",
        operations=sum(map(len, operations)),
        kills=len(seen),
        old=seen.count(old),
        new=seen.count(2),
        lost=0,
        mixed=0,
        leftovers=0,
    )


_CALLS = {
    "openat": "create", "write": "write", "pwrite64": "write", "ftruncate": "truncate", "fsync": "sync",
    "mkdir": "mkdir", "rename": "rename", "renameat2": "exchange", "unlink": "unlink", "unlinkat": "unlink",
    "rmdir": "rmdir",
}  # fmt: skip
# What would change a folder and must not come up at all.
_OTHERS = [
    "fdatasync",
    "truncate",
    "link",
    "linkat",
    "symlink",
    "symlinkat",
    "renameat",
    "mkdirat",
    "writev",
    "pwritev",
]


@pytest.mark.full
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_the_operations_that_are_counted_are_those_that_the_system_sees(tmp_path: Path, kind: str) -> None:
    folder, log = tmp_path / "now", tmp_path / "strace.txt"
    folder.mkdir()
    traced = ["strace", "-f", "-y", "-e", f"trace={','.join([*_CALLS, *_OTHERS])}", "-o", str(log)]
    command = [*traced, sys.executable, "-c", _SAVE_TWICE, str(folder), kind]
    counted = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True).stdout.split()
    seen = []
    for line in log.read_text().splitlines():
        call = line.split(maxsplit=1)[1].split("(")[0]
        # Of a call that another thread interrupts, the first line counts.
        if str(folder) not in line or "resumed>" in line or (call == "openat" and "O_CREAT" not in line):
            continue
        assert call in _CALLS, line
        seen.append(_CALLS[call])
    assert seen == counted
    assert ("rename" if kind == "full" else "exchange") in counted


_SAVE_TWICE = """
import sys
from pathlib import Path
from tests.faults.operations import Watch
from tests.faults.saves import Way, save_number
watch = Watch(Path(sys.argv[1]))
for number in (1, 2):
    save_number(Path(sys.argv[1]) / "runs" / "a", Way(sys.argv[2]), number)
print(*(operation.kind for operation in watch.operations))
"""
