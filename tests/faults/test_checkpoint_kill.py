"""A process that is killed at any moment of a save leaves the old checkpoint or the new one."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_lite.checkpoint import load, save
from fabric_lite.checkpoint.commit import is_temporary
from tests.faults.conftest import Figures


def save_for_ever(path: Path, first: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    for number in itertools.count(first):
        save(path, {"number": number, "weights": [torch.full((100_000,), float(number)) for _ in range(5)]})
        pipe.send(number)


def killed_at_random(path: Path, first: int, delay_seconds: float) -> int:
    """Save over and over, be killed after a delay; the last number that was reported as saved."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=save_for_ever, args=(path, first, sender))
    process.start()
    sender.close()
    reported = receiver.recv()
    deadline = time.monotonic() + delay_seconds
    while receiver.poll(max(0.0, deadline - time.monotonic())):
        reported = receiver.recv()
    process.kill()
    with contextlib.suppress(EOFError):
        while True:
            reported = receiver.recv()
    process.join()
    return int(reported)


@pytest.mark.parametrize("kills", [5, pytest.param(300, marks=pytest.mark.full)])
def test_a_save_killed_at_a_random_moment_leaves_the_old_or_the_new_file(
    tmp_path: Path, kills: int, times: int, figures: Figures
) -> None:
    path, moments = tmp_path / "a.ckpt", random.Random(0)
    number, unfinished = 0, 0
    for _ in range(kills * times):
        reported = killed_at_random(path, number + 1, moments.uniform(0.0, 0.05))
        content = load(path)  # compares the checksums
        number = content["number"]
        assert number in (reported, reported + 1)
        assert all(weight.eq(number).all() for weight in content["weights"])
        left = [name for name in tmp_path.iterdir() if is_temporary(name.name)]
        assert len(left) <= 1
        unfinished += len(left)
    assert unfinished, "no kill came in the middle of a save: the test shows nothing"
    save(path, {"number": -1})
    assert [name.name for name in tmp_path.iterdir()] == ["a.ckpt"]
    figures("SIGKILL at a random moment: file", kills=kills * times, within_a_save=unfinished, lost=0, mixed=0)
