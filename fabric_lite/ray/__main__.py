"""``python -m fabric_lite.ray``: an unedited script on every rank of a Ray cluster."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence

from fabric_lite.errors import FabricError
from fabric_lite.launch.command_line import CommandLine
from fabric_lite.launch.job import print_line
from fabric_lite.launch.rank import ScriptCall
from fabric_lite.ray.actor import run_script
from fabric_lite.ray.cluster import check_resources, connected, default_resources
from fabric_lite.ray.job import Job, RankFailed, run_job
from fabric_lite.ray.launching import check_job
from fabric_lite.run_config import EXIT_PREEMPTED, RunConfig

__all__ = ["main"]

_NAME = "python -m fabric_lite.ray"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: the first failing rank's; 2 for a line that asks for nonsense."""
    try:
        parser = _parser()
        options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
        script = parser.script_of(options)
        check_job(options.ranks, options.max_restarts, options.wait_seconds)
    except FabricError as error:
        print_line(f"fabric_lite.ray: {error}")
        return 2
    try:
        _run(options, script)
    except RankFailed as failure:
        return _report(failure)
    except FabricError as error:
        print_line(f"fabric_lite.ray: {error}")
        return 1
    except SystemExit as leaving:
        if leaving.code == EXIT_PREEMPTED:
            print_line("fabric_lite.ray: stopped for preemption; the ranks have saved their work.")
        raise
    return 0


def _run(options: argparse.Namespace, script: ScriptCall) -> None:
    with connected(options.address):
        import ray

        resources = default_resources(options.accelerator)
        if options.cpus_per_rank is not None:
            resources["CPU"] = options.cpus_per_rank
        if options.gpus_per_rank is not None:
            resources["GPU"] = options.gpus_per_rank
        check_resources(resources, options.accelerator)
        config = RunConfig(
            accelerator=options.accelerator,
            strategy=options.strategy,
            precision=options.precision,
            check_collectives=options.check_collectives,
            hang_timeout=options.hang_timeout,
        )
        program = ray.cloudpickle.dumps(functools.partial(run_script, script))
        run_job(Job(program, options.ranks, resources, config, options.max_restarts, options.wait_seconds))


def _report(failure: RankFailed) -> int:
    """Say what has failed, the traceback first, because logs of a job are read from their end; return the exit code."""
    answer = None if failure.death is not None else failure.answers[failure.rank]
    if answer is not None and answer.exit_code is None:
        print_line(answer.trace or "")
    print_line(f"fabric_lite.ray: {failure}")
    return 1 if answer is None or answer.exit_code is None else answer.exit_code


def _parser() -> CommandLine:
    parser = CommandLine(
        _NAME,
        "--ranks 2 script.py",
        usage=f"{_NAME} --ranks N [OPTIONS] SCRIPT [ARGS...]\n       {_NAME} --ranks N [OPTIONS] -m MODULE [ARGS...]",
        description="Run a script on the ranks of a Ray cluster. Everything after SCRIPT belongs to the script.",
    )
    add = parser.add_argument
    add("--ranks", type=int, required=True, help="how many processes, over all nodes; Ray finds their places")
    add("--address", help="of the cluster; RAY_ADDRESS, else a cluster of this machine alone, if left out")
    add("--cpus-per-rank", type=float, help="cores that each rank is given (default: 1)")
    add("--gpus-per-rank", type=int, choices=(0, 1), help="default: 1 where the cluster has any")
    parser.add_common("--accelerator", "--strategy", "--precision", "--max-restarts")
    add("--wait-seconds", type=float, default=30.0, help="how long the cluster may take to find places (default: 30)")
    parser.add_common("--check-collectives")
    add("--hang-timeout", type=float, metavar="SECONDS", help="end a job in which nothing has moved for so long")
    parser.add_common("-m", "script")
    return parser


if __name__ == "__main__":
    sys.exit(main())
