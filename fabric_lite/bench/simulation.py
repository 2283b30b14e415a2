"""What one rank of a job of any size needs, found by running the user's script with tensors that have no memory."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from fabric_lite.bench.devices import Device, Estimate, estimate_step, find_device
from fabric_lite.bench.shown import figure
from fabric_lite.bench.steps import Step
from fabric_lite.errors import FabricError, FabricValueError
from fabric_lite.launch.failure import ending

__all__ = ["Simulated", "SimulationError", "simulate"]

_OFFLOAD = (
    "offload is not simulated: what the host would hold counts as the device's memory, and no time of its copies is "
    "known, so nothing is said of what fits or how long a step takes"
)


class SimulationError(FabricError):
    """The script could not be simulated.

    Attributes:
        cause: Why, in one line.
        fix: What to do about it.
    """

    cause: str = ""
    fix: str = ""


@dataclasses.dataclass(frozen=True)
class Simulated:
    """What was found of rank 0.

    Args:
        world_size: Ranks of the job.
        peak_bytes: The most bytes of tensors that were alive at once.
        parts: The same by what they were: parameters, gradients, optimizer, activations, communication, other.
        steps: What the rank did in each step; the first one begins with the script, so that setting up is in it.
        fits: Whether that is less than the device has; None without a device, and with ``offloads``.
        sentence: That in words, and what would help.
        estimate: How long the last step takes on the device; None where ``fits`` is.
        notices: What the user should know besides, in lines.
        offloads: Whether the strategy leaves shards to the host, which is not simulated: they count as all others.
    """

    world_size: int
    peak_bytes: int
    parts: Mapping[str, int]
    steps: tuple[Step, ...]
    fits: bool | None = None
    sentence: str = ""
    estimate: Estimate | None = None
    notices: tuple[str, ...] = ()
    offloads: bool = False


def simulate(
    script: str | Path,
    arguments: Sequence[str] = (),
    *,
    world_size: int,
    nodes: int = 1,
    strategy: str | None = None,
    precision: str | None = None,
    device: str | None = None,
    steps: int = 3,
    batch_size: int | None = None,
    timeout_seconds: float = 600,
) -> Simulated:
    """Run ``script`` as rank 0 of ``world_size``, without any other rank, memory or arithmetic, for a few steps.

    Models and what engines make for them have shapes alone, all else of the script is real: it reads its data, and
    prints. A fake tensor is taken to be full of ones where its numbers are asked for, so a script that branches on them
    may do something else than in a real run: a notice says so. Saves and logs do nothing.

    Operators are those of a CPU, so under mixed precision and in attention a device may keep other activations. What a
    kernel or a communication library takes for itself is not seen. Offload to the host is not simulated.

    Args:
        script: The user's own script, which trains under Fabric.
        arguments: Its arguments.
        world_size: Ranks, over all nodes.
        nodes: Nodes, of equally many ranks.
        strategy: As ``fabric-run --strategy``; None is the script's own.
        precision: As ``fabric-run --precision``; None is the script's own.
        device: The name of a device, such as ``h100-80gb``: then tensors that stay on the host do not count, and
            models count from ``setup`` on. None counts all tensors, as for training on a CPU.
        steps: Of the optimizer. From the third on all are alike: DDP orders its buckets anew before the second.
        batch_size: Of every loader, per rank; None is the script's own.
        timeout_seconds: After so long the simulation is ended.

    Raises:
        FabricValueError: The ranks cannot be divided over the nodes, or the device is not known.
        SimulationError: The script failed, or made no step.
    """
    if nodes < 1 or world_size < nodes or world_size % nodes:
        raise FabricValueError(
            "Every node has equally many ranks, at least one.",
            given=f"world_size={world_size}, nodes={nodes}",
            fix="world_size= a multiple of nodes=",
        )
    chosen = None if device is None else find_device(device)
    order = _Order(
        str(script), tuple(arguments), world_size, nodes, strategy, precision, steps, batch_size, chosen is None
    )
    found = _ask(order, timeout_seconds)
    if chosen is None:
        return found
    if found.offloads:
        return dataclasses.replace(found, sentence=_OFFLOAD)
    fits = found.peak_bytes <= chosen.memory_bytes
    whole = f"{chosen.memory_bytes / 2**20:,.0f} MiB ({chosen.memory_bytes / 1e9:g} GB)"
    needed = f"{figure(found.peak_bytes / 2**20)} MiB of {whole}"
    sentence = f"{'fits' if fits else 'does not fit'}: {needed}"
    if not fits:
        sentence += _what_would_fit(order, chosen, timeout_seconds)
    return dataclasses.replace(found, fits=fits, sentence=sentence, estimate=estimate_step(found.steps[-1], chosen))


@dataclasses.dataclass(frozen=True)
class _Order:
    """What a simulated rank is told."""

    script: str
    arguments: tuple[str, ...]
    world_size: int
    nodes: int
    strategy: str | None
    precision: str | None
    steps: int
    batch_size: int | None
    counts_host: bool
    checkpoints_activations: bool = False


def _what_would_fit(order: _Order, device: Device, timeout_seconds: float) -> str:
    """Other ways to run, those that were simulated and fit."""
    others = {
        "fsdp": dataclasses.replace(order, strategy="fsdp"),
        "activation checkpointing": dataclasses.replace(order, checkpoints_activations=True),
        "fsdp and activation checkpointing": dataclasses.replace(order, strategy="fsdp", checkpoints_activations=True),
    }
    fitting: list[str] = []
    for name, other in others.items():
        if other == order or (fitting and " and " in name):
            continue
        try:
            if _ask(other, timeout_seconds).peak_bytes <= device.memory_bytes:
                fitting.append(name)
        except SimulationError:
            continue  # not every model can be sharded or has repeated layers: no way out then
    return f"; fits with {', or with '.join(fitting)}" if fitting else "; nor with fsdp or activation checkpointing"


def _ask(order: _Order, timeout_seconds: float) -> Simulated:
    """Run the order in a process of its own, so that no fake group or mode is left in this one."""
    place = {
        "RANK": 0, "WORLD_SIZE": order.world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": order.world_size // order.nodes,
        "GROUP_RANK": 0, "GROUP_WORLD_SIZE": order.nodes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="fabric_lite_simulation_") as folder:
        order_path, answer_path = Path(folder, "order.json"), Path(folder, "answer.json")
        order_path.write_text(json.dumps(dataclasses.asdict(order)), encoding="utf-8")
        module = "fabric_lite.bench.simulated_rank"
        command = [sys.executable, "-m", module, str(order_path), str(answer_path), str(os.getpid())]
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        try:
            finished = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout_seconds, check=False
            )
        except subprocess.TimeoutExpired as error:
            cause = f"it took more than {timeout_seconds:g} seconds, and was ended"
            raise _failed(order, cause, "", "fewer steps, or a script that comes to its first step sooner") from error
        if not answer_path.exists():
            raise _failed(order, f"it died: {ending(finished.returncode)}", finished.stderr)
        answer = json.loads(answer_path.read_text(encoding="utf-8"))
    if answer["failure"] is not None:
        raise _failed(order, answer["failure"]["cause"], finished.stderr, answer["failure"]["fix"])
    if not answer["steps"]:
        fix = "a script that trains under Fabric, and arguments with which it makes a step"
        raise _failed(order, "no optimizer made a step", finished.stderr, fix)
    steps = tuple(Step(**step) for step in answer["steps"])
    notices, offloads = tuple(answer["notices"]), answer["offloads"]
    return Simulated(order.world_size, answer["peak"], answer["parts"], steps, notices=notices, offloads=offloads)


def _failed(order: _Order, cause: str, output: str, fix: str | None = None) -> SimulationError:
    if fix is None:
        alone = shlex.join(["python", order.script, *order.arguments])
        fix = f"`{alone}`; if it runs, that line needs what a tensor without memory does not have"
    given = output[-3000:] or order.script
    error = SimulationError(f"The script could not be simulated: {cause}", given=given, fix=fix)
    error.cause, error.fix = cause, fix
    return error
