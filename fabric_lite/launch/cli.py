"""``fabric-run``: reads the command line and becomes the supervisor."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fabric_lite.errors import FabricError, LaunchError
from fabric_lite.launch.command_line import CommandLine
from fabric_lite.launch.engines import is_engines_node, with_defaults
from fabric_lite.launch.plan import LaunchPlan, Rendezvous, parse_devices, parse_num_nodes
from fabric_lite.launch.rank import ScriptCall
from fabric_lite.run_config import RunConfig
from fabric_lite.topology import read_topology

__all__ = ["main", "parse_arguments"]

_DEFAULT_MAIN_PORT = 29500
# A module above this one, which ranks import by its name.
_CHECK = "fabric_lite.check"
_CHECK_LIMIT_SECONDS = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: the first failing rank's; 2 for a line that asks for nonsense."""
    try:
        options = _read(sys.argv[1:] if arguments is None else arguments)
        if options.check and _is_rank(options):
            _become_check(options)
        plan = _plan(options)
    except LaunchError as error:
        print(f"fabric-run: {error}", file=sys.stderr)
        return 2
    from fabric_lite.launch.supervisor import launch

    try:
        return launch(plan)
    except FabricError as error:
        print(f"fabric-run: {error}", file=sys.stderr)
        return 1


def parse_arguments(arguments: Sequence[str]) -> LaunchPlan:
    """Return what the command line asks for.

    Raises:
        LaunchError: It asks for something that is not possible.
    """
    return _plan(_read(arguments))


def _read(arguments: Sequence[str]) -> argparse.Namespace:
    options = _parser().parse_args(arguments)
    _check_at_least("--max-restarts", options.max_restarts, 0)
    _check_at_least("--hang-timeout", options.hang_timeout, 0)
    if options.devices is not None:
        parse_devices(options.devices)
    if options.check:
        _check_nothing_else(options)
    return options


# What would do nothing: they are about a script, or about the rank that runs one.
_NOT_WITH_CHECK = ("strategy", "precision", "max_restarts", "requeue", "check_collectives")


def _check_nothing_else(options: argparse.Namespace) -> None:
    if options.script:
        raise LaunchError(
            "--check runs no script.", given=f"--check and {options.script[0]}", fix="fabric-run --check --devices 2"
        )
    useless = [f"--{name.replace('_', '-')}" for name in _NOT_WITH_CHECK if getattr(options, name)]
    useless += ["-m"] * options.is_module
    if useless:
        raise LaunchError(
            "--check runs no script, and these options are about one.",
            given=f"--check and {', '.join(useless)}",
            fix="fabric-run --check, with --accelerator, --devices, and where the nodes meet",
        )
    if options.hang_timeout == 0:
        raise LaunchError(
            "--check waits for each rank for some time.",
            given="--hang-timeout 0",
            fix=f"--hang-timeout {_CHECK_LIMIT_SECONDS:g}, or leave it out",
        )


def _plan(options: argparse.Namespace) -> LaunchPlan:
    options, line = with_defaults(options, os.environ)
    if line is not None:
        print(line, file=sys.stderr)
    least, most = (None, None) if options.num_nodes is None else parse_num_nodes(options.num_nodes)
    if options.devices is not None:
        parse_devices(options.devices)
    if options.requeue:
        from fabric_lite.launch.requeue import check_requeue

        check_requeue(os.environ)
    rendezvous = _rendezvous(options, least or 1, most or 1)
    return LaunchPlan(
        script=_script(options),
        run_config=RunConfig(
            accelerator=options.accelerator,
            strategy=options.strategy,
            precision=options.precision,
            devices=options.devices,
            num_nodes=most,
            check_collectives=options.check_collectives,
            hang_timeout=options.hang_timeout,
        ),
        max_restarts=options.max_restarts,
        log_dir=options.log_dir,
        main_address=options.main_address or "127.0.0.1",
        main_port=options.main_port or (0 if rendezvous is None else _DEFAULT_MAIN_PORT),
        rendezvous=rendezvous,
        requeue=options.requeue,
    )


def _parser() -> CommandLine:
    parser = CommandLine(
        "fabric-run",
        "--devices 2 script.py",
        usage="fabric-run [OPTIONS] SCRIPT [ARGS...]\n       fabric-run [OPTIONS] -m MODULE [ARGS...]\n"
        "       fabric-run [OPTIONS] --check",
        description="Start a script in one process per device. Everything after SCRIPT belongs to the script.",
    )
    add = parser.add_argument
    parser.add_common("--accelerator", "--strategy")
    add("--devices", help='per node: a count ("2"), indices ("0,2"), or "auto" (the default; one process on a CPU)')
    parser.add_common("--precision")
    add("--num-nodes", help='how many machines take part: a number, or the least and the greatest ("1:4") (default: 1)')
    add("--node-rank", type=int, help="this machine's number, 0 to num-nodes - 1")
    add("--main-address", help="the address of node 0 that all nodes reach")
    add("--main-port", type=int, help=f"its port (default: {_DEFAULT_MAIN_PORT}; on one machine: a free one)")
    parser.add_common("--max-restarts")
    add("--requeue", action="store_true", help="under Slurm: run the job again once its ranks have left for preemption")
    add("--rdzv-backend", help="torchelastic's way for nodes to meet: c10d, static, ...")
    add("--rdzv-endpoint", help="where they meet, host:port")
    add("--rdzv-id", help="the name of the job, the same on all nodes")
    add("--log-dir", help="also write each rank's output to rank_N.out and rank_N.err in this folder")
    parser.add_common("--check-collectives")
    add(
        "--hang-timeout",
        type=float,
        metavar="SECONDS",
        help="end a job in which nothing has moved for so long, and say who did not arrive (default: 600; 0: never); "
        "with --check: how long to wait for each (default: 60)",
    )
    add("--check", action="store_true", help="run no script: connect all ranks, time the way between each two, and end")
    parser.add_common("-m", "script")
    return parser


def _is_rank(options: argparse.Namespace) -> bool:
    """Whether srun, mpirun or torchrun has started this process as one of the ranks to check, not as a node."""
    if options.devices is not None or options.num_nodes is not None or is_engines_node(os.environ):
        return False
    return read_topology(os.environ).is_managed


def _become_check(options: argparse.Namespace) -> NoReturn:
    """Go on as the program that every rank of a check runs."""
    os.execv(sys.executable, [sys.executable, "-m", _CHECK, *_check_words(options)])


def _check_words(options: argparse.Namespace) -> tuple[str, ...]:
    return "--limit", str(options.hang_timeout or _CHECK_LIMIT_SECONDS), "--accelerator", options.accelerator or "auto"


def _script(options: argparse.Namespace) -> ScriptCall:
    if options.check:
        return ScriptCall(_CHECK, True, _check_words(options))
    return _parser().script_of(options)


def _rendezvous(options: argparse.Namespace, least: int, most: int) -> Rendezvous | None:
    backend = options.rdzv_backend or ("c10d" if options.rdzv_endpoint or least < most else "static")
    if most == 1 and options.rdzv_backend is None and options.rdzv_endpoint is None:
        _check_node_rank(options.node_rank or 0, 1)  # without --num-nodes each node would train by itself
        return None
    if backend == "static" and least < most:
        raise LaunchError(
            "A range of nodes needs a place where they meet, and to which others can come.",
            given=f"--num-nodes {least}:{most} --rdzv-backend static",
            fix="--rdzv-backend c10d --rdzv-endpoint HOST:PORT, the same on all nodes",
        )
    if backend == "static":
        _check_static(options, most)
        endpoint = f"{options.main_address}:{options.main_port or _DEFAULT_MAIN_PORT}"
    else:
        endpoint = options.rdzv_endpoint or ""
    if not endpoint:
        raise LaunchError(
            "Several nodes need a place to meet.",
            given=f"--rdzv-backend {backend} without --rdzv-endpoint",
            fix="--rdzv-endpoint HOST:PORT, the same on all nodes",
        )
    timeout = {"timeout_seconds": options.hang_timeout or _CHECK_LIMIT_SECONDS} if options.check else {}
    return Rendezvous(most, backend, options.node_rank, endpoint, options.rdzv_id or "none", least, **timeout)


def _check_static(options: argparse.Namespace, num_nodes: int) -> None:
    if options.node_rank is None or options.main_address is None:
        raise LaunchError(
            "Several nodes need to know where node 0 is and which one this is.",
            given=f"--num-nodes {num_nodes}, --main-address {options.main_address}, --node-rank {options.node_rank}",
            fix="--main-address HOST_OF_NODE_0 --node-rank 0 there, 1, 2, ... on the others",
        )
    _check_node_rank(options.node_rank, num_nodes)


def _check_node_rank(node_rank: int, num_nodes: int) -> None:
    if not 0 <= node_rank < num_nodes:
        raise LaunchError(
            "The node's number does not fit the number of nodes.",
            given=f"--node-rank {node_rank} --num-nodes {num_nodes}",
            fix=f"0 to {num_nodes - 1}" if num_nodes > 1 else "--num-nodes, the number of all, on each of them",
        )


def _check_at_least(option: str, value: float | None, least: int) -> None:
    # Not a number is not at least anything.
    if value is not None and not least <= value < math.inf:
        raise LaunchError(
            f"{option} must be a number of at least {least}.", given=f"{option} {value}", fix=f"{option} {least}"
        )
