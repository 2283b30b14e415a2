"""Saves beside the training loop: what reaches the file, who waits for whom, and errors that nobody fetched."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_lite import Fabric, SaveHandle, notices
from fabric_lite.checkpoint import asynchronous, finish, load, save
from fabric_lite.errors import CheckpointError, FabricTypeError

LIMIT_SECONDS = 60.0
KINDS = ["full", "sharded"]


@pytest.fixture(autouse=True)
def every_save_is_finished() -> Iterator[None]:
    """Each test begins and ends without a save under way and without memory for copies."""
    finish()
    yield
    assert finish() is None, "an error was left"


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 6), nn.BatchNorm1d(6))
    model[0].weight = nn.Parameter(torch.randn(6, 8).t())  # a transposed view
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    memory = torch.arange(40.0)
    return {
        "whole": memory.view(5, 8),
        "rows": memory.view(5, 8)[1:3],
        "column": torch.arange(40.0).view(5, 8)[:, 3],
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "conjugated": torch.arange(4.0).to(torch.complex64).conj(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5),
        "bfloat16": torch.arange(7.0).bfloat16(),
        "float8": torch.arange(8.0).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False]),
        "sparse": torch.sparse_coo_tensor(torch.tensor([[0, 2], [1, 2]]), torch.ones(2), check_invariants=True),
        "csr": torch.sparse_csr_tensor(
            torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.ones(2), (2, 2), check_invariants=True
        ),
        "channels last": torch.arange(48.0).view(1, 3, 4, 4).to(memory_format=torch.channels_last),
    }


def plain_values() -> dict[str, Any]:
    return {"words": ["a", "b"], "nested": {"numbers": [1, 2.5, None]}, "bytes": bytearray(b"12"), "set": {1, 2}}


def bytes_of(path: Path) -> dict[str, bytes]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name if path.is_dir() else "file": file.read_bytes() for file in files}


def spoil(state: dict[str, Any]) -> None:
    """Change in place all that a training script may change."""
    model, optimizer = state["model"], state["optimizer"]
    moments = [value for entry in optimizer.state.values() for value in entry.values()]
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers(), *moments, *state["tensors"].values()]:
            if tensor.layout == torch.strided:
                tensor.zero_()
            else:
                tensor.values().zero_() if tensor.layout == torch.sparse_csr else tensor._values().zero_()
    optimizer.param_groups[0]["lr"] = 7.0
    state["values"]["words"].append("c")
    state["values"]["nested"]["numbers"][0] = 8
    state["values"]["bytes"][0] = 0
    state["values"]["set"].add(9)
    state["epoch"] = 99


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_after_the_call_does_not_reach_the_checkpoint_whose_bytes_are_a_synchronous_saves(
    tmp_path: Path, kind: str
) -> None:
    model, optimizer = trained()
    state = {
        "model": model,
        "optimizer": optimizer,
        "tied": [model[0].weight, model[0].weight],
        "tensors": tensors_of_all_kinds(),
        "values": plain_values(),
        "epoch": 3,
    }
    save(tmp_path / "now", state, state_dict_type=kind)
    handle = save(tmp_path / "beside", state, state_dict_type=kind, async_=True)
    spoil(state)
    assert isinstance(handle, SaveHandle)
    handle.result()
    assert handle.done()
    assert bytes_of(tmp_path / "beside") == bytes_of(tmp_path / "now")


def test_a_tensor_that_is_copied_whole_is_copied_once_however_many_views_it_has(tmp_path: Path) -> None:
    memory = torch.arange(1000.0)
    state = {str(start): memory[start : start + 500] for start in range(0, 500, 100)}
    handle = save(tmp_path / "a.ckpt", state, async_=True)
    assert handle is not None
    handle.result()
    assert asynchronous._process.staging.allocations == 1
    loaded = load(tmp_path / "a.ckpt")
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values()}) == 1


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", KINDS)
def test_the_second_save_allocates_nothing_for_its_copy_and_has_its_own_values(tmp_path: Path, kind: str) -> None:
    model, optimizer = trained()
    state = {"model": model, "optimizer": optimizer, "tensors": tensors_of_all_kinds()}
    counts = []
    for number in range(3):
        with torch.no_grad():
            model[0].weight.fill_(number)
        handle = save(tmp_path / f"{number}.ckpt", state, state_dict_type=kind, async_=True)
        assert handle is not None
        handle.result()
        counts.append(asynchronous._process.staging.allocations)
    assert counts == [counts[0]] * 3
    assert counts[0] > 10
    for number in range(3):
        assert bool((load(tmp_path / f"{number}.ckpt")["model"]["0.weight"] == number).all())


def test_memory_for_copies_that_no_save_uses_any_more_is_given_back(tmp_path: Path) -> None:
    staging = asynchronous._process.staging
    save(tmp_path / "a.ckpt", {"large": torch.ones(1000)}, async_=True)
    for _ in range(5):
        save(tmp_path / "a.ckpt", {"small": torch.ones(10)}, async_=True)
    finish()
    assert not staging._free
    save(tmp_path / "a.ckpt", {"large": torch.ones(1000)}, async_=True)
    assert asynchronous._process.staging.allocations == 1, "finish() has begun afresh"


@pytest.mark.parametrize("async_", [False, True])
def test_the_next_save_comes_after_the_one_under_way(tmp_path: Path, async_: bool) -> None:
    first = save(tmp_path / "a.ckpt", {"large": torch.ones(2_000_000), "number": 1}, async_=True)
    second = save(tmp_path / "a.ckpt", {"number": 2}, async_=async_)
    assert first is not None
    assert first.done()
    assert (second is None) != async_
    finish()
    assert load(tmp_path / "a.ckpt") == {"number": 2}


def test_a_save_that_has_to_wait_long_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asynchronous, "NOTICEABLE_SECONDS", 0.01)

    def until_it_is_said() -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not notices._said:
            assert time.monotonic() < deadline

    for _ in range(2):
        asynchronous._process.last = SaveHandle(tmp_path / "slow.ckpt", until_it_is_said)
        save(tmp_path / "a.ckpt", {"number": 1})
    assert capsys.readouterr().err.count("a save waits until the asynchronous one before it is on the disk") == 1


def failed(tmp_path: Path) -> SaveHandle:
    """A save that fails in writing, over a folder that is no checkpoint."""
    (tmp_path / "taken").mkdir(exist_ok=True)
    (tmp_path / "taken" / "diary.txt").write_text("mine")
    handle = save(tmp_path / "taken", {"number": 1}, async_=True)
    assert handle is not None
    return handle


def test_an_error_is_raised_by_result_and_then_holds_nobody_up(tmp_path: Path) -> None:
    handle = failed(tmp_path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="taken by something that is no checkpoint"):
            handle.result()
    assert handle.done()
    save(tmp_path / "a.ckpt", {"number": 2})
    assert load(tmp_path / "a.ckpt") == {"number": 2}


@pytest.mark.parametrize("async_", [False, True])
def test_an_error_that_nobody_fetched_is_raised_by_the_next_save_once(tmp_path: Path, async_: bool) -> None:
    failed(tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)asynchronous save before this one failed.*taken by something"):
        save(tmp_path / "a.ckpt", {"number": 2}, async_=async_)
    assert not (tmp_path / "a.ckpt").exists()
    save(tmp_path / "a.ckpt", {"number": 3}, async_=async_)
    finish()
    assert load(tmp_path / "a.ckpt") == {"number": 3}


def test_an_error_that_nobody_fetched_is_raised_by_close_when_all_is_closed(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(nn.Linear(2, 2))
    failed(tmp_path)
    with pytest.raises(CheckpointError, match="taken by something"):
        fabric.close()
    assert type(model) is nn.Linear
    fabric.close()


def test_what_cannot_be_saved_is_refused_by_the_call_and_leaves_no_save_behind(tmp_path: Path) -> None:
    with pytest.raises(FabricTypeError, match="could only be read back by running code"):
        save(tmp_path / "a.ckpt", {"path": tmp_path}, async_=True)
    assert finish() is None
    assert list(tmp_path.iterdir()) == []


def test_close_waits_for_the_save(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    handle = fabric.save(tmp_path / "a.ckpt", {"large": torch.ones(2_000_000)}, async_=True)
    fabric.close()
    assert handle is not None
    assert handle.done()
    assert load(tmp_path / "a.ckpt")["large"].sum() == 2_000_000


def ended(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Run a script that begins to save 32 MiB beside it, and then ends as ``body`` says."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        import torch
        from fabric_lite import Fabric

        fabric = Fabric(accelerator="cpu", devices=1)
        state = {"large": torch.ones(8 << 20), "step": 1}
        handle = fabric.save(sys.argv[1], state, async_=True)
        assert not handle.done(), "the save was over too early to show anything"
        """
    ) + textwrap.dedent(body)
    command = [sys.executable, "-W", "error", "-c", script, str(folder / "a.ckpt")]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise ValueError('mine')", 1, "ValueError: mine"),
        ("raise KeyboardInterrupt", -2, "KeyboardInterrupt"),
        ("os.kill(os.getpid(), signal.SIGINT); handle.result()", -2, "KeyboardInterrupt"),
    ],
)
def test_however_the_script_ends_the_save_ends_well_before(tmp_path: Path, body: str, code: int, said: str) -> None:
    process = ended(tmp_path, body)
    assert process.returncode == code, process.stderr
    assert said in process.stderr
    assert (not process.stderr) == (not said)
    assert load(tmp_path / "a.ckpt")["large"].sum() == 8 << 20
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_an_error_that_nobody_fetched_is_said_when_the_process_ends(tmp_path: Path) -> None:
    failed_one = tmp_path / "a.ckpt"
    failed_one.mkdir()
    (failed_one / "diary.txt").write_text("mine")
    script = """
    import atexit, sys
    atexit.register(print, "registered first")
    from fabric_lite import Fabric
    Fabric(accelerator="cpu", devices=1).save(sys.argv[1], {"step": 1}, async_=True)
    """
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), str(failed_one)],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert (process.returncode, process.stdout) == (1, "registered first\n")
    [first, *_] = process.stderr.splitlines()
    assert first == f"fabric_lite: the asynchronous save of {failed_one} failed."
    assert "taken by something that is no checkpoint" in process.stderr
    assert "Traceback" not in process.stderr
