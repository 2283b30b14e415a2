"""What a run was: who started it how, from which code, on what; kept beside its checkpoints and sent to its loggers."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fabric_lite.checkpoint.commit import committed_file
from fabric_lite.device import Accelerator
from fabric_lite.machine import memory_of_machine, processor
from fabric_lite.run import Run
from fabric_lite.seed import latest_seed

__all__ = ["record_of", "write_record"]

_GIT_SECONDS = 5.0


def record_of(run: Run, arguments: Mapping[str, Any], version: str, started: datetime.datetime) -> dict[str, Any]:
    """Plain data about the run of this process, as of now.

    Args:
        run: Its devices, strategy and precision.
        arguments: Those that ``Fabric`` was given.
        version: Of fabric_lite.
        started: When the Fabric was made.
    """
    return {
        "started": started.isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable or "python").name, *sys.argv]),
        "arguments": {name: _plain(value) for name, value in arguments.items() if value is not None},
        "seed": latest_seed(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "strategy": repr(run.strategy),
        "precision": str(run.precision),
        "world_size": run.topology.world_size,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "fabric_lite": version,
        },
        "git": _git(_folder_of_script()),
        "hardware": _hardware(run.accelerator, run.device),
    }


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Add a record to ``run.json`` in ``folder``, a list with one for each start of the run.

    Raises:
        CheckpointError: ``run.json`` is there and no regular file.
        OSError: It could not be written.
    """
    path = folder / "run.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or no longer one
        before = []
    starts = [*before, record] if isinstance(before, list) else [record]
    with committed_file(path) as file:
        file.write(json.dumps(starts, indent=2).encode() + b"\n")


def _folder_of_script() -> Path:
    """Where the user's code is: in a session or a notebook, which has no file, where it was started."""
    script = Path(next(iter(sys.argv), ""))
    return script.resolve().parent if script.is_file() and "ipykernel" not in sys.modules else Path.cwd()


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Accelerator):
        return value.device_type
    if isinstance(value, (str, int, float, bool)):
        return value
    kind: Any = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__repr__ is object.__repr__:  # it is an address, which says nothing
        return name
    try:
        return repr(value)
    except Exception:  # the user's own
        return name


def _git(folder: Path) -> dict[str, Any] | None:
    """The revision of the script's code, and whether there are changes besides; None where there is none."""
    revision = _output_of_git(folder, "rev-parse", "HEAD")
    if not revision:
        return None
    return {"revision": revision, "has_changes": bool(_output_of_git(folder, "status", "--porcelain", "-uno"))}


def _output_of_git(folder: Path, *words: str) -> str | None:
    try:
        # It would lock the index to refresh it, in the way of the user's own git.
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", folder, *words],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_GIT_SECONDS,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or one that takes too long
        return None
    return done.stdout.strip()


def _hardware(accelerator: Accelerator, device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_of_machine(),
        "accelerator": accelerator.device_type,
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    return found
