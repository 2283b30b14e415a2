"""A benchmark from its arguments to its results."""

from __future__ import annotations

import datetime
import itertools
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata

from fabric_lite.bench.measuring import Course, Measured, Progress, measure
from fabric_lite.bench.results import About, Combination, Results
from fabric_lite.errors import FabricValueError, LaunchError
from fabric_lite.launch.environment import cores
from fabric_lite.launch.job import find_accelerators
from fabric_lite.launch.rank import ScriptCall
from fabric_lite.machine import memory_of_machine, processor

__all__ = ["DEFAULTS", "check_script", "run", "strategies_for"]


class DEFAULTS:
    """What is measured where nothing else is asked for."""

    PRECISIONS = ("32-true", "bf16-mixed")
    STEPS = 20
    WARMUP = 5
    CHECK_STEPS = 3
    BUDGET_SECONDS = 300.0
    TIMEOUT_SECONDS = 300.0


def run(
    script: str,
    *arguments: str,
    strategies: Sequence[str] | None = None,
    precisions: Sequence[str] = DEFAULTS.PRECISIONS,
    devices: Sequence[int] | None = None,
    batch_sizes: Sequence[int | None] = (None,),
    baseline: str | None = None,
    accelerator: str | None = None,
    steps: int = DEFAULTS.STEPS,
    warmup: int = DEFAULTS.WARMUP,
    check_steps: int = DEFAULTS.CHECK_STEPS,
    rounds: int | None = None,
    budget_seconds: float = DEFAULTS.BUDGET_SECONDS,
    timeout_seconds: float = DEFAULTS.TIMEOUT_SECONDS,
    progress: Progress = lambda *_: None,
) -> Results:
    """Run ``script`` in every combination of the given ways, several times in turn, and return what was measured.

    The script is not changed. It is run with these arguments and ended after its last measured optimizer step. What it
    saves with ``fabric.save`` or ``Checkpoints`` goes to a temporary folder.

    Args:
        script: The path of a script that uses ``Fabric``.
        arguments: The script's own command line.
        strategies: As in ``Fabric(strategy=)``, or ``"script"`` for the script's own, which may be an object; None:
            ddp, fsdp, and from four devices on hsdp.
        precisions: As in ``Fabric(precision=)``, or ``"script"``.
        devices: Numbers of ranks; None: one, and all accelerators or cores that there are.
        batch_sizes: Of every ``DataLoader``, per rank; None is the script's own.
        baseline: The name of a combination (``"ddp, 32-true, 2 devices"``) that the others are compared with, or the
            beginning of one; None: the first.
        accelerator: As in ``Fabric(accelerator=)``; None is the script's own choice.
        steps: Timed steps of each run.
        warmup: Steps before them.
        check_steps: Steps that are compared with a single process that is fed the batches of all ranks; 0: none.
        rounds: How often each combination is timed, at most, besides a first run that only checks and tries out where
            they take turns; None: as often as it takes to see differences of 5 %, which the first rounds tell.
        budget_seconds: No round begins that would probably end later.
        timeout_seconds: A run that takes longer has failed. A round in turns that takes longer than this and the first
            round together is given up, and then one run follows the other.
        progress: Called before each run with the number of runs done, of how many, and what runs now.

    Ctrl-C ends it after what was done so far, once there is a round of all combinations.

    Raises:
        LaunchError: There is no such script, or its ranks could not be started at all.
        FabricValueError: A number is not allowed, or there is no such baseline.
    """
    check_script(script)
    for name, value, least in (
        ("steps", steps, 2),
        ("warmup", warmup, 0),
        ("check_steps", check_steps, 0),
        ("rounds", 1 if rounds is None else rounds, 1),
        ("budget_seconds", budget_seconds, 0),
        ("timeout_seconds", timeout_seconds, 1),
    ):
        if not least <= value < math.inf:
            raise FabricValueError(f"{name} is at least {least}.", given=f"{name}={value}", fix=f"{name}={least}")
    call = ScriptCall(script, False, arguments)
    chosen_devices = list(devices or _all_devices(call, accelerator))
    combinations = [
        Combination(strategy, precision, count, batch_size)
        for count in chosen_devices
        for precision, strategy, batch_size in itertools.product(
            precisions, strategies or strategies_for(count), batch_sizes
        )
    ]
    course = Course(
        call,
        combinations,
        _baseline(combinations, baseline),
        steps=steps,
        warmup=warmup,
        check_steps=check_steps,
        rounds=rounds,
        budget_seconds=budget_seconds,
        timeout_seconds=timeout_seconds,
        accelerator=accelerator,
    )
    measured = measure(course, progress)
    return Results(
        (script, *arguments),
        measured.rows,
        course.baseline.name,
        _about(measured),
        steps=steps,
        warmup=warmup,
        is_complete=not measured.stopped_by,
        stopped_by=measured.stopped_by,
        in_turns=measured.in_turns,
    )


def check_script(script: str) -> None:
    """Raise LaunchError if there is no such file."""
    if not os.path.isfile(script):
        what = "The script is a folder." if os.path.isdir(script) else "The script does not exist."
        raise LaunchError(what, given=f"{script}, looked for in {os.getcwd()}", fix="the path of a file.")


def strategies_for(devices: int) -> list[str]:
    """The strategies that are measured on so many devices where none is asked for."""
    return ["ddp", "fsdp", "hsdp"] if devices >= 4 else ["ddp", "fsdp"]


def _baseline(combinations: Sequence[Combination], name: str | None) -> Combination:
    found = [one for one in combinations if name is None or one.name.startswith(name)]
    if not found:
        raise FabricValueError(
            "The baseline is none of the combinations.",
            given=f"baseline={name!r}",
            fix=f"the beginning of one of: {'; '.join(one.name for one in combinations)}",
        )
    return found[0]


def _all_devices(script: ScriptCall, accelerator: str | None) -> list[int]:
    """One device, and all accelerators or else all cores."""
    kind, count = (None, 0) if accelerator == "cpu" else find_accelerators(script)
    most = cores() if kind is None else count
    return [1] if most == 1 else [1, most]


def _about(measured: Measured) -> About:
    return About(
        date=datetime.date.today().isoformat(),
        processor=processor(),
        cores=cores(),
        accelerator=measured.device_name,
        python=platform.python_version(),
        torch=metadata.version("torch"),
        command=shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        memory=measured.device_memory or memory_of_machine(),
    )
