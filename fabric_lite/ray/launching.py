"""``launch``: a function on every rank of a Ray cluster."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from fabric_lite.errors import FabricTypeError, FabricValueError, LaunchError
from fabric_lite.launch.function_answers import raise_first_failure
from fabric_lite.launch.in_script import check_function
from fabric_lite.ray.cluster import Resources, check_resources, connected, default_resources
from fabric_lite.ray.job import Job, RankFailed, run_job
from fabric_lite.run_config import RunConfig

__all__ = ["check_job", "launch"]


def launch(
    train: Callable[..., Any],
    *args: Any,
    ranks: int,
    resources_per_rank: Resources | None = None,
    max_restarts: int = 0,
    fabric: Mapping[str, Any] | None = None,
    address: str | None = None,
    wait_seconds: float = 30.0,
) -> Any:
    """Call ``train(fabric, *args)`` on every rank and return rank 0's value, as ``fabric.launch(train)`` does.

    Each rank is an actor of Ray; together they get their places, on as few nodes as possible, or none does. When one
    raises or dies, its node with it or not, all end and all start again, up to ``max_restarts`` times: a function that
    resumes from its ``Checkpoints`` then goes on from there. Nothing is left on the cluster afterwards, nor after
    Ctrl-C. Called by the driver alone.

    Args:
        train: The function. Like ``args`` and its value it is pickled, by Ray's cloudpickle: functions of the driver's
            script, and those without a name, travel too.
        args: What it is called with after the fabric.
        ranks: How many, over all nodes.
        resources_per_rank: Ray's names and amounts. None: one ``CPU`` and, where the cluster has any or ``fabric`` asks
            for one, one ``GPU``. Ranks without a GPU run on the CPU.
        max_restarts: How often all ranks start again.
        fabric: The arguments of ``Fabric``, but for ``devices`` and ``num_nodes``, which the places say.
        address: Of the cluster, as in ``ray.init``; None: ``RAY_ADDRESS``, else one of this machine alone. A connection
            that is there already is used.
        wait_seconds: How long the cluster may take to find places.

    Raises:
        BaseException: The last attempt's first failing rank's own exception; its traceback is the cause.
        LaunchError: That rank died or has exited, or there are no places; the message has what is needed and what
            there is.
        SystemExit: With ``EXIT_PREEMPTED``: the ranks were asked to leave, and have saved their work.
        FabricImportError: Ray is not installed.
        FabricTypeError: ``train`` cannot be called with a fabric.
        FabricValueError: An argument's value is not allowed.
    """
    check_function(train)
    options = dict(fabric or {})
    if placed := {"devices", "num_nodes"} & set(options):
        raise FabricValueError(
            "On a Ray cluster the places of the ranks say how many devices and nodes there are.",
            given=f"fabric={{{', '.join(f'{name!r}: {options[name]!r}' for name in sorted(placed))}}}",
            fix="launch(train, ranks=8)",
        )
    check_job(ranks, max_restarts, wait_seconds)
    with connected(address):
        import ray

        accelerator = options.get("accelerator")
        resources = default_resources(accelerator) if resources_per_rank is None else resources_per_rank
        check_resources(resources, accelerator)
        program = ray.cloudpickle.dumps(functools.partial(_call, options, train, args))
        try:
            return run_job(Job(program, ranks, resources, RunConfig(), max_restarts, wait_seconds))
        except RankFailed as error:
            failure = error
    # Outside, because the user's exception would show the other one as its context.
    raise_failure(failure)
    raise AssertionError("unreachable")


def check_job(ranks: Any, max_restarts: Any, wait_seconds: float) -> None:
    """Raise unless the numbers are numbers of something.

    Raises:
        FabricTypeError: A count is no int; FabricValueError: it is too small.
    """
    for name, value, least in (("ranks", ranks, 1), ("max_restarts", max_restarts, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise FabricTypeError(f"{name} is a count.", given=f"{name}={value!r}", fix=f"{name}={least}")
        if value < least:
            raise FabricValueError(f"{name} must be at least {least}.", given=f"{name}={value}", fix=f"{name}={least}")
    if not wait_seconds >= 0:
        raise FabricValueError("wait_seconds must be at least 0.", given=f"wait_seconds={wait_seconds}", fix="30")


def raise_failure(failure: RankFailed) -> None:
    """Raise the rank's own exception, or an error that says where and how the rank has died."""
    if failure.death is not None:
        raise LaunchError(
            f"Rank {failure.rank} on node {failure.address} died.",
            given=failure.death,
            fix="see that node's logs: it may have run out of memory; max_restarts=3 starts all ranks again",
        )
    raise_first_failure({}, failure.answers)


def _call(options: dict[str, Any], train: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    # Only ranks need torch.
    from fabric_lite.fabric import call_with_fabric

    return call_with_fabric(options, train, args)
