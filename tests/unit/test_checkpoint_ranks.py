"""Checkpoints of several ranks: one file, any layout loads any other, and errors come on all ranks."""

from __future__ import annotations

import contextlib
import io
import queue
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fabric_lite import notices
from fabric_lite.checkpoint import load, save
from fabric_lite.checkpoint.together import Together
from fabric_lite.errors import FabricError
from fabric_lite.seed import random_state, set_random_state
from fabric_lite.testing import RankPool

STEPS = 3


def model_and_optimizer(sharded: bool, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    if sharded:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    """The same batch on every rank, so that every layout computes the same steps."""
    batch = torch.arange(20.0).reshape(4, 5) / 20
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[float]]:
    names = ("exp_avg", "exp_avg_sq", "step")
    moments = [optimizer.state[parameter][name] for parameter in model.parameters() for name in names]
    return [whole(tensor.detach()).flatten().tolist() for tensor in [*model.state_dict().values(), *moments]]


def train_and_save(path: Path, sharded: bool) -> list[list[float]]:
    model, optimizer = model_and_optimizer(sharded, seed=0)
    train(model, optimizer)
    save(path, {"model": model, "optimizer": optimizer, "step": STEPS})
    return values(model, optimizer)


def load_values(path: Path, sharded: bool) -> tuple[list[list[float]], int, bool]:
    model, optimizer = model_and_optimizer(sharded, seed=1)
    train(model, optimizer, 1)
    memory = [whole_or_local(parameter).data_ptr() for parameter in model.parameters()]
    state = {"model": model, "optimizer": optimizer, "step": 0}
    load(path, state)
    stayed = memory == [whole_or_local(parameter).data_ptr() for parameter in model.parameters()]
    found = values(model, optimizer)
    train(model, optimizer, 1)
    return found, state["step"], stayed


def whole_or_local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.parametrize("loaded", ["one process", "two replicas", "two shards"])
@pytest.mark.parametrize("saved", ["one process", "two replicas", "two shards"])
def test_a_file_of_any_layout_loads_under_any_other(ranks: RankPool, tmp_path: Path, saved: str, loaded: str) -> None:
    def run(how: str, function: Any) -> Any:
        sharded = how == "two shards"
        path = tmp_path / "a.ckpt"
        return function(path, sharded) if how == "one process" else ranks.run(function, path, sharded)[1]

    expected = run(saved, train_and_save)
    assert all(value.numel() for value in torch.load(tmp_path / "a.ckpt", weights_only=True)["model"].values())
    found, step, stayed = run(loaded, load_values)
    assert found == expected
    assert step == STEPS
    assert stayed


def save_tied(path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    save(path, {"model": model})


def test_tied_weights_that_are_sharded_are_one_tensor_in_the_file(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(save_tied, tmp_path / "a.ckpt")
    model = torch.load(tmp_path / "a.ckpt", weights_only=True)["model"]
    assert model["0.weight"].data_ptr() == model["1.weight"].data_ptr()


class RandomOfAllRanks:
    """As the fabric does it: its state is gathered, so every rank must be asked for it."""

    def state_dict(self) -> dict[str, Any]:
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, random_state())
        return {"random": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_random_state(state["random"][dist.get_rank()])


def draws_before_and_after(path: Path) -> tuple[float, float]:
    torch.manual_seed(dist.get_rank())
    state = {"random": RandomOfAllRanks()}
    save(path, state)
    before = float(torch.rand(()))
    load(path, state)
    return before, float(torch.rand(()))


def test_each_rank_gets_its_own_random_state_back(ranks: RankPool, tmp_path: Path) -> None:
    (first, first_again), (second, second_again) = ranks.run(draws_before_and_after, tmp_path / "a.ckpt")
    assert (first, second) == (first_again, second_again)
    assert first != second


class FailsOn:
    def __init__(self, rank: int, verb: str) -> None:
        self.rank, self.verb, self.value = rank, verb, 0

    def state_dict(self) -> dict[str, int]:
        if self.verb == "state_dict" and dist.get_rank() == self.rank:
            raise OSError("no state today")
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]
        if self.verb == "load_state_dict" and dist.get_rank() == self.rank and self.value == 5:
            raise OSError("not this one")


def error_of(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except (FabricError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failing_save(path: Path, case: str) -> str:
    mine = dist.get_rank()
    state: dict[str, Any] = {"model": nn.Linear(2, 2)}
    if case == "a value on rank 0":
        state["value"] = Path("x") if mine == 0 else 1
    if case.startswith("a state on rank"):
        state["object"] = FailsOn(int(case[-1]), "state_dict")
    if case == "other objects on rank 1" and mine == 1:
        state["more"] = nn.Linear(2, 2)
    return error_of(save, path, state)


@pytest.mark.parametrize(
    ("case", "on_rank_0", "on_rank_1"),
    [
        ("a file in the way", "CheckpointError: The checkpoint could not be written", "failed on rank 0"),
        ("a value on rank 0", 'FabricTypeError: state["value"] is a PosixPath', "failed on rank 0"),
        ("a state on rank 0", "OSError: no state today", "failed on rank 0: OSError: no state today"),
        ("a state on rank 1", "failed on rank 1: OSError: no state today", "OSError: no state today"),
        ("other objects on rank 1", 'differ in state["more"]', 'differ in state["more"]'),
    ],
)
def test_an_error_on_one_rank_raises_on_both_and_writes_nothing(
    ranks: RankPool, tmp_path: Path, case: str, on_rank_0: str, on_rank_1: str
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" if case == "a file in the way" else tmp_path
    first, second = ranks.run(failing_save, folder / "a.ckpt", case)
    assert on_rank_0 in first
    assert on_rank_1 in second
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def failing_load(path: Path) -> tuple[str, int, bool, int]:
    model, object_ = nn.Linear(2, 2), FailsOn(1, "load_state_dict")
    before = model.weight.detach().clone()
    state = {"object": object_, "model": model, "step": 0}
    message = error_of(load, path, state)
    return message, object_.value, torch.equal(before, model.weight), state["step"]


def test_a_load_that_fails_on_one_rank_leaves_both_as_they_were(ranks: RankPool, tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", {"object": {"value": 5}, "model": nn.Linear(2, 2), "step": 4})
    (first, *untouched), (second, *also) = ranks.run(failing_load, tmp_path / "a.ckpt")
    assert "failed on rank 1" in first
    assert "not this one" in second
    assert untouched == also == [0, True, 0]


def load_from_own_path(folder: Path) -> str:
    return error_of(load, folder / f"{dist.get_rank()}.ckpt")


def test_a_file_that_one_rank_does_not_see_raises_on_both(ranks: RankPool, tmp_path: Path) -> None:
    save(tmp_path / "0.ckpt", {"value": 1})
    first, second = ranks.run(load_from_own_path, tmp_path)
    assert first.startswith("CheckpointError: load() failed on rank 1")
    assert second.startswith("CheckpointNotFoundError")


def lack_memory(*_: Any, **__: Any) -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def lose_a_rank(*_: Any, **__: Any) -> None:
    raise RuntimeError("Connection closed by peer\n[of gloo]")


def error_together(method: str, exchange: Any, kind: type[Exception] | None) -> str:
    """What ``method`` raises where the ranks exchange by ``exchange``; rank 1's own part raises a ``kind``."""

    def part() -> None:
        if kind is not None and dist.get_rank() == 1:
            raise kind("no part today")

    with pytest.MonkeyPatch.context() as patch, pytest.raises((RuntimeError, OSError, FabricError)) as error:
        if exchange is not None:
            patch.setattr(dist, "all_gather", exchange)
        getattr(Together(), method)("save()", part)
    return f"{type(error.value).__name__}: {error.value}"


@pytest.mark.parametrize("method", ["on_every_rank", "results"])
@pytest.mark.parametrize(
    ("exchange", "kind", "on_rank_0", "on_rank_1"),
    [
        (lose_a_rank, None, *["CheckpointError: save() could not go on, since the ranks lost each other"] * 2),
        (lack_memory, None, *["RuntimeError: [enforce fail at "] * 2),
        (None, RuntimeError, "CheckpointError: save() failed on rank 1", "RuntimeError: no part today"),
        (None, OSError, "CheckpointError: save() failed on rank 1", "OSError: no part today"),
    ],
    ids=["a rank is lost", "no memory", "a RuntimeError of its own", "an OSError of its own"],
)
def test_only_what_the_backend_raises_in_an_exchange_is_a_lost_rank(
    ranks: RankPool, method: str, exchange: Any, kind: type[Exception] | None, on_rank_0: str, on_rank_1: str
) -> None:
    first, second = ranks.run(error_together, method, exchange, kind)
    assert first.startswith(on_rank_0)
    assert second.startswith(on_rank_1)


class Said(io.StringIO):
    """A standard error that lets the ranks go on that wait for ``key``, as soon as something is written."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def flush(self) -> None:
        dist.distributed_c10d._get_default_store().set(self.key, "yes")


class Lines(io.StringIO):
    """A standard error of which a test takes one line after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def write(self, text: str) -> int:
        if text != "\n":
            self.lines.put(text)
        return len(text)


def call_later_than_rank_0(function: Any, path: Path) -> str:
    """Rank 1 calls once rank 0 has said that it waits; what this rank said."""
    seconds = notices.WAIT_SECONDS
    said = Said(str(path))
    notices.WAIT_SECONDS = 0.05 if dist.get_rank() == 0 else seconds
    try:
        if dist.get_rank() == 1:
            dist.distributed_c10d._get_default_store().wait([said.key])
        with contextlib.redirect_stderr(said):
            function(path, {})
    finally:
        notices.WAIT_SECONDS = seconds
    return said.getvalue()


@pytest.mark.parametrize(("function", "call"), [(save, "fabric.save()"), (load, "fabric.load()")])
def test_a_rank_that_calls_alone_says_where_it_waits(ranks: RankPool, tmp_path: Path, function: Any, call: str) -> None:
    save(tmp_path / "a.ckpt", {"value": 1})
    first, second = ranks.run(call_later_than_rank_0, function, tmp_path / "a.ckpt")
    assert first.startswith(f"fabric_lite: rank 0 waits in {call} at {__file__}:")
    assert first.endswith("; every rank must call it\n")
    assert first.count("\n") == 1
    assert second == ""


def wait_in_turn(folder: Path) -> tuple[int, bool]:
    """Threads that several waits and a save needed, and whether they said anything in good time."""
    before, said = set(threading.enumerate()), io.StringIO()
    with contextlib.redirect_stderr(said):
        for _ in range(3):
            with notices.says_that_it_waits("fabric.save()"), notices.says_that_it_waits("fabric.load()"):
                pass
        save(folder / "a.ckpt", {})
    return len(set(threading.enumerate()) - before), said.getvalue() == ""


def test_all_waits_of_a_rank_share_one_thread(ranks: RankPool, tmp_path: Path) -> None:
    for threads, nothing_said in ranks.run(wait_in_turn, tmp_path):
        assert threads <= 1  # another test's may live on
        assert nothing_said


def test_the_thread_of_waits_ends_when_nothing_waits(capsys: pytest.CaptureFixture[str]) -> None:
    waits = notices._Waits()
    for _ in range(2):
        waits.end(waits.begin("not said", 0.05))
        thread = waits._thread
        assert thread is not None
        thread.join(30.0)
        assert not thread.is_alive()
    assert capsys.readouterr().err == ""


def test_a_wait_that_is_due_before_the_others_is_said_first() -> None:
    waits, said = notices._Waits(), Lines()
    with contextlib.redirect_stderr(said):
        late = waits.begin("late", 3600.0)
        soon = waits.begin("soon", 0.05)
        assert said.lines.get(timeout=30.0) == "soon"
        waits.begin("at once", 0.0)
        assert said.lines.get(timeout=30.0) == "at once"
    waits.end(soon)
    waits.end(late)


def test_a_process_alone_waits_for_nobody() -> None:
    before = threading.active_count()
    with notices.says_that_it_waits("fabric.save()", seconds=0.0):
        assert threading.active_count() == before
