"""Ranks stop together, keep the same checkpoints, and go on from the same one."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_lite import EXIT_PREEMPTED, CheckpointError, Checkpoints, Fabric
from fabric_lite.testing import RankPool


def begin(strategy: str = "ddp") -> dict[str, Any]:
    """The state of a run, set up."""
    torch.manual_seed(3)
    fabric = Fabric(accelerator="cpu", strategy=strategy)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(torch.randn(24, 6)), batch_size=2, shuffle=True))
    return {"fabric": fabric, "model": model, "optimizer": optimizer, "loader": loader}


def steps(state: dict[str, Any], checkpoints: Checkpoints, limit: int, **metrics: float) -> None:
    for (batch,) in state["loader"]:
        state["fabric"].backward(state["model"](batch).square().mean())
        state["optimizer"].step()
        state["optimizer"].zero_grad()
        checkpoints.step(state, metrics)
        if state["fabric"].steps >= limit:
            return


def whole(state: dict[str, Any]) -> list[list[float]]:
    """All parameters, in full on every rank."""
    return [
        getattr(parameter, "full_tensor", lambda p=parameter: p)().flatten().tolist()
        for parameter in state["model"].parameters()
    ]


def save_steps(folder: Path, strategy: str, count: int) -> list[list[float]]:
    state = begin(strategy)
    steps(state, Checkpoints(folder, every=1, keep_last=2), count)
    weights = whole(state)
    state["fabric"].close()
    return weights


def resume(folder: Path, strategy: str) -> tuple[Any, ...]:
    """Where a new run goes on, what it says, and its weights."""
    state = begin(strategy)
    said, noticed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(noticed):
        path = Checkpoints(folder, every=1).resume(state)
    result = path, state["fabric"].steps, said.getvalue(), noticed.getvalue(), whole(state)
    state["fabric"].close()
    return result


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_go_on_from_the_newest_whole_checkpoint_together(ranks: RankPool, tmp_path: Path, strategy: str) -> None:
    weights, _ = ranks.run(save_steps, tmp_path, strategy, 3)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-0000002", "step-0000003"]
    (path, count, said, _, found), other = ranks.run(resume, tmp_path, strategy)
    assert (path, count, other[:2]) == (tmp_path / "step-0000003", 3, (path, 3))
    assert said == "resumed from step 3, epoch 0, batch 3; 0 samples repeated, 0 skipped\n"
    assert other[2] == ""
    assert found == other[-1] == weights

    damaged = tmp_path / "step-0000003"
    # Of a folder what only one of the ranks reads.
    file = damaged / "part-00001.safetensors" if strategy == "fsdp" else damaged
    data = bytearray(file.read_bytes())
    data[-1 if strategy == "fsdp" else len(data) // 2] ^= 1
    file.write_bytes(data)
    (path, count, _, noticed, _), other = ranks.run(resume, tmp_path, strategy)
    assert (path, count, other[:2]) == (tmp_path / "step-0000002", 2, (path, 2))
    assert f"skipped {damaged}, which is damaged" in noticed


def test_a_run_goes_on_at_another_world_size_and_says_so(ranks: RankPool, tmp_path: Path) -> None:
    weights, _ = ranks.run(save_steps, tmp_path, "ddp", 2)
    results = ranks.run(resume, tmp_path, "ddp", ranks=3)
    assert {result[1] for result in results} == {2}
    assert "saved by 2 ranks, now 3" in results[0][2]
    assert all(result[-1] == weights for result in results)


def save_a_metric_of_each_rank(folder: Path) -> None:
    state = begin()
    checkpoints = Checkpoints(folder, keep_last=1, keep_best=1, monitor="loss")
    for mine in ((1.0, 9.0), (2.0, 0.0), (3.0, 0.0)):
        state["optimizer"].step()
        checkpoints.save(state, {"loss": mine[state["fabric"].global_rank]})
    state["fabric"].close()


def test_the_best_is_that_of_rank_0(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(save_a_metric_of_each_rank, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-0000001", "step-0000003"]


def save_with_a_bad_metric(folder: Path) -> str:
    state = begin()
    with pytest.raises((CheckpointError, TypeError)) as caught:
        Checkpoints(folder).save(state, {"loss": "low"} if state["fabric"].is_global_zero else {})
    state["fabric"].close()
    return str(caught.value)


def test_what_rank_0_refuses_is_an_error_on_all(ranks: RankPool, tmp_path: Path) -> None:
    assert all("A metric is a number" in said for said in ranks.run(save_with_a_bad_metric, tmp_path))
    assert not any(tmp_path.iterdir())


def save_beside_the_loop(folder: Path) -> tuple[Any, int]:
    state = begin()
    checkpoints = Checkpoints(folder, every=1, keep_last=1, async_=True)
    checkpoints.resume(state)
    for _ in range(3):
        steps(state, checkpoints, state["fabric"].steps + 1)
    if state["fabric"].global_rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    try:
        for _ in range(100):
            state["optimizer"].step()
            checkpoints.step(state)
    except SystemExit as leaving:
        return leaving.code, state["fabric"].steps
    finally:
        state["fabric"].close()
    return None, 0


def test_a_run_that_saves_beside_the_loop_leaves_with_one_whole_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    [(code, step)] = set(ranks.run(save_beside_the_loop, tmp_path))
    assert code == EXIT_PREEMPTED
    assert [path.name for path in tmp_path.glob("step-*")] == [f"step-{step:07d}"]


def be_asked_inside_a_collective() -> tuple[list[bool], int]:
    """Rank 0 gets the signal while it waits for rank 1, which does not come before it knows where to stop."""
    state = begin()
    fabric, optimizer = state["fabric"], state["optimizer"]
    process = fabric.broadcast(os.getpid())
    seen = [fabric.should_stop]

    def until_it_stops() -> None:
        while not seen[-1]:
            optimizer.step()  # communicates nothing
            seen.append(fabric.should_stop)

    fabric.barrier()
    if fabric.global_rank == 1:
        os.kill(process, signal.SIGTERM)
        until_it_stops()
    fabric.all_reduce(torch.ones(1))
    until_it_stops()
    fabric.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    return seen, fabric.steps


def test_a_rank_that_waits_in_a_collective_answers_and_all_stop_at_one_step(ranks: RankPool) -> None:
    first, other = ranks.run(be_asked_inside_a_collective)
    assert first == other
    seen, count = first
    assert seen == [False] * count + [True]


def be_asked_after_one_has_left() -> bool:
    state = begin()
    fabric = state["fabric"]
    assert not fabric.should_stop
    if fabric.global_rank == 1:
        fabric.close()
        return False
    os.kill(os.getpid(), signal.SIGUSR1)
    for _ in range(1_000_000):
        state["optimizer"].step()
        if fabric.should_stop:
            break
    stopped = bool(fabric.should_stop)
    fabric.close()
    return stopped


def test_nobody_waits_for_the_answer_of_a_rank_that_has_left(ranks: RankPool) -> None:
    assert ranks.run(be_asked_after_one_has_left) == [True, False]
