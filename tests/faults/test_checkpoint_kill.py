"""A process that is killed at any moment of a save leaves the old checkpoint or the new one."""

from __future__ import annotations

import itertools
import random
import signal
from pathlib import Path

import pytest
import torch

from fabric_lite.checkpoint import load, save
from fabric_lite.checkpoint.commit import is_temporary
from tests.faults.conftest import Figures
from tests.faults.nursery import Nursery


def save_for_ever(path: Path, first: int, log: Path) -> None:
    for number in itertools.count(first):
        save(path, {"number": number, "weights": [torch.full((100_000,), float(number)) for _ in range(5)]})
        with log.open("a") as file:
            file.write(f"{number}\n")


@pytest.mark.parametrize("kills", [5, pytest.param(300, marks=pytest.mark.full)])
def test_a_save_killed_at_a_random_moment_leaves_the_old_or_the_new_file(
    tmp_path: Path, kills: int, times: int, figures: Figures
) -> None:
    path, moments = tmp_path / "saves" / "a.ckpt", random.Random(0)
    number, unfinished = 0, 0
    with Nursery() as nursery:
        for trial in range(kills * times):
            log = tmp_path / f"saved-{trial}"
            ends = nursery.run(save_for_ever, path, number + 1, log, kill=(log, moments.uniform(0.0, 0.05)))
            assert [end.code for end in ends] == [-signal.SIGKILL], "it ended otherwise, not by the kill"
            reported = int((log.read_text().split() or [str(number)])[-1])
            content = load(path)  # compares the checksums
            number = content["number"]
            assert number in (reported, reported + 1)
            assert all(weight.eq(number).all() for weight in content["weights"])
            left = [name for name in path.parent.iterdir() if is_temporary(name.name)]
            assert len(left) <= 1
            unfinished += len(left)
    assert unfinished, "no kill came in the middle of a save: the test shows nothing"
    save(path, {"number": -1})
    assert [name.name for name in path.parent.iterdir()] == ["a.ckpt"]
    figures("SIGKILL at a random moment: file", kills=kills * times, within_a_save=unfinished, lost=0, mixed=0)
