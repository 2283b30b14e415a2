"""A signal to any one rank at any time: all ranks save after the same step, and no step is lost."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
import socket
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_lite import EXIT_PREEMPTED, Checkpoints, Fabric
from tests.faults.conftest import Figures

EPOCHS, STEPS = 3, 40
LIMIT_SECONDS = 60.0
LAST_STEPS = 10  # so many may pass between a signal and the moment at which a thread takes it


def train(folder: Path, pipe: Connection, progress: Any) -> None:
    """The script of a user: it says from which step it goes on, and at which it ends, with which weights."""
    fabric = Fabric(accelerator="cpu")
    fabric.seed_everything(1)
    # One parameter: DDP orders several anew after its first step, and three ranks round by that order.
    model = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 16, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer = fabric.setup(model, optimizer)
    data = TensorDataset(torch.randn(STEPS * 4 * fabric.world_size, 16))
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=2, shuffle=True))
    state = {"fabric": fabric, "model": model, "optimizer": optimizer, "loader": loader, "epoch": 0}
    checkpoints = Checkpoints(folder, keep_last=1)
    checkpoints.resume(state)
    pipe.send(("begins", fabric.steps, None))
    try:
        while state["epoch"] < EPOCHS:
            for number, (batch,) in enumerate(loader):
                is_last = number % 2 == 1
                with fabric.no_backward_sync(model, enabled=not is_last):
                    fabric.backward(model(batch).square().mean())
                if is_last:
                    optimizer.step()
                    optimizer.zero_grad()
                progress.value = fabric.steps
                checkpoints.step(state)
            state["epoch"] += 1
        # What comes after this is too late to be a request.
        ended = "finishes"
    except SystemExit:
        ended = "stops"
        raise
    finally:
        weights = [parameter.detach().numpy().copy() for parameter in model.parameters()]
        pipe.send((ended, fabric.steps, weights))
        fabric.close()


def serve(rank: int, ranks: int, port: int, folder: Path, pipe: Connection, progress: Any) -> None:
    """A rank, as srun or mpirun starts it: rank 0 keeps the store."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
        GROUP_RANK="0", GROUP_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    train(folder, pipe, progress)


@dataclasses.dataclass
class Part:
    """The ranks of one part of a run."""

    processes: list[Any]
    pipes: list[Connection]
    progress: list[Any]

    @staticmethod
    def start(ranks: int, folder: Path) -> Part:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch._dynamo", "fabric_lite.testing"])
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        part = Part([], [], [context.Value("i", 0, lock=False) for _ in range(ranks)])
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, ranks, port, folder, theirs, part.progress[rank]))
            process.start()
            theirs.close()
            part.processes.append(process)
            part.pipes.append(ours)
        return part

    def said(self) -> list[Any]:
        """The next word of each rank."""
        assert all(pipe.poll(LIMIT_SECONDS) for pipe in self.pipes), "a rank hangs"
        return [pipe.recv() for pipe in self.pipes]

    def exit_codes(self) -> list[int | None]:
        for process in self.processes:
            process.join(LIMIT_SECONDS)
        return [process.exitcode for process in self.processes]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def undisturbed(ranks: int, folder: Path) -> list[Any]:
    """The weights of a run that nobody interrupts."""
    part = Part.start(ranks, folder)
    try:
        assert {word for word, *_ in part.said()} == {"begins"}
        ended = part.said()
        assert part.exit_codes() == [0] * ranks
    finally:
        part.end()
    assert {(word, steps) for word, steps, _ in ended} == {("finishes", EPOCHS * STEPS)}
    return [weights for *_, weights in ended]


def equal(found: list[Any], expected: list[Any]) -> bool:
    return all(
        (mine == theirs).all() for rank in zip(found, expected, strict=True) for mine, theirs in zip(*rank, strict=True)
    )


@pytest.mark.parametrize("signals", [2, pytest.param(60, marks=pytest.mark.full)])
def test_a_signal_to_any_rank_stops_all_after_the_same_step_and_none_is_lost(
    tmp_path: Path, signals: int, figures: Figures
) -> None:
    moments = random.Random(signals)
    expected: dict[int, list[Any]] = {}
    sent, saved, too_late, runs, number = 0, 0, 0, 0, 0
    # One that comes after the last step of a run asks for nothing, and is no trial.
    while saved < signals or number:
        ranks = 3 - runs % 2
        folder = tmp_path / f"run {runs}"
        part = Part.start(ranks, folder)
        came_after = None
        try:
            assert {(word, steps) for word, steps, _ in part.said()} == {("begins", number)}, "steps were lost"
            if saved < signals:
                # Nobody speaks before the end: it is a wait of a random length, and shorter if that has come.
                wait(part.pipes, moments.uniform(0.0, 0.1))
                target = moments.randrange(ranks)
                is_running = not any(pipe.poll() for pipe in part.pipes)
                if is_running:
                    came_after = part.progress[target].value
                    sent += 1
                    os.kill(part.processes[target].pid, moments.choice([signal.SIGTERM, signal.SIGUSR1]))
            ended = part.said()
            codes = part.exit_codes()
        finally:
            part.end()
        [(word, steps)] = {(word, steps) for word, steps, _ in ended}  # one step, agreed on
        if word == "stops":
            assert came_after is not None
            assert codes == [EXIT_PREEMPTED] * ranks
            assert steps > number
            assert [path.name for path in folder.glob("step-*")] == [f"step-{steps:07d}"]
            saved += 1
            number = steps
        else:
            assert steps == EPOCHS * STEPS
            assert codes == [0] * ranks
            if came_after is not None:
                too_late += 1
                assert came_after >= EPOCHS * STEPS - LAST_STEPS, "a signal was lost"
            if ranks not in expected:
                expected[ranks] = undisturbed(ranks, tmp_path / f"whole {ranks}")
            assert equal([weights for *_, weights in ended], expected[ranks])
            runs, number = runs + 1, 0
    assert saved + too_late == sent
    assert too_late <= max(1, signals // 6)
    values = {"saves_at_an_agreed_step": saved, "too_late": too_late, "runs": runs, "steps_lost": 0}
    figures("preemption: signals to one rank", trials=saved, **values)
