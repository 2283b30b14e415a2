"""What the ranks of the Ray tests run; top-level, so that they can import it."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_lite import EXIT_PREEMPTED, Checkpoints, run_config

STEPS = 8


class OutOfIdeas(Exception):
    """An exception of the user's own."""


def train(fabric: Any, folder: str = "", kill_rank: int = -1, kept_node: str = "") -> dict[str, Any]:
    """Train for a few steps, resuming where there is something.

    In the first attempt rank ``kill_rank`` dies; or, with ``kept_node``, a node that is another one.
    """
    fabric.seed_everything(7)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    data = TensorDataset(torch.randn(64, 4), torch.randn(64, 2))
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=4, shuffle=True))
    state = {"fabric": fabric, "model": model, "optimizer": optimizer, "loader": loader}
    checkpoints = Checkpoints(Path(folder) / "run", every=2) if folder else None
    if checkpoints is not None:
        checkpoints.resume(state)
    begun_at = fabric.steps
    for inputs, targets in loader:
        loss = nn.functional.mse_loss(model(inputs), targets)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if checkpoints is not None:
            checkpoints.step(state)
        is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if is_first and fabric.global_rank == kill_rank and fabric.steps == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if is_first and kept_node and fabric.steps == 5:
            _lose_a_node(fabric, kept_node)
        if fabric.steps == STEPS:
            break
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return {"weights": weights, "steps": fabric.steps, "begun_at": begun_at}


def _lose_a_node(fabric: Any, kept_node: str) -> None:
    """Kill the first rank that is on another node, and the node's raylet before, which is its parent."""
    import ray

    addresses = _gathered(fabric, ray.util.get_node_ip_address())
    lost = next(rank for rank, address in enumerate(addresses) if address != kept_node)
    if fabric.global_rank == lost:
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def places(fabric: Any) -> list[dict[str, Any]]:
    """Where each rank finds itself."""
    config = run_config.current()
    assert config is not None
    own = {
        "pid": os.getpid(),
        "rank": fabric.global_rank,
        "local_rank": fabric.local_rank,
        "node_rank": fabric.node_rank,
        "world_size": fabric.world_size,
        "main_address": os.environ["MASTER_ADDR"],
        "only_accelerator": config.only_accelerator,
        "device": fabric.device.type,
        "devices": config.devices,
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "folder": os.getcwd(),
        "is_main_thread": threading.current_thread() is threading.main_thread(),
    }
    return _gathered(fabric, own)


def fail(fabric: Any) -> None:
    """Rank 1 raises while the other waits for it."""
    if fabric.global_rank == 1:
        raise OutOfIdeas("not even one")
    fabric.barrier()


def leave_with(fabric: Any, code: int) -> None:
    """Rank 1 exits while the other waits for it."""
    if fabric.global_rank == 1:
        raise SystemExit(code)
    fabric.barrier()


def wait_for_ever(fabric: Any, fifo: str) -> None:
    """Tell the driver that the ranks run, and wait."""
    _tell_pids(fabric, fifo)
    threading.Event().wait()


def train_until_asked(fabric: Any, folder: str, fifo: str, full_disk_of: int = -1) -> None:
    """Tell the driver that the ranks run, step until all are asked to leave, save, and leave.

    Rank ``full_disk_of`` has no room for what it saves.
    """
    checkpoints = Checkpoints(Path(folder) / "run")
    model = fabric.setup(nn.Linear(2, 2))
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    while not fabric.should_stop:
        fabric.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        optimizer.zero_grad()
        if fabric.steps == 1:
            _tell_pids(fabric, fifo)
    if fabric.global_rank == full_disk_of:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    checkpoints.save({"fabric": fabric, "model": model})
    raise SystemExit(EXIT_PREEMPTED)


def _gathered(fabric: Any, own: Any) -> list[Any]:
    found = [own] * fabric.world_size
    if fabric.world_size > 1:
        torch.distributed.all_gather_object(found, own)
    return found


def _tell_pids(fabric: Any, fifo: str) -> None:
    pids = _gathered(fabric, os.getpid())
    if fabric.global_rank == 0:
        Path(fifo).write_text(" ".join(map(str, pids)))
