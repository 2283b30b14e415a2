"""What the command line asks for, as plain data."""

from __future__ import annotations

import dataclasses

from fabric_lite.accelerator_names import COUNTED, OF_ONE_PROCESS
from fabric_lite.errors import LaunchError
from fabric_lite.launch.rank import ScriptCall
from fabric_lite.run_config import RunConfig

__all__ = ["LaunchPlan", "Rendezvous", "count_in", "parse_devices", "parse_num_nodes"]


@dataclasses.dataclass(frozen=True)
class Rendezvous:
    """How the supervisors of several nodes find each other.

    Args:
        num_nodes: How many there are, at most.
        backend: ``"static"``, or a backend of torchelastic such as ``"c10d"``.
        node_rank: This node's number; None where the backend gives it.
        endpoint: ``host:port`` at which they meet.
        run_id: The job's name.
        min_nodes: How many suffice; None: all of them.
        timeout_seconds: How long a node waits for the others.
    """

    num_nodes: int
    backend: str
    node_rank: int | None
    endpoint: str
    run_id: str
    min_nodes: int | None = None
    timeout_seconds: float = 600.0


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
    """One launch on this node.

    Args:
        script: What every rank runs.
        run_config: What every rank is told.
        max_restarts: How often all ranks start again after a failure.
        log_dir: The folder of the ranks' logs.
        main_address: The address of a single node's store.
        main_port: Its port; 0 takes a free one.
        rendezvous: The other nodes; None on a single node.
        requeue: Whether Slurm is asked to run the job again after a stop for preemption.
    """

    script: ScriptCall
    run_config: RunConfig
    max_restarts: int = 0
    log_dir: str | None = None
    main_address: str = "127.0.0.1"
    main_port: int = 0
    rendezvous: Rendezvous | None = None
    requeue: bool = False


def parse_devices(text: str) -> int | tuple[int, ...] | None:
    """Return a count, a tuple of indices, or None for all that there are (``"auto"``, ``"-1"``).

    Raises:
        LaunchError: Neither of these.
    """
    if text in ("auto", "-1"):
        return None
    try:
        numbers = [int(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        raise _bad_devices("is not a number of devices", text) from None
    if "," not in text:
        if numbers[0] < 1:
            raise _bad_devices("must be at least 1", text)
        return numbers[0]
    if min(numbers) < 0:
        raise _bad_devices("holds a negative index", text)
    if len(set(numbers)) < len(numbers):
        raise _bad_devices("names a device twice", text)
    return tuple(numbers)


def parse_num_nodes(text: str) -> tuple[int, int]:
    """Return the least and the greatest number of nodes of ``"2"`` or ``"1:4"``.

    Raises:
        LaunchError: Neither of these.
    """
    least, _, most = text.partition(":")
    try:
        numbers = int(least), int(most or least)
    except ValueError:
        numbers = (0, 0)
    if not 1 <= numbers[0] <= numbers[1] or text.endswith(":"):
        raise LaunchError(
            "--num-nodes must be at least 1: a number, or the least and the greatest.",
            given=f"--num-nodes {text}",
            fix="--num-nodes 2, or --num-nodes 1:4",
        )
    return numbers


def count_in(devices: int | tuple[int, ...] | None, accelerator: str | None) -> int | None:
    """Return how many ranks that is; None where the accelerators have to be counted."""
    if devices is None:
        return 1 if accelerator in OF_ONE_PROCESS else None
    return devices if isinstance(devices, int) else len(devices)


def count_present(kind: str | None, count: int, accelerator: str | None) -> int:
    """Return the number of ranks for "all devices", given the ``count`` of accelerators of ``kind`` on this machine.

    Raises:
        LaunchError: An accelerator was asked for and there is none.
    """
    if accelerator in COUNTED and accelerator not in ("gpu", kind):
        count = 0
    if count == 0 and accelerator in COUNTED:
        raise LaunchError(
            f"There is no accelerator of kind {accelerator!r} on this machine.",
            given=f"--accelerator {accelerator}; present: {kind or 'cpu alone'}",
            fix="--accelerator auto, or --accelerator cpu --devices N",
        )
    return max(1, count)


def _bad_devices(what: str, text: str) -> LaunchError:
    return LaunchError(
        f"--devices {what}.", given=f"--devices {text}", fix='a count ("2"), indices ("0,2" or "0,"), or "auto"'
    )
