"""Asynchronous saves of several ranks: the same bytes, training that goes on beside them, errors on all ranks."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from fabric_lite import CheckpointError
from fabric_lite.checkpoint import asynchronous, finish, layout, load, save
from fabric_lite.testing import RankPool
from tests.distributed.launching import assert_nothing_left, fabric_run, write
from tests.distributed.layouts import LAYOUTS, loss_of, make_gpt, run_under, token_batches
from tests.distributed.scenarios import parameters_of

KINDS = ["full", "sharded"]


def train(layout: str, fabric: Any, model: Any, optimizer: Any, count: int, seed: int = 1) -> None:
    for tokens, targets in token_batches(count, seed):
        loss = loss_of(model(LAYOUTS[layout].share(tokens)), LAYOUTS[layout].share(targets))
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def save_twice_and_go_on(layout: str, folder: Path, kind: str) -> tuple[list[int], bool, bool]:
    """A synchronous save, then asynchronous ones with training beside them; numbers of allocations, and two checks."""
    fabric = LAYOUTS[layout].fabric()
    model = make_gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    fabric.setup(model, optimizer)
    state = {"model": model, "optimizer": optimizer, "fabric": fabric, "step": 2, "log": [1.5, 2.5]}
    train(layout, fabric, model, optimizer, 2)
    saved = parameters_of(model)
    fabric.save(folder / "now", state, state_dict_type=kind)
    allocations = []
    for number in range(2):
        handle = fabric.save(folder / f"beside {number}", state, state_dict_type=kind, async_=True)
        if number:
            state["log"].append(3.5)
            train(layout, fabric, model, optimizer, 3, seed=2)
        handle.result()
        allocations.append(asynchronous._process.staging.allocations)
    moved_on = any(not torch.equal(new, old) for new, old in zip(parameters_of(model), saved, strict=True))
    fabric.load(folder / "beside 1", state)
    came_back = all(torch.equal(new, old) for new, old in zip(parameters_of(model), saved, strict=True))
    fabric.close()
    return allocations, moved_on, came_back and state["log"] == [1.5, 2.5]


class Operations(TorchDispatchMode):
    """Notes which operations are called with DTensors; torch finds out the layout of the result of each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(argument, DTensor) for argument in args):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def save_what_is_laid_out_anew(folder: Path) -> tuple[list[int], bool]:
    """How often shards are described in four saves, and whether each has the values of its moment.

    The second and the last hold the objects of the one before.
    """
    fabric = LAYOUTS["fsdp 2"].fabric()
    state = {"tied": [tensors_of(0.0)] * 2}
    described, are_right = [0], True
    with pytest.MonkeyPatch.context() as patch:

        def counting(sharded: Any, held: Any = layout.held) -> Any:
            described[-1] += 1
            return held(sharded)

        patch.setattr(layout, "held", counting)
        for number in range(4):
            if number:
                described.append(0)
            if number == 2:  # as many as before, in the same places, and no longer one memory
                state["tied"] = [tensors_of(0.0), tensors_of(0.0)]
            for value, tensor in enumerate(state["tied"]):
                tensor.to_local().fill_(10 * number + value)
            fabric.save(folder / "last", state, async_=True).result()
            saved = load(folder / "last")["tied"]
            expected = [tensor.full_tensor() for tensor in state["tied"]]
            are_right = are_right and all(map(torch.equal, saved, expected))
    fabric.close()
    return described, are_right


def tensors_of(value: float) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    return DTensor.from_local(torch.full((3,), value), mesh, [Shard(0)], run_check=False)


def test_what_is_laid_out_as_before_is_not_described_anew_and_what_is_not_is_saved_right(
    ranks: RankPool, tmp_path: Path
) -> None:
    for described, are_right in ranks.run(save_what_is_laid_out_anew, tmp_path):
        assert are_right
        assert described[0] > 0
        assert described[2] > 0
        assert (described[1], described[3]) == (0, 0)


def count_operations_on_dtensors(folder: Path) -> list[str]:
    fabric = LAYOUTS["fsdp 2"].fabric()
    model = make_gpt()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    train("fsdp 2", fabric, model, optimizer, 1)
    state = {"model": model, "optimizer": optimizer}
    fabric.save(folder / "first", state, async_=True).result()
    with Operations() as operations:
        fabric.save(folder / "second", state, async_=True).result()
    fabric.close()
    return operations.seen


def test_the_training_waits_for_no_operation_on_a_dtensor(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(count_operations_on_dtensors, tmp_path) == [[], []]


class Recording(torch.nn.Linear):
    """Writes its bias as a list, by one of torch's ways to change a state, all of which take detached tensors."""

    def __init__(self, way: str) -> None:
        super().__init__(4, 4)
        if way == "hook":
            self.register_state_dict_post_hook(lambda _, state, prefix, __: self.to_list(state, prefix))
        if way == "object":
            self.state_dict = functools.partial(self.recorded, super().state_dict)  # type: ignore[method-assign]
        self.way = way

    def recorded(self, state_dict: Any, *, prefix: str = "", keep_vars: bool = False, **others: Any) -> Any:
        state = state_dict(prefix=prefix, keep_vars=keep_vars, **others)
        self.to_list(others.get("destination", state), prefix)
        return state

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.way == "class":
            self.to_list(destination, prefix)

    @staticmethod
    def to_list(state: Any, prefix: str) -> None:
        assert not state[f"{prefix}bias"].requires_grad
        state[f"{prefix}bias"] = state[f"{prefix}bias"].full_tensor().tolist()


def save_a_changed_state(folder: Path, way: str) -> Any:
    fabric = LAYOUTS["fsdp 2"].fabric()
    model = fabric.setup(torch.nn.Sequential(Recording(way), torch.nn.Linear(4, 4)))
    fabric.save(folder / "model", {"model": model})
    whole = model[0].bias.full_tensor().tolist()
    fabric.close()
    return load(folder / "model")["model"]["0.bias"], whole


@pytest.mark.parametrize("way", ["hook", "object", "class"])
def test_a_module_that_changes_its_state_is_given_detached_tensors(ranks: RankPool, tmp_path: Path, way: str) -> None:
    for saved, whole in ranks.run(save_a_changed_state, tmp_path, way):
        assert saved == whole


def bytes_of(path: Path) -> dict[str, bytes]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name if path.is_dir() else "file": file.read_bytes() for file in files}


# Plain pytest takes both kinds for one way to shard, and one kind for each other layout.
ALWAYS = {("single", "full"), ("ddp 2", "sharded"), ("fsdp 2", "full"), ("fsdp 2", "sharded")}
ALWAYS |= {("fsdp_cpu_offload 2", "full"), ("hsdp 2x2", "sharded"), ("2-D 2x2", "full")}


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        pytest.param(*cell, marks=() if cell in ALWAYS else pytest.mark.full)
        for cell in itertools.product(["single", "ddp 2", "fsdp 2", "fsdp_cpu_offload 2", "hsdp 2x2", "2-D 2x2"], KINDS)
    ],
)
def test_the_bytes_are_those_of_a_synchronous_save_while_the_training_goes_on(
    ranks: RankPool, tmp_path: Path, layout: str, kind: str
) -> None:
    for allocations, moved_on, came_back in run_under(ranks, layout, save_twice_and_go_on, tmp_path, kind):
        assert allocations[1] == allocations[0], "the second copy took new memory"
        assert moved_on
        assert came_back
    expected = bytes_of(tmp_path / "now")
    assert bytes_of(tmp_path / "beside 0") == expected
    assert bytes_of(tmp_path / "beside 1") == expected


def distributed(values: torch.Tensor) -> Any:
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    return distribute_tensor(values, DeviceMesh("cpu", list(range(dist.get_world_size()))), [Shard(0)])


def errors_of_a_failing_save(folder: Path, kind: str, failing: int, asks: int | None) -> list[str]:
    """What each rank is told when one can't write: by ``result()`` on rank ``asks`` (None: on none), then by a save."""
    state = {"tensor": distributed(torch.ones(400, 100))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    errors = []
    try:
        if dist.get_rank() == failing:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        handle = save(folder / "a.ckpt", state, state_dict_type=kind, async_=True)
        assert handle is not None
        handle.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if asks in (dist.get_rank(), -1):
        with pytest.raises(CheckpointError) as raised:
            handle.result()
        errors.append(str(raised.value))
    with contextlib.suppress(CheckpointError):
        try:
            save(folder / "b.ckpt", state, state_dict_type=kind)
        except CheckpointError as error:
            errors.append(str(error))
            raise
    save(folder / "c.ckpt", state, state_dict_type=kind)
    return errors


@pytest.mark.parametrize(("kind", "failing"), [("full", 0), ("sharded", 0), ("sharded", 1)])
@pytest.mark.parametrize("asks", ["all", "rank 0", "none"])
def test_what_fails_on_one_rank_is_told_to_all(
    ranks: RankPool, tmp_path: Path, kind: str, failing: int, asks: str
) -> None:
    asking = {"all": -1, "rank 0": 0, "none": None}[asks]
    by_rank = ranks.run(errors_of_a_failing_save, tmp_path, kind, failing, asking, ranks=2)
    for rank, errors in enumerate(by_rank):
        cause = "File too large" if rank == failing else f"failed on rank {failing}"
        told = [errors[0]] if asks == "all" else errors
        # One rank that asked is enough: no other is held up by what is known.
        assert bool(errors) == (asks != "rank 0" or rank == 0)
        assert all(cause in error for error in told)
        if asks == "none":
            assert "asynchronous save before this one failed" in errors[0]
    assert not (tmp_path / "a.ckpt").exists()
    assert (tmp_path / "b.ckpt").exists() == (asks != "none")
    assert (tmp_path / "c.ckpt").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".fabric")]


def save_in_other_ways(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        save(folder / "a.ckpt", {"number": 1}, async_=dist.get_rank() == 1)
    assert finish() is None
    return str(raised.value)


def test_ranks_that_do_not_agree_on_the_way_are_told_so(ranks: RankPool, tmp_path: Path) -> None:
    for number, error in enumerate(ranks.run(save_in_other_ways, tmp_path, ranks=2)):
        assert f"async_={number == 1} on rank {number}" in error


def groups_of_saves(folder: Path) -> int:
    """How many process groups three asynchronous saves make after a first one."""
    save(folder / "a.ckpt", {"number": 1}, async_=True)
    finish()
    before = len(dist.distributed_c10d._world.pg_map)
    for number in range(3):
        save(folder / f"{number}.ckpt", {"number": 1}, async_=True)
    finish()
    return len(dist.distributed_c10d._world.pg_map) - before


def test_all_saves_share_one_group_of_their_own(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(groups_of_saves, tmp_path, ranks=2) == [0, 0]


class Refuses:
    """An object whose state can't be had on rank 1."""

    def state_dict(self) -> dict[str, Any]:
        if dist.get_rank() == 1:
            raise RuntimeError("CUDA error: an illegal memory access")
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes nothing."""


def save_what_refuses(folder: Path, async_: bool) -> str:
    with pytest.raises(RuntimeError) as raised:
        save(folder / "a.ckpt", {"object": Refuses()}, async_=async_)
    return str(raised.value)


@pytest.mark.parametrize("async_", [False, True])
def test_an_error_of_one_rank_is_not_explained_by_lost_ranks(ranks: RankPool, tmp_path: Path, async_: bool) -> None:
    first, other = ranks.run(save_what_refuses, tmp_path, async_, ranks=2)
    assert other == "CUDA error: an illegal memory access"
    assert "failed on rank 1: RuntimeError: CUDA error" in first


def timeouts_of_groups(folder: Path) -> list[Any]:
    """Of the ranks' own group and of that of the saves, in seconds."""
    save(folder / "a.ckpt", {"number": 1}, async_=True)
    assert asynchronous._process.group is not None
    groups: list[Any] = [dist.group.WORLD, asynchronous._process.group()]
    finish()
    cpu = torch.device("cpu")
    return [group._get_backend(cpu).options._timeout.total_seconds() for group in groups]


def test_saves_wait_for_a_rank_as_long_as_the_training_does(ranks: RankPool, tmp_path: Path) -> None:
    for own, of_saves in ranks.run(timeouts_of_groups, tmp_path, ranks=2):
        assert own == of_saves


SCRIPT = """
import sys
import torch
from torch import nn
from fabric_lite import Fabric

fabric = Fabric(strategy="fsdp")
model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024))
optimizer = torch.optim.AdamW(model.parameters())
fabric.setup(model, optimizer)
fabric.backward(model(torch.ones(1, 1024)).sum())
optimizer.step()
state = {"model": model, "optimizer": optimizer, "done": True}
handle = fabric.save(sys.argv[1], state, state_dict_type=sys.argv[2], async_=True)
"""


@pytest.mark.parametrize(
    ("kind", "end"), [("full", ""), ("sharded", "raise SystemExit(0)"), ("sharded", "fabric.close()")]
)
def test_ranks_that_end_at_once_have_saved_all(tmp_path: Path, kind: str, end: str) -> None:
    script = write(tmp_path, SCRIPT + end)
    process = fabric_run("--devices", 2, script, tmp_path / "a.ckpt", kind)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    found = load(tmp_path / "a.ckpt")
    assert found["done"] is True
    assert found["model"]["1.weight"].shape == (1024, 1024)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "script.py"]


@pytest.mark.parametrize("end", ["", "raise SystemExit(75)", "fabric.close()"])
def test_an_error_that_no_rank_fetched_is_what_the_job_has_failed_of(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.ckpt").mkdir()
    (tmp_path / "a.ckpt" / "diary.txt").write_text("mine")
    process = fabric_run("--devices", 2, write(tmp_path, SCRIPT + end), tmp_path / "a.ckpt", "sharded")
    assert process.returncode == 1
    assert re.match(r"fabric-run: rank [01] failed: CheckpointError: ", process.stderr)
    assert process.stderr.count("taken by something that is no checkpoint") == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_fails_ends_the_save_under_way_with_the_others_help(tmp_path: Path, ranks: int) -> None:
    end = """
import pathlib, time
def last_of_it():
    time.sleep(2)  # longer than what a failure leaves ranks that save nothing
    pathlib.Path(f"saved{fabric.global_rank}").touch()
handle.then(last_of_it)
if fabric.global_rank == fabric.world_size - 1:
    raise ValueError("mine")
fabric.barrier()
"""
    process = fabric_run("--devices", ranks, write(tmp_path, SCRIPT + end), "a.ckpt", "sharded", cwd=tmp_path)
    assert process.returncode == 1
    assert process.stderr.startswith(f"fabric-run: rank {ranks - 1} failed: ValueError: mine\n")
    assert all((tmp_path / f"saved{rank}").exists() for rank in range(ranks))
    assert load(tmp_path / "a.ckpt")["done"] is True
    assert_nothing_left(tmp_path)


def save_states_that_change(folder: Path, kind: str) -> str:
    """Save after save of sharded tensors that are other ones each time, and at last some that one rank has alone."""
    tied = distributed(torch.full((8, 3), 2.0))
    states: list[dict[str, Any]] = [
        {"a": distributed(torch.zeros(8, 3)), "b": distributed(torch.ones(8, 3))},
        {"a": tied, "b": tied},
        {"a": distributed(torch.full((8, 3), 3.0)), "b": distributed(torch.full((8, 3), 4.0))},
        {"a": distributed(torch.full((5, 3), 5.0)), "b": distributed(torch.full((8, 3), 6.0))},
        {"c": distributed(torch.full((8, 3), 7.0)), "a": distributed(torch.full((8, 3), 8.0))},
        {"c": distributed(torch.full((8, 3), 9.0)), "a": distributed(torch.full((8, 3), 10.0))},
    ]
    for number, state in enumerate(states):
        handle = save(folder / f"{number}", state, state_dict_type=kind, async_=True)
        assert handle is not None
        for tensor in state.values():
            tensor.to_local().fill_(-1.0)
        handle.result()
    own = torch.zeros(8, 3) if dist.get_rank() == 0 else torch.zeros(9, 3)
    with pytest.raises(CheckpointError) as raised:
        save(folder / "x", {"c": distributed(own), "a": states[4]["a"]}, state_dict_type=kind, async_=True)
    last = save(folder / "y", states[5], state_dict_type=kind, async_=True)
    assert last is not None
    last.result()
    finish()
    return str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_save_takes_what_was_agreed_before_only_for_tensors_laid_out_alike(
    ranks: RankPool, tmp_path: Path, kind: str
) -> None:
    for error in ranks.run(save_states_that_change, tmp_path, kind, ranks=2):
        assert "different sharded tensors" in error
    names, values = ["ab", "ab", "ab", "ab", "ca", "ca", "ca"], [(0, 1), (2, 2), (3, 4), (5, 6), (7, 8), (9, 10)]
    for path, keys, expected in zip("012345y", names, [*values, (-1, -1)], strict=True):
        found = load(tmp_path / path)
        assert list(found) == list(keys)
        for key, value in zip(keys, expected, strict=True):
            assert torch.equal(found[key], torch.full((5 if (path, key) == ("3", "a") else 8, 3), float(value)))
    assert not (tmp_path / "x").exists()


def fail_after_the_save_on_rank_1(folder: Path) -> tuple[str, int]:
    """What is said at the end of the process, and how often its exit code is set."""
    fabric = LAYOUTS["ddp 2"].fabric()
    handle = fabric.save(folder / "a.ckpt", {"step": 1}, async_=True)
    assert handle is not None

    def read_back() -> None:
        if fabric.global_rank == 1:
            raise CheckpointError("its part is damaged")

    handle.then(read_back)
    codes: list[int] = []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setattr(asynchronous.process_end, "exit_with_failure", lambda: codes.append(1))
        asynchronous.finish_at_exit()
    fabric.close()
    return said.getvalue(), len(codes)


def test_an_error_of_one_rank_alone_is_said_by_that_rank_when_the_process_ends(ranks: RankPool, tmp_path: Path) -> None:
    said = f"fabric_lite: the asynchronous save of {tmp_path / 'a.ckpt'} failed.\nits part is damaged\n"
    assert ranks.run(fail_after_the_save_on_rank_1, tmp_path) == [("", 0), (said, 1)]
