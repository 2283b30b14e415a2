"""A rank that fails, in any way: who, of what and where is said at once, in ten lines, and nothing outlives the job."""

from __future__ import annotations

import itertools
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.launching import FABRIC_RUN, kill, processes_in, started, wait_until, write
from tests.distributed.test_launch_nodes import free_port
from tests.faults.conftest import Figures

SCRIPT = """
import ctypes, os, pathlib, sys, time
import torch

def fail(how):
    pathlib.Path("died").write_text(str(time.monotonic()))
    if how == "exception":
        raise ValueError("boom")
    if how == "exit":
        sys.exit(3)
    if how == "SIGKILL":
        os.kill(os.getpid(), 9)
    if how == "segfault":
        ctypes.string_at(0)
    os.abort()

if __name__ == "__main__":
    how, world_size, victim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    from fabric_lite import Fabric
    fabric = Fabric(accelerator="cpu", devices=world_size, strategy="ddp")
    fabric.launch()
    model = fabric.setup(torch.nn.Linear(10, 10))
    dataset = torch.utils.data.TensorDataset(torch.ones(10_000, 10))
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(dataset, num_workers=1))
    for step in range(1_000_000):
        for (batch,) in loader:
            fabric.backward(model(batch).sum())
            if step == 0:
                pathlib.Path(f"ready{fabric.global_rank}").touch()
            if how != "wait" and fabric.global_rank == victim:
                fail(how)
            step += 1
"""
CAUSES = {
    "exception": ("ValueError: boom", 1),
    "exit": ("exit code 3", 3),
    "SIGKILL": ("killed by SIGKILL", 137),
    "segfault": ("killed by SIGSEGV", 139),
    "abort": ("killed by SIGABRT", 134),
}
PLACES = [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]


def commands(script: Path, how: str, world_size: int, victim: int) -> dict[str, list[object]]:
    words = [script, how, world_size, victim]
    return {
        "fabric-run": [*FABRIC_RUN, "--accelerator", "cpu", "--devices", world_size, *words],
        "in-script": [sys.executable, *words],
    }


def trials_in(folder: Path, trials: int) -> Iterator[tuple[int, Path]]:
    """Number the trials, each with an empty folder of its own."""
    for trial in range(trials):
        (folder / str(trial)).mkdir()
        yield trial, folder / str(trial)


def seconds_until_nothing_is_left(folder: Path) -> float:
    began = time.monotonic()
    wait_until(lambda: not processes_in(folder), f"{processes_in(folder)} end", limit_seconds=10.0)
    return time.monotonic() - began


def fail_once(folder: Path, way: str, how: str, place: tuple[int, int]) -> dict[str, float]:
    """Run the script, whose rank ``place[1]`` of ``place[0]`` fails; compare what is said; seconds from the death."""
    folder.mkdir()
    script = write(folder, SCRIPT)
    cause, code = CAUSES[how]
    with started(*commands(script, how, *place)[way], cwd=folder) as process:
        assert process.stderr is not None
        while (first := process.stderr.readline()).startswith("fabric_lite: "):
            pass  # notices of a run that still goes well
        said = time.monotonic()
        lines = [first, *process.stderr.read().splitlines()]
        ended = time.monotonic()
        process.wait()
    assert process.returncode == code, lines
    left = seconds_until_nothing_is_left(folder)
    assert first == f"fabric-run: rank {place[1]} failed: {cause}\n", lines
    assert len(lines) <= 10, lines
    if how != "SIGKILL":
        assert re.fullmatch(rf"  at {re.escape(str(script))}:\d+, in fail", lines[1]), lines
    (logs,) = {match for line in lines for match in re.findall(r"/\S*/fabric_run_\w+", line)}
    shutil.rmtree(logs)
    died = float((folder / "died").read_text())
    return {"said": said - died, "ended": ended - died, "left": left, "lines": len(lines)}


@pytest.mark.parametrize(
    ("how", "trials"),
    [
        *((how, 1) for how in ("exception", "SIGKILL", "segfault")),
        *(pytest.param(how, 20, marks=pytest.mark.full) for how in CAUSES),
    ],
)
def test_a_rank_that_fails_is_named_with_its_cause_and_the_users_line(
    tmp_path: Path, figures: Figures, how: str, trials: int
) -> None:
    # One trial for each way to fail is at another rank for each.
    places = itertools.islice(itertools.cycle(PLACES), list(CAUSES).index(how), list(CAUSES).index(how) + trials)
    seen = [fail_once(tmp_path / str(number), "fabric-run", how, place) for number, place in enumerate(places)]
    p95 = sorted(each["said"] for each in seen)[int(0.95 * (trials - 1))]
    gone = max(each["ended"] + each["left"] for each in seen)
    assert p95 <= (1.0 if trials > 1 else 5.0), seen
    assert gone <= (2.0 if trials > 1 else 10.0), seen
    most = int(max(each["lines"] for each in seen))
    values = {"trials": trials, "seconds_p95": round(p95, 2), "seconds_until_nothing_is_left": round(gone, 2)}
    figures(f"a rank fails: {how}", **values, lines_at_most=most, orphans=0)


def test_a_program_that_starts_its_ranks_itself_says_the_same(tmp_path: Path) -> None:
    fail_once(tmp_path / "run", "in-script", "segfault", (2, 1))


@pytest.mark.parametrize("trials", [1, pytest.param(10, marks=pytest.mark.full)])
def test_both_of_two_nodes_name_the_rank_that_failed_first(tmp_path: Path, figures: Figures, trials: int) -> None:
    most = 0
    for trial, folder in trials_in(tmp_path, trials):
        script, how, victim = write(folder, SCRIPT), [*CAUSES][(trial + 2) % len(CAUSES)], (trial + 1) % 2
        meeting = ["--num-nodes", 2, "--main-address", "127.0.0.1", "--main-port", free_port()]
        command = [*FABRIC_RUN, "--accelerator", "cpu", "--devices", 1, *meeting, "--node-rank"]
        with started(*command, 0, script, how, 1, victim, cwd=folder) as first:  # noqa: SIM117
            with started(*command, 1, script, how, 1, victim, cwd=folder) as second:
                said = [process.communicate(timeout=60)[1].splitlines() for process in (first, second)]
        cause, code = CAUSES[how]
        processes = [first, second]
        assert processes[victim].returncode == code, said
        assert processes[1 - victim].returncode != 0, said
        lines = [[line for line in each if not line.startswith("fabric_lite: ")] for each in said]
        assert lines[victim][0] == f"fabric-run: rank {victim} failed: {cause}", said
        assert lines[1 - victim] == [f"fabric-run: ended because on node {victim} rank {victim} failed: {cause}"], said
        most = max(most, *map(len, lines))
        assert most <= 10
        seconds_until_nothing_is_left(folder)
    figures("a rank of two nodes fails", trials=trials, named_on_both=trials, lines_at_most=most, orphans=0)


@pytest.mark.parametrize("trials", [1, pytest.param(20, marks=pytest.mark.full)])
def test_nothing_outlives_a_launcher_that_is_killed(tmp_path: Path, figures: Figures, trials: int) -> None:
    slowest = 0.0
    for trial, folder in trials_in(tmp_path, trials):
        way = ("fabric-run", "in-script")[trial % 2]
        with started(*commands(write(folder, SCRIPT), "wait", 2, 0)[way], cwd=folder) as process:
            wait_until(lambda: all((folder / f"ready{rank}").exists() for rank in (0, 1)), "ranks train")  # noqa: B023
            # the launcher, the server, the store's keeper, two ranks and their workers
            assert len(processes_in(folder)) == 7, processes_in(folder)
            kill(process.pid)
            process.wait()
            slowest = max(slowest, seconds_until_nothing_is_left(folder))
    assert slowest <= (2.0 if trials > 1 else 10.0)
    figures("the launcher is killed", trials=trials, seconds_until_nothing_is_left=round(slowest, 2), orphans=0)
