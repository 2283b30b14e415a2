"""With the check on, ranks that call different things raise the same error, with the lines of all."""

from __future__ import annotations

import importlib.util
import math
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_lite import CollectiveError, Fabric, call_site
from fabric_lite.collective_check import check_numbers
from fabric_lite.testing import RankPool

ROWS: dict[str, Callable[[Fabric, int], Any]] = {
    "wrong shape": lambda fabric, rank: fabric.all_reduce(torch.ones(2 + (rank == 1))),
    "wrong dtype": lambda fabric, rank: fabric.all_gather(torch.ones(2, dtype=[torch.float32, torch.int64][rank == 1])),
    "wrong operation": lambda fabric, rank: fabric.all_reduce(1.0, reduce_op="sum" if rank == 1 else "max"),
    "wrong source": lambda fabric, rank: fabric.broadcast(1, src=int(rank == 1)),
    "wrong order": lambda fabric, rank: fabric.barrier() if rank == 1 else fabric.all_reduce(1.0),
    "one rank leaves": lambda fabric, rank: leave(fabric) if rank == 1 else fabric.all_reduce(1.0),
}


def leave(fabric: Fabric) -> None:
    fabric.close()
    raise CollectiveError("test_collective_check.py: left")


def error_of(kind: str) -> str:
    fabric = Fabric(accelerator="cpu", check_collectives=True)
    fabric.barrier()
    with pytest.raises(CollectiveError) as error:
        ROWS[kind](fabric, fabric.global_rank)
    return str(error.value)


@pytest.mark.parametrize("kind", ROWS)
def test_a_call_that_differs_is_named_on_all_ranks_with_the_lines(ranks: RankPool, kind: str) -> None:
    messages = ranks.run(error_of, kind, ranks=3)
    if kind == "one rank leaves":
        assert "rank 1: has left the run at" in messages[0]
        messages.pop(1)
    assert len(set(messages)) == 1
    assert "rank 1: " in messages[0]
    assert "ranks 0, 2: " in messages[0]
    assert messages[0].count("test_collective_check.py:") == 2


class Net(nn.Module):
    def __init__(self, *, has_buffers: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4) if has_buffers else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(x))  # type: ignore[no-any-return]


def train(strategy: str, fault: str, has_buffers: bool) -> str:
    """Train; rank 1 has one batch more, or skips a backward, or the call at the end."""
    fabric = Fabric(accelerator="cpu", strategy=strategy, check_collectives=True)
    odd = fabric.global_rank == 1
    torch.manual_seed(0)
    model = Net(has_buffers=has_buffers)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    try:
        for step in range(4 if odd and fault == "batch" else 3):
            with fabric.no_backward_sync(model, enabled=step == 0):
                loss = model(torch.ones(3, 4)).sum()
                if not (odd and fault == "backward" and step == 1):
                    fabric.backward(loss)
            if step > 0:
                optimizer.step()
                optimizer.zero_grad()
        if not (odd and fault == "call"):
            fabric.all_reduce(loss.detach())
        fabric.barrier()
    except CollectiveError as error:
        return str(error)
    finally:
        fabric.close()
    return "no error"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("has_buffers", [False, True])
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("batch", ["all_reduce mean", "ward of Net"]),
        ("backward", ["backward of Net"]),
        ("call", ["all_reduce", "barrier"]),
    ],
)
def test_a_step_that_differs_is_named_on_all_ranks(
    ranks: RankPool, strategy: str, has_buffers: bool, fault: str, expected: list[str]
) -> None:
    messages = ranks.run(train, strategy, fault, has_buffers)
    assert messages[0] == messages[1]
    for words in [*expected, "rank 0: ", "rank 1: ", "test_collective_check.py:"]:
        assert words in messages[0]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_that_agree_train_as_without_the_check(ranks: RankPool, strategy: str) -> None:
    assert ranks.run(train, strategy, "none", True) == ["no error"] * 2


def evaluate_alone() -> bool:
    fabric = Fabric(accelerator="cpu", strategy="ddp", check_collectives=True)
    model = fabric.setup(Net(has_buffers=True))
    if fabric.is_global_zero:
        with torch.no_grad():
            model(torch.ones(3, 4))
    fabric.barrier()
    return True


def test_rank_zero_may_evaluate_alone_with_the_check_on(ranks: RankPool) -> None:
    assert ranks.run(evaluate_alone) == [True, True]


def clip(strategy: str, difference: str) -> list[str]:
    fabric = Fabric(accelerator="cpu", strategy=strategy, check_collectives=True)
    model = Net(has_buffers=False)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.backward(model(torch.ones(3, 4)).sum())
    odd = fabric.global_rank == 1
    try:
        if not (odd and difference == "missing"):
            fabric.clip_gradients(model, optimizer, max_norm=2.0 if odd and difference == "norm" else 1.0)
        fabric.barrier()
    except CollectiveError as error:
        return str(error).splitlines()
    finally:
        fabric.close()
    return []


@pytest.mark.parametrize("difference", ["missing", "norm"])
def test_clipping_is_compared_where_it_communicates(ranks: RankPool, difference: str) -> None:
    first, second = ranks.run(clip, "fsdp", difference)
    assert first == second
    assert any("clip_gradients to a norm of 1.0 of order 2.0" in line for line in first)
    assert any("barrier" in line or "a norm of 2.0" in line for line in first)
    assert ranks.run(clip, "ddp", difference) == [[], []], "each rank by itself"


def lose_the_store() -> str:
    fabric = Fabric(accelerator="cpu", check_collectives=True)
    fabric.barrier()
    checker: Any = fabric._collectives._checker
    checker._store = Gone()
    with pytest.raises(CollectiveError) as error:
        fabric.all_reduce(1.0)
    return str(error.value)


def wait_in_vain(of_all: bool) -> str:
    fabric = Fabric(accelerator="cpu", check_collectives=True)
    fabric.barrier()
    checker: Any = fabric._collectives._checker
    assert 0 < checker._timeout_seconds < math.inf
    group = None if of_all else torch.distributed.new_group([0, 1])
    if fabric.global_rank == 1:
        return ""
    checker._timeout_seconds = 0.25
    with pytest.raises(CollectiveError) as error:
        fabric.all_reduce(1.0, group=group)
    return str(error.value)


@pytest.mark.parametrize("of_all", [True, False])
def test_a_rank_that_does_not_come_in_time_is_named_in_groups_of_users_too(ranks: RankPool, of_all: bool) -> None:
    message, _ = ranks.run(wait_in_vain, of_all)
    assert message.startswith("Not all ranks came to a call within 0.25 s.")
    assert "rank 0: all_reduce mean () torch.float64 at " in message
    assert "rank 1: has not come to this call" in message


def count_calls() -> list[list[int]]:
    fabric = Fabric(accelerator="cpu", check_collectives=True)
    fabric.barrier()
    checker: Any = fabric._collectives._checker

    def counts() -> list[int]:
        return [number for name, number in check_numbers().items() if name.startswith(f"{checker._name} ")]

    before = counts()
    if fabric.global_rank == 0:
        checker._timeout_seconds = 0.25
        with pytest.raises(CollectiveError):
            fabric.all_reduce(1.0)
    waiting = counts()
    fabric.close()
    return [before, waiting, counts()]


def test_a_rank_that_waits_for_the_comparison_of_a_call_counts_as_ahead_of_the_others(ranks: RankPool) -> None:
    # Two calls before: of Fabric() and of barrier().
    assert ranks.run(count_calls) == [[[2], [3], []], [[2], [2], []]]


class Gone:
    """A store whose rank has ended."""

    def set(self, *_: Any) -> None:
        raise torch.distributed.DistNetworkError("Connection reset by peer")

    check = get = set


def test_a_store_that_ends_within_a_comparison_is_an_error_of_ours(ranks: RankPool) -> None:
    for message in ranks.run(lose_the_store):
        assert "lost each other while they compared a call of all_reduce mean" in message
        assert "Connection reset by peer" in message


def test_the_line_of_a_program_of_packages_is_neither_torchs_nor_ours(tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "fabric_lite"
    package.mkdir(parents=True)
    copy = shutil.copy(call_site.__file__, package)
    specification = importlib.util.spec_from_file_location("installed_call_site", copy)
    assert specification is not None
    assert specification.loader is not None
    installed: Any = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(installed)
    names: dict[str, Any] = {"user_frame": installed.user_frame, "sys": sys, "__name__": "fabric_lite.fabric"}
    exec(compile("def ours(): return user_frame(sys._getframe())", str(package / "fabric.py"), "exec"), names)
    tool: dict[str, Any] = {"ours": names["ours"], "__name__": "tool", "found": []}
    path = str(package.parent / "tool.py")
    exec(compile("def run(): found.append(ours())", path, "exec"), tool)
    thread = threading.Thread(target=tool["run"])  # none of the lines of this test are in it
    thread.start()
    thread.join()
    assert [frame.f_code.co_filename for frame in tool["found"]] == [path]
