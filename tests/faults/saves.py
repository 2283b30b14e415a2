"""The saves that fault tests interrupt, and what a reader then finds."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path
from typing import Any

import torch

from fabric_lite.checkpoint import CheckpointNotFoundError, exchange, load, save
from tests.faults.nursery import Nursery
from tests.faults.operations import Operation, Watch, kill_all_ranks, kill_this_rank

__all__ = ["Kill", "Way", "found", "interrupted", "operations_of", "save_number", "saved", "state_of"]

LENGTH = 3000  # of each tensor: more than a file's buffer


@dataclasses.dataclass(frozen=True)
class Way:
    """How a checkpoint is saved.

    Args:
        kind: "full" for a file, "sharded" for a folder.
        ranks: How many ranks save; with more than one, the tensors are sharded.
        in_two_steps: Whether the file system can't exchange two names.
        async_: Whether it is written beside the loop.
        keep: None: ``save`` to one name. Else ``Checkpoints``, which keeps so many; the name is their folder.
    """

    kind: str
    ranks: int = 1
    in_two_steps: bool = False
    async_: bool = False
    keep: int | None = None

    def __str__(self) -> str:
        words = ["file" if self.kind == "full" else "sharded"]
        words += [f"{self.ranks} ranks"] if self.ranks > 1 else []
        words += ["async"] if self.async_ else []
        words += ["in two steps"] if self.in_two_steps else []
        words += [f"keep {self.keep}"] if self.keep else []
        return " ".join(words)


@dataclasses.dataclass(frozen=True)
class Kill:
    """Where a save is interrupted: on which rank, at which of its operations, before or after it, and who dies."""

    rank: int
    number: int
    moment: str
    alone: bool = False


def state_of(number: int, ranks: int) -> dict[str, Any]:
    """A state that is told from all others in each of its values."""
    tensors = [torch.full((LENGTH,), float(number)) for _ in range(2)]
    if ranks > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = init_device_mesh("cpu", (ranks,))
        tensors = [DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False) for tensor in tensors]
    return {"number": number, "weights": tensors, "list": [number] * 3}


def save_number(path: Path, way: Way, number: int) -> None:
    """Save the state of this number; every rank calls it."""
    if way.keep is not None:
        _save_by_step(path, way, number)
        return
    handle = save(path, state_of(number, way.ranks), state_dict_type=way.kind, async_=way.async_)
    if handle is not None:
        handle.result()


def _save_by_step(folder: Path, way: Way, number: int) -> None:
    """What a script does that was started again: it resumes, makes a step, and saves."""
    from fabric_lite import Checkpoints, Fabric

    fabric = Fabric(accelerator="cpu", devices=way.ranks, strategy="fsdp" if way.kind == "sharded" else "auto")
    fabric.launch()
    model = torch.nn.Linear(2, 2)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    trained = {"fabric": fabric, "model": model, "optimizer": optimizer}
    checkpoints = Checkpoints(folder, keep_last=way.keep, async_=way.async_)
    with contextlib.redirect_stdout(io.StringIO()):
        checkpoints.resume({**state_of(0, way.ranks), **trained})
    # A checkpoint that is written beside the loop lets older ones go at the save after it.
    for _ in range(2 if way.async_ else 1):
        fabric.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        checkpoints.save({**state_of(number, way.ranks), **trained})
    fabric.close()


def found(path: Path, way: Way) -> int | None:
    """The number of the state that is under this name; None if there is nothing. Raises for anything in between."""
    from fabric_lite import Checkpoints

    newest = path if way.keep is None else Checkpoints(path).latest()
    try:
        content = load(newest) if newest is not None else {}  # compares all checksums
    except CheckpointNotFoundError:
        return None
    if newest is None:
        return None
    number = int(content["number"])
    assert content["list"] == [number] * 3
    for tensor in content["weights"]:
        assert len(tensor) % LENGTH == 0
        assert tensor.eq(number).all(), f"{path} is mixed"
    return number


def saved(nursery: Nursery, path: Path, way: Way, number: int) -> None:
    """Save undisturbed."""
    ends = nursery.run(_save, path, way, number, ranks=way.ranks)
    assert [end.code for end in ends] == [0] * way.ranks


def operations_of(nursery: Nursery, folder: Path, path: Path, way: Way, number: int) -> list[list[Operation]]:
    """Save undisturbed; each rank's changes below ``folder``."""
    ends = nursery.run(_watched, folder, path, way, number, None, ranks=way.ranks)
    assert [end.code for end in ends] == [0] * way.ranks
    return [end.value for end in ends]


def interrupted(nursery: Nursery, folder: Path, path: Path, way: Way, number: int, kill: Kill) -> None:
    """Save, and be killed there; another rank that lives on is told by a CheckpointError, if at all."""
    ends = nursery.run(_watched, folder, path, way, number, kill, ranks=way.ranks)
    assert ends[kill.rank].code == -9, (ends, kill)
    if kill.alone:
        # Checkpoints stand in a training loop, whose own collectives fail by themselves.
        allowed = {0} if way.keep is None else {0, 1}
        assert {end.code for rank, end in enumerate(ends) if rank != kill.rank} <= allowed, (ends, kill)


def _save(path: Path, way: Way, number: int) -> None:
    if way.in_two_steps:
        exchange._system_call = lambda: None  # type: ignore[assignment]
    save_number(path, way, number)


def _watched(folder: Path, path: Path, way: Way, number: int, kill: Kill | None) -> list[Operation]:
    from fabric_lite.collectives import rank
    from fabric_lite.errors import CheckpointError

    def dies(moment: str) -> Any:
        def perhaps(at: int) -> None:
            if kill is not None and (rank(), at, moment) == (kill.rank, kill.number, kill.moment):
                kill_this_rank() if kill.alone else kill_all_ranks()

        return perhaps

    watch = Watch(folder, dies("before"), dies("after"))
    try:
        _save(path, way, number)
    except CheckpointError:
        if kill is None or not kill.alone:
            raise
    return watch.operations
