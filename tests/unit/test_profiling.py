"""A profile writes one trace for each rank, and counts each operator of the recorded steps once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_lite import Fabric, profile
from fabric_lite.errors import FabricError, FabricRuntimeError, FabricTypeError, FabricValueError
from fabric_lite.profiling import Profile, _costs_of
from fabric_lite.testing import RankPool


def run_steps(profiler: Profile, count: int) -> None:
    """Each step multiplies once."""
    factor = torch.ones(8, 8)
    for _ in range(count):
        torch.mm(factor, factor)
        profiler.step()


def calls_of(profiler: Profile, name: str = "aten::mm") -> int:
    return sum(row.calls for row in profiler.rows() if row.name == name)


def names_in(trace: Path) -> list[str]:
    return [event["name"] for event in json.loads(trace.read_text())["traceEvents"] if "name" in event]


@pytest.mark.parametrize(("warmup", "steps", "taken", "recorded"), [(1, 2, 6, 2), (0, 3, 6, 3), (2, 3, 4, 2)])
def test_the_steps_after_the_warmup_are_recorded_and_no_others(
    warmup: int, steps: int, taken: int, recorded: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with profile(steps=steps, warmup=warmup, folder=tmp_path) as profiler:
        run_steps(profiler, taken)
    assert calls_of(profiler) == recorded
    assert names_in(tmp_path / "trace_rank_0.json").count("aten::mm") == recorded
    assert f"over {recorded} steps; the trace is in {tmp_path / 'trace_rank_0.json'}\n" in capsys.readouterr().out


def test_the_trace_is_there_as_soon_as_the_steps_are_recorded_and_nothing_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er"
    with profile(steps=1, warmup=1, folder=folder) as profiler:
        assert list(folder.iterdir()) == []
        run_steps(profiler, 2)
        assert [path.name for path in folder.iterdir()] == ["trace_rank_0.json"]
        assert not torch.autograd._profiler_enabled()
        run_steps(profiler, 3)
    assert calls_of(profiler) == 1


def test_shares_are_sorted_and_add_up_to_one_with_the_time_between_operators(tmp_path: Path) -> None:
    with profile(steps=2, warmup=0, folder=tmp_path) as profiler:
        run_steps(profiler, 2)
    shares = [row.share for row in profiler.rows()]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1.0)
    assert calls_of(profiler, "(between operators)") == 2
    assert all(row.device_seconds == row.self_bytes == 0 for row in profiler.rows())


def test_the_table_shows_the_top_rows_and_what_is_left(tmp_path: Path) -> None:
    with profile(steps=2, warmup=0, folder=tmp_path) as profiler:
        run_steps(profiler, 2)
    lines = profiler.table(top=1).splitlines()
    first = profiler.rows()[0]
    assert lines[0].split() == ["operator", "calls", "self", "time", "share"]
    assert lines[1].startswith(first.name)
    assert lines[1].endswith(f"{first.share:.1%}")
    assert lines[2] == f"{len(profiler.rows()) - 1} more operators: {1 - first.share:.1%}"


def test_memory_is_recorded_where_it_is_asked_for(tmp_path: Path) -> None:
    kept = []
    with profile(steps=1, warmup=0, folder=tmp_path, memory=True) as profiler:
        kept.append(torch.empty(2**18))
        profiler.step()
    assert {row.name: row.self_bytes for row in profiler.rows()}["aten::empty"] == 2**20
    assert "memory" in profiler.table()
    assert "1.00 MiB" in profiler.table()


def test_an_exception_passes_through_closes_the_profiler_and_keeps_the_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = ValueError("of the loop")
    with (
        pytest.raises(ValueError, match="of the loop") as caught,
        profile(steps=9, warmup=0, folder=tmp_path) as profiler,
    ):
        run_steps(profiler, 2)
        raise error
    assert caught.value is error
    assert not torch.autograd._profiler_enabled()
    assert calls_of(profiler) == 2
    assert names_in(profiler.trace).count("aten::mm") == 2
    assert capsys.readouterr().out == ""


def test_a_trace_that_cannot_be_written_does_not_hide_the_exception_of_the_loop(tmp_path: Path) -> None:
    (tmp_path / "trace_rank_0.json").mkdir()  # in the way
    with pytest.raises(ValueError, match="of the loop"), profile(steps=9, warmup=0, folder=tmp_path) as profiler:
        run_steps(profiler, 1)
        raise ValueError("of the loop")
    with pytest.raises(OSError, match=r"trace_rank_0\.json"), profile(steps=9, warmup=0, folder=tmp_path) as profiler:
        run_steps(profiler, 1)
    assert not torch.autograd._profiler_enabled()
    assert [path.name for path in tmp_path.iterdir()] == ["trace_rank_0.json"]


def test_a_block_that_ends_in_its_warmup_says_that_nothing_was_recorded(tmp_path: Path) -> None:
    said = pytest.warns(UserWarning, match=r"recorded nothing.*after 1 steps\.\n  Try: profiler\.step\(\)")
    with said, profile(warmup=2, folder=tmp_path) as profiler:
        run_steps(profiler, 1)
    assert profiler.rows() == []
    assert list(tmp_path.iterdir()) == []


def test_a_profile_can_be_entered_again(tmp_path: Path) -> None:
    profiler = profile(steps=1, warmup=0, folder=tmp_path)
    for _ in range(2):
        with profiler:
            run_steps(profiler, 3)
        assert calls_of(profiler) == 1


def test_a_step_outside_of_the_block_is_refused(tmp_path: Path) -> None:
    profiler = profile(folder=tmp_path, steps=1, warmup=0)
    with pytest.raises(FabricRuntimeError, match="outside of its block"):
        profiler.step()
    with profiler:
        profiler.step()
    with pytest.raises(FabricRuntimeError, match="outside of its block"):
        profiler.step()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"steps": 0}, FabricValueError, "steps is 1 at least"),
        ({"warmup": -1}, FabricValueError, "warmup is 0 at least"),
        ({"steps": "5"}, FabricTypeError, "steps='5'"),
        ({"warmup": True}, FabricTypeError, "warmup=True"),
    ],
)
def test_wrong_counts_are_named(arguments: dict[str, Any], kind: type[FabricError], message: str) -> None:
    with pytest.raises(kind, match=message):
        profile(**arguments)


class Average:
    """What torch tells of an operator, of a kernel, or of a mark in the user's code."""

    def __init__(self, key: str, host: float, device: float, *, kind: str = "CPU", is_mark: bool = False) -> None:
        self.key = key
        self.count = 1
        self.self_cpu_time_total = host
        self.self_device_time_total = device
        self.device_type = getattr(torch.autograd.DeviceType, kind)
        self.is_user_annotation = is_mark
        self.self_cpu_memory_usage = 1
        self.self_device_memory_usage = 2


def test_on_an_accelerator_shares_are_of_its_time_and_no_kernel_counts_twice() -> None:
    rows = _costs_of(
        [
            Average("aten::mm", 10.0, 300.0),
            Average("aten::add", 50.0, 100.0),
            Average("gemm_kernel", 0.0, 300.0, kind="CUDA"),
            Average("ProfilerStep*", 40.0, 400.0, is_mark=True),
        ]
    )
    assert [(row.name, row.device_seconds, row.share) for row in rows] == [
        ("aten::mm", 300e-6, 0.75), ("aten::add", 100e-6, 0.25), ("(between operators)", 0.0, 0.0),
    ]  # fmt: skip
    assert [row.self_bytes for row in rows] == [2, 2, 2]


def profile_training(folder: Path, with_fabric: bool) -> tuple[str, int, list[str]]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    model = nn.Linear(4, 4)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with profile(fabric if with_fabric else None, steps=2, warmup=1, folder=folder) as profiler:
        for _ in range(4):
            fabric.backward(model(torch.ones(2, 4)).sum())
            optimizer.step()
            optimizer.zero_grad()
            profiler.step()
    fabric.close()
    return profiler.trace.name, calls_of(profiler, "aten::addmm"), names_in(profiler.trace)


@pytest.mark.parametrize("with_fabric", [True, False])
def test_each_rank_writes_its_own_trace_with_a_fabric_and_without(
    with_fabric: bool, ranks: RankPool, tmp_path: Path
) -> None:
    for rank, (name, forwards, names) in enumerate(ranks.run(profile_training, tmp_path, with_fabric, ranks=2)):
        assert name == f"trace_rank_{rank}.json"
        assert forwards == 2
        assert any("allreduce" in name for name in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace_rank_0.json", "trace_rank_1.json"]


def test_without_a_group_the_launcher_says_which_rank_this_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with profile(steps=1, warmup=0, folder=tmp_path) as profiler:
        run_steps(profiler, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["trace_rank_3.json"]
