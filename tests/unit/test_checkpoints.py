"""Which checkpoints of a run there are, which are kept, and where it goes on."""

from __future__ import annotations

import dataclasses
import math
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_lite import EXIT_PREEMPTED, CheckpointError, Checkpoints, Fabric
from fabric_lite.errors import FabricKeyError, FabricTypeError, FabricValueError


@dataclasses.dataclass
class Run:
    """A small run: a linear model, SGD with momentum, a shuffled loader of 6 batches."""

    fabric: Fabric
    state: dict[str, Any]

    @staticmethod
    def begin() -> Run:
        torch.manual_seed(0)
        fabric = Fabric(accelerator="cpu", devices=1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model, optimizer = fabric.setup(model, optimizer)
        loader = fabric.setup_dataloaders(
            DataLoader(TensorDataset(torch.arange(36.0).reshape(12, 3) / 36), batch_size=2, shuffle=True)
        )
        state = {"fabric": fabric, "model": model, "optimizer": optimizer, "loader": loader, "epoch": 0}
        run = Run(fabric, state)
        begun.append(run)
        return run

    def steps(self, count: int) -> None:
        """Make optimizer steps without looking at data."""
        for _ in range(count):
            self.state["optimizer"].step()

    def train(self, epochs: int, after_step: Callable[[Run], None]) -> None:
        """The loop of a script."""
        model, optimizer = self.state["model"], self.state["optimizer"]
        while self.state["epoch"] < epochs:
            for (batch,) in self.state["loader"]:
                optimizer.zero_grad()
                self.fabric.backward(model(batch).square().mean())
                optimizer.step()
                after_step(self)
            self.state["epoch"] += 1

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.state["model"].parameters()]


begun: list[Run] = []


@pytest.fixture(autouse=True)
def no_handlers_left() -> Iterator[None]:
    yield
    while begun:
        begun.pop().fabric.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.fixture
def run() -> Run:
    return Run.begin()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "run.json")


def flip_a_byte(path: Path) -> None:
    """Damage the data of a checkpoint file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_checkpoint_every_so_many_steps_of_which_the_newest_are_kept(run: Run, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "a", every=2, keep_last=2)
    for _ in range(9):
        run.steps(1)
        checkpoints.step(run.state)
    assert names(tmp_path / "a") == ["step-0000006", "step-0000008"]
    assert checkpoints.latest() == tmp_path / "a" / "step-0000008"


def test_all_are_kept_when_nothing_is_said_of_the_last(run: Run, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every=1, keep_last=None)
    for _ in range(4):
        run.steps(1)
        checkpoints.step(run.state)
    assert len(names(tmp_path)) == 4


def test_a_step_is_saved_once_however_often_it_is_asked_for(run: Run, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every=2)
    checkpoints.step(run.state)
    assert names(tmp_path) == [], "before the first step"
    run.steps(2)
    checkpoints.step(run.state)
    written = (tmp_path / "step-0000002").stat().st_ino
    for _ in range(3):  # micro steps of the next window
        checkpoints.step(run.state)
    assert (tmp_path / "step-0000002").stat().st_ino == written


def test_a_run_goes_on_where_it_stopped_bit_for_bit(run: Run, tmp_path: Path, capsys: Any) -> None:
    run.train(3, lambda _: None)
    undisturbed = run.weights()

    class Killed(Exception):
        """Ends the run."""

    for stop_after in (4, 7, 11, 99):  # each part saves every 4 steps and is killed later
        part = Run.begin()
        checkpoints = Checkpoints(tmp_path, every=4)
        checkpoints.resume(part.state)

        def after_step(part: Run, limit: int = stop_after, checkpoints: Checkpoints = checkpoints) -> None:
            checkpoints.step(part.state)
            if part.fabric.steps == limit:
                raise Killed

        try:
            part.train(3, after_step)
        except Killed:
            continue
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(part.weights(), undisturbed, strict=True))
    assert capsys.readouterr().out.splitlines() == [
        "starting fresh",
        "resumed from step 4, epoch 0, batch 4; 0 samples repeated, 0 skipped",
        "resumed from step 4, epoch 0, batch 4; 0 samples repeated, 0 skipped",
        "resumed from step 8, epoch 1, batch 2; 0 samples repeated, 0 skipped",
    ]


def test_a_damaged_newest_checkpoint_is_passed_over_and_stays(run: Run, tmp_path: Path, capsys: Any) -> None:
    checkpoints = Checkpoints(tmp_path, every=1, keep_last=3)
    for _ in range(3):
        run.steps(1)
        checkpoints.step(run.state)
    flip_a_byte(tmp_path / "step-0000003")
    (tmp_path / "step-0000009").write_bytes(b"")
    again = Run.begin()
    checkpoints = Checkpoints(tmp_path, every=1, keep_last=1)
    assert checkpoints.latest() == tmp_path / "step-0000002"
    assert checkpoints.resume(again.state) == tmp_path / "step-0000002"
    shown = capsys.readouterr()
    assert shown.out.endswith("resumed from step 2, epoch 0, batch 0; 0 samples repeated, 0 skipped\n")
    assert [f"step-{number:07d}" in line for number, line in zip((9, 3), shown.err.splitlines(), strict=True)] == [
        True,
        True,
    ]
    again.steps(1)
    checkpoints.step(again.state)  # takes the place of the damaged one
    again.steps(1)
    checkpoints.step(again.state)
    assert names(tmp_path) == ["step-0000004", "step-0000009"], "what is damaged is nobody's to delete"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_them(run: Run, tmp_path: Path) -> None:
    (tmp_path / "step-0000001").write_bytes(b"no checkpoint")
    (tmp_path / "step-0000002").mkdir()
    with pytest.raises(CheckpointError, match=r"(?s)none of them can be loaded.*step-0000002.*step-0000001.*delete"):
        Checkpoints(tmp_path).resume(run.state)


@pytest.fixture
def held_descriptors() -> Iterator[Callable[[], None]]:
    """A function that leaves this process no descriptor to open a file with, until the test ends."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_checkpoint_that_could_not_be_read_is_not_taken_for_damaged(
    run: Run, tmp_path: Path, kind: str, held_descriptors: Callable[[], None]
) -> None:
    checkpoints = Checkpoints(tmp_path, every=1, keep_last=3)
    for _ in range(2):
        run.steps(1)
        checkpoints.step(run.state)
    if kind == "folder":
        (tmp_path / "step-0000003").mkdir()
    fresh = Checkpoints(tmp_path)
    held_descriptors()
    with pytest.raises((CheckpointError, OSError), match="Too many open files"):
        fresh.resume(run.state)
    assert run.fabric.steps == 2


def test_a_whole_checkpoint_of_another_model_is_an_error_and_no_damage(run: Run, tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(run.state)
    with pytest.raises(FabricKeyError, match="ema"):
        Checkpoints(tmp_path).resume({**run.state, "ema": nn.Linear(1, 1)})
    other = Run.begin()
    other.state["model"] = other.fabric.setup(nn.Linear(7, 7))
    with pytest.raises((FabricKeyError, FabricValueError, CheckpointError)):
        Checkpoints(tmp_path).resume(other.state)


def test_the_best_are_kept_too_over_restarts(run: Run, tmp_path: Path) -> None:
    losses = [5.0, 1.0, math.nan, 2.0, 4.0, 3.0]
    for number, loss in enumerate(losses):
        if number % 2 == 0:  # a new process every other save
            run = Run.begin()
            checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=2, monitor="loss")
            checkpoints.resume(run.state)
        run.steps(1)
        checkpoints.save(run.state, metrics={"loss": torch.tensor(loss), "other": 1})
    assert names(tmp_path) == ["step-0000002", "step-0000004", "step-0000006"]
    assert checkpoints.best() == tmp_path / "step-0000002"
    highest = Checkpoints(tmp_path, keep_best=1, monitor="loss", mode="max")
    assert highest.best() == tmp_path / "step-0000006"
    flip_a_byte(tmp_path / "step-0000002")
    assert checkpoints.best() == tmp_path / "step-0000004"


def test_what_is_not_ours_is_never_deleted(run: Run, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every=1, keep_last=1)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-0000000").mkdir()
    (tmp_path / "step-0000000" / "data").write_text("mine")
    (tmp_path / "step-12").write_text("mine")
    run.steps(1)
    run.fabric.save(tmp_path / "step-0000001", {"model": run.state["model"]})  # by hand, under such a name
    for _ in range(3):
        run.steps(1)
        checkpoints.step(run.state)
    assert names(tmp_path) == ["notes.txt", "step-0000000", "step-0000001", "step-0000004", "step-12"]


def test_a_copy_under_another_step_is_no_checkpoint_of_the_run(run: Run, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every=1, keep_last=1)
    run.steps(1)
    checkpoints.step(run.state)
    shutil.copy(tmp_path / "step-0000001", tmp_path / "step-0000000")
    run.steps(1)
    checkpoints.step(run.state)
    assert names(tmp_path) == ["step-0000000", "step-0000002"]


def test_a_new_run_in_the_folder_of_one_that_got_further_is_refused(run: Run, tmp_path: Path) -> None:
    run.steps(5)
    Checkpoints(tmp_path).save(run.state)
    fresh = Run.begin()
    fresh.steps(1)
    with pytest.raises(CheckpointError, match=r"got further(.|\n)*step-0000005, and this run is at step 1"):
        Checkpoints(tmp_path).save(fresh.state)
    with pytest.raises(CheckpointError, match=r"got further(.|\n)*step-0000005, and this run is at step 1"):
        Checkpoints(tmp_path, every=1000).step(fresh.state)
    assert names(tmp_path) == ["step-0000005"]


class FabricOverABadDisk(Fabric):
    """Each checkpoint is damaged as soon as it is written."""

    def save(self, path: Any, *args: Any, **options: Any) -> Any:
        handle = super().save(path, *args, **options)
        if handle is not None:
            handle.result()
        flip_a_byte(path)
        return handle


@pytest.mark.parametrize("async_", [False, True])
def test_nothing_is_deleted_when_the_new_one_is_damaged(run: Run, tmp_path: Path, async_: bool) -> None:
    run.steps(1)
    checkpoints = Checkpoints(tmp_path, keep_last=1, async_=async_)
    checkpoints.save(run.state)
    bad = FabricOverABadDisk(accelerator="cpu", devices=1)
    bad.load_state_dict({**run.fabric.state_dict(), "steps": 2})
    with pytest.raises(CheckpointError, match="step-0000002"):
        for _ in range(2 if async_ else 1):  # an asynchronous one is looked at by the next
            checkpoints.save({"fabric": bad})
    assert names(tmp_path) == ["step-0000001", "step-0000002"]
    bad.close()


def test_asynchronous_saves_are_pruned_one_save_later(run: Run, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every=1, keep_last=1, async_=True)
    for _ in range(4):
        run.steps(1)
        checkpoints.step(run.state)
    run.fabric.close()
    assert names(tmp_path) == ["step-0000003", "step-0000004"]


def sharded_state() -> dict[str, Any]:
    """What is saved as a folder."""
    fabric = Fabric(accelerator="cpu", devices=1, strategy="fsdp")
    model = nn.Linear(3, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return {"fabric": fabric, "model": model, "optimizer": optimizer}


def test_folders_are_kept_and_deleted_like_files(tmp_path: Path) -> None:
    state, checkpoints = sharded_state(), Checkpoints(tmp_path, every=1, keep_last=2)
    for _ in range(4):
        state["optimizer"].step()
        checkpoints.step(state)
    assert names(tmp_path) == ["step-0000003", "step-0000004"]
    assert all(path.is_dir() for path in tmp_path.glob("step-*"))
    state["fabric"].close()


def test_several_loaders_are_told_apart(run: Run, tmp_path: Path, capsys: Any) -> None:
    run.state["other"] = run.fabric.setup_dataloaders(DataLoader(TensorDataset(torch.arange(4.0)), batch_size=2))
    next(iter(run.state["other"]))
    Checkpoints(tmp_path).save(run.state)
    Checkpoints(tmp_path).resume(run.state)
    assert capsys.readouterr().out == (
        "resumed from step 0; loader: epoch 0, batch 0; 0 samples repeated, 0 skipped; "
        "other: epoch 0, batch 1; 0 samples repeated, 0 skipped\n"
    )


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"every": 0}, FabricValueError, "every is 1 at least"),
        ({"every": 2.5}, FabricTypeError, "every is a whole number"),
        ({"keep_last": 0}, FabricValueError, "keep_last is 1 at least"),
        ({"keep_best": None}, FabricTypeError, "keep_best is a whole number"),
        ({"keep_best": 1}, FabricValueError, "has to be named"),
        ({"mode": "least"}, FabricValueError, "least or the greatest"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], match: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=match):
        Checkpoints(tmp_path, **options)


def test_the_state_is_checked(run: Run, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(FabricValueError, match="The Fabric is not in the state"):
        checkpoints.resume({"model": run.state["model"]})
    with pytest.raises(FabricTypeError, match="is a dict"):
        checkpoints.save([run.fabric])  # type: ignore[arg-type]
    with pytest.raises(FabricValueError, match="has this key for itself"):
        checkpoints.step({**run.state, "checkpoints": 1})
    with pytest.raises(FabricTypeError, match="A metric is a number"):
        checkpoints.save(run.state, metrics={"loss": "low"})
    with pytest.raises(FabricTypeError, match="is a path"):
        Checkpoints(3)  # type: ignore[arg-type]
    with pytest.raises(FabricValueError, match="is a local one"):
        Checkpoints("s3://bucket/a")
    assert names(tmp_path) == []


@pytest.mark.parametrize("whose", ["of Checkpoints", "of the script"])
def test_a_run_that_is_asked_to_leave_saves_whatever_became_of_the_save_before(
    run: Run, tmp_path: Path, whose: str, capsys: Any
) -> None:
    checkpoints = Checkpoints(tmp_path / "run", every=2, async_=True)
    checkpoints.resume(run.state)
    taken = tmp_path / "run" / "step-0000002" if whose == "of Checkpoints" else tmp_path / "own"
    taken.mkdir(parents=True)
    (taken / "notes.txt").write_text("mine")
    if whose == "of the script":
        run.fabric.save(taken, {"a": 1}, async_=True)
    else:
        checkpoints._own_steps.add(2)  # else the first step would refuse the folder
    run.steps(2)
    if whose == "of Checkpoints":
        checkpoints.step(run.state)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as leaving:
        while True:
            run.steps(1)
            checkpoints.step(run.state)
    assert leaving.value.code == EXIT_PREEMPTED
    shown = capsys.readouterr()
    assert shown.err.count("an earlier save failed: This name is taken") == 1
    assert checkpoints.latest() == tmp_path / "run" / f"step-{run.fabric.steps:07d}"
    assert f"saved {checkpoints.latest()}" in shown.out


def test_a_step_whose_save_failed_is_saved_again(run: Run, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every=1, async_=True)
    checkpoints._own_steps.add(1)
    (tmp_path / "step-0000001").mkdir()
    (tmp_path / "step-0000001" / "notes.txt").write_text("mine")
    run.steps(1)
    checkpoints.save(run.state)
    with pytest.raises(CheckpointError, match="taken by something"):
        checkpoints.save(run.state)
    shutil.rmtree(tmp_path / "step-0000001")
    checkpoints.save(run.state)
    run.fabric.close()
    assert checkpoints.latest() == tmp_path / "step-0000001"


def test_what_the_user_has_put_into_a_checkpoint_keeps_it_from_being_deleted(tmp_path: Path, capsys: Any) -> None:
    state, checkpoints = sharded_state(), Checkpoints(tmp_path, every=1, keep_last=1)
    for step in range(1, 5):
        state["optimizer"].step()
        checkpoints.step(state)
        if step == 1:
            (tmp_path / "step-0000001" / "notes.txt").write_text("mine")
    assert names(tmp_path) == ["step-0000001", "step-0000004"]
    assert (tmp_path / "step-0000001" / "notes.txt").read_text() == "mine"
    assert capsys.readouterr().err.count("step-0000001 is not needed any more and stays") == 1
    state["fabric"].close()
