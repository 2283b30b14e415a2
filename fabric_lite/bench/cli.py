"""``fabric-bench``: which strategy is best for this script?"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fabric_lite.bench.batch_size import find_batch_size, lines
from fabric_lite.bench.benchmark import DEFAULTS, check_script, run, strategies_for
from fabric_lite.bench.exports import check_output, export, read_json
from fabric_lite.bench.results import THE_SCRIPTS, Combination, Results
from fabric_lite.bench.showing import shown_rows
from fabric_lite.bench.shown import Shown
from fabric_lite.bench.simulation_table import parse_cluster, simulated_table
from fabric_lite.bench.table import table
from fabric_lite.bench.verdict import fail_below, judge
from fabric_lite.errors import FabricError, FabricValueError, LaunchError
from fabric_lite.launch.rank import ScriptCall

__all__ = ["main"]

_STOPPED = 130
_OUTPUT = ("fabric_bench.html", "fabric_bench.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 1 where nothing ran or a bar was missed, 2 for a wrong line.

    Ctrl-C and SIGTERM end it with what was found so far and 130.
    """
    options = _parser().parse_args(arguments)
    progress = _Progress()
    before = {number: signal.signal(number, _stop_once) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _check(options)
        if options.simulate is not None:
            return _simulate(options)
        if options.find_batch_size:
            return _find_batch_size(options)
        results = _results(options, progress)
        progress.clear()
        return _conclude(options, results)
    except FabricError as error:
        progress.clear()
        print(f"fabric-bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        progress.clear()
        first = "trial" if options.find_batch_size else "strategy" if options.simulate is not None else "round"
        print(f"fabric-bench: stopped before the end of the first {first}.", file=sys.stderr)
        return _STOPPED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_once(*_: Any) -> NoReturn:
    """Stop, and let nothing disturb what is shown and written then."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _conclude(options: argparse.Namespace, results: Results) -> int:
    """Show the results and write them; the exit code."""
    verdict = judge(results, memory_limit=results.about.memory)
    shown = shown_rows(results, verdict)
    sentences, fails = list(verdict.sentences), not verdict.winners
    if options.fail_below is not None:
        compared, fails_bar = fail_below(results, options.stored, options.fail_below)
        sentences, fails = [*sentences, *compared], fails or fails_bar
    print(table(results, shown, sentences))
    # A word that is misspelled costs nobody the results of the run before.
    paths = options.output or ([Path(name) for name in _OUTPUT] if _has_figures(results) else [])
    errors = [_written(path, results, shown, sentences, verdict.command) for path in paths]
    if not results.is_complete:
        by = f" by {results.stopped_by}" * bool(results.stopped_by)
        print(f"fabric-bench: stopped early{by}; these are the rounds that were done.", file=sys.stderr)
    if any(errors):
        raise next(filter(None, errors))
    return int(fails) if results.is_complete else _STOPPED


def _has_figures(results: Results) -> bool:
    return any(row.failure is None for row in results.rows)


def _written(
    path: Path, results: Results, shown: Sequence[Shown], sentences: Sequence[str], command: str | None
) -> FabricError | None:
    """Write the file; the error instead where it cannot be written, so that the others are."""
    try:
        export(path, results, shown, sentences, command=command)
    except FabricError as error:
        return error
    print(f"written: {path}")
    return None


def _simulate(options: argparse.Namespace) -> int:
    check_script(options.script[0])
    cluster = parse_cluster(options.simulate)
    text, found_any = simulated_table(
        options.script,
        cluster,
        options.strategy or strategies_for(cluster.devices),
        options.precision or [THE_SCRIPTS],
        (options.batch_size or [None])[0],
        progress=lambda what: print(f"fabric-bench: simulating {what}", file=sys.stderr, flush=True),
    )
    print(text)
    return int(not found_any)


def _find_batch_size(options: argparse.Namespace) -> int:
    """Find the batch size for the first of each of what is asked for."""
    script, *arguments = options.script
    check_script(script)
    combination = Combination(
        (options.strategy or [THE_SCRIPTS])[0],
        (options.precision or [THE_SCRIPTS])[0],
        (options.devices or [1])[0],
        (options.batch_size or [None])[0],
    )
    best, trials = find_batch_size(
        ScriptCall(script, False, tuple(arguments)),
        combination,
        accelerator=options.accelerator,
        budget_seconds=options.budget,
        timeout_seconds=options.timeout,
        progress=lambda what: print(f"fabric-bench: {what}", file=sys.stderr, flush=True),
    )
    print("\n".join(lines(best, trials)))
    if any(trial.was_stopped for trial in trials):
        print("fabric-bench: stopped early; these are the sizes that were tried.", file=sys.stderr)
        return _STOPPED
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise for what could only be found out after all has run."""
    if not options.script:
        raise LaunchError("There is no script to run.", fix="fabric-bench --devices 1,2 script.py")
    if (options.fail_below is None) != (options.against is None):
        raise FabricValueError(
            "A bar needs a stored result, and a stored result a bar.",
            given=f"--fail-below {options.fail_below} --against {options.against}",
            fix="--fail-below 0.98 --against results.json",
        )
    if options.fail_below is not None and not 0 < options.fail_below < math.inf:
        raise FabricValueError(
            "A bar is a number above 0.", given=f"--fail-below {options.fail_below}", fix="--fail-below 0.98"
        )
    options.stored = None if options.against is None else read_json(options.against)
    for path in options.output or [Path(name) for name in _OUTPUT]:
        check_output(path)


def _results(options: argparse.Namespace, progress: _Progress) -> Results:
    script, *arguments = options.script
    return run(
        script,
        *arguments,
        strategies=options.strategy,
        precisions=options.precision or DEFAULTS.PRECISIONS,
        devices=options.devices,
        batch_sizes=options.batch_size or (None,),
        baseline=options.baseline,
        accelerator=options.accelerator,
        steps=options.steps,
        warmup=options.warmup,
        check_steps=options.check_steps,
        rounds=options.rounds,
        budget_seconds=options.budget,
        timeout_seconds=options.timeout,
        progress=progress,
    )


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return names


def _counts(text: str) -> list[int]:
    counts = [int(part) if part.isdecimal() else 0 for part in _names(text)]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of at least 1, such as 1,2,4")
    return counts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fabric-bench",
        usage="fabric-bench [OPTIONS] SCRIPT [ARGS...]",
        description="Run a Fabric script, as it is, under every layout that is asked for, and say which one is best. "
        "Everything after SCRIPT belongs to the script. Its checkpoints go to a temporary folder.",
        allow_abbrev=False,
    )
    _add_ways(parser.add_argument)
    _add_course(parser.add_argument)
    _add_other_questions(parser.add_argument)
    _add_results(parser.add_argument)
    parser.add_argument(
        "script", nargs=argparse.REMAINDER, metavar="SCRIPT [ARGS...]", help="what to run, and its own arguments"
    )
    return parser


def _add_ways(add: Callable[..., Any]) -> None:
    """Which combinations."""
    add(
        "--strategy",
        type=_names,
        metavar="A,B",
        help="ddp,fsdp,..., or script for its own; default: ddp, fsdp, and from four devices on hsdp",
    )
    add(
        "--precision",
        type=_names,
        metavar="A,B",
        help=f"32-true,..., or script; default: {','.join(DEFAULTS.PRECISIONS)}",
    )
    add("--devices", type=_counts, metavar="N,M", help="numbers of ranks; default: 1 and all there are")
    add("--batch-size", type=_counts, metavar="N,M", help="of every DataLoader, per rank; default: the script's own")
    add("--accelerator", help="what to run on; default: the script's own choice")


def _add_course(add: Callable[..., Any]) -> None:
    """How often and how long each of them runs."""
    add("--steps", type=int, default=DEFAULTS.STEPS, help=f"timed steps of each run (default {DEFAULTS.STEPS})")
    add("--warmup", type=int, default=DEFAULTS.WARMUP, help=f"steps before them (default {DEFAULTS.WARMUP})")
    add(
        "--check-steps",
        type=int,
        default=DEFAULTS.CHECK_STEPS,
        metavar="N",
        help="steps whose mathematics is compared with one process that gets the batches of all ranks; "
        f"0: none (default {DEFAULTS.CHECK_STEPS})",
    )
    add("--rounds", type=int, help="timed runs of each combination; default: as many as differences of 5 %% need here")
    add(
        "--budget",
        type=float,
        default=DEFAULTS.BUDGET_SECONDS,
        metavar="SECONDS",
        help="no round, and no size of --find-batch-size, begins that would end later "
        f"(default {DEFAULTS.BUDGET_SECONDS:g})",
    )
    add(
        "--timeout",
        type=float,
        default=DEFAULTS.TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"a single run that takes longer has failed (default {DEFAULTS.TIMEOUT_SECONDS:g})",
    )


def _add_other_questions(add: Callable[..., Any]) -> None:
    """What is answered instead of which combination is best."""
    add(
        "--find-batch-size",
        action="store_true",
        help="instead: find the batch size per rank with the most samples/s that fits, for the first strategy, "
        "precision and number of devices that are given",
    )
    add(
        "--simulate",
        metavar="CLUSTER",
        help='instead: what a rank would need on a cluster such as "devices=64,nodes=8,gpu=h100-80gb"; starts no rank',
    )


def _add_results(add: Callable[..., Any]) -> None:
    """What becomes of the figures."""
    add("--baseline", metavar="NAME", help='what the others are compared with, such as "ddp, 32-true, 2 devices"')
    add(
        "--output",
        type=Path,
        action="append",
        metavar="FILE",
        help="write the results to a file that ends in .json, .csv, .md, .html or .svg; may be given several times "
        f"(default: {' and '.join(_OUTPUT)})",
    )
    add(
        "--fail-below",
        type=float,
        metavar="RATIO",
        help="exit with 1 if a combination surely has less than so much of its throughput in --against: 0.98",
    )
    add("--against", type=Path, metavar="FILE", help="a stored result (.json) for --fail-below")


class _Progress:
    """One line on standard error: a bar that is drawn over on a terminal, a line for each tenth elsewhere."""

    _WIDTH = 24

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._tenth = -1

    def __call__(self, done: int, total: int, what: str) -> None:
        passed = time.monotonic() - self._began
        left = f", about {passed / done * (total - done):.0f} s left" if done else ""
        if sys.stderr.isatty():
            bar = "#" * (self._WIDTH * done // total)
            line = f"[{bar:<{self._WIDTH}}] {done}/{total} {what}{left}"
            print("\r" + line[: _columns()].ljust(_columns()), end="", file=sys.stderr, flush=True)
        elif done * 10 // total != self._tenth:
            self._tenth = done * 10 // total
            print(f"fabric-bench: {done} of {total} runs done in {passed:.0f} s{left}", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the bar away."""
        if sys.stderr.isatty():
            print("\r" + " " * _columns() + "\r", end="", file=sys.stderr, flush=True)


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns - 1
    except OSError:
        return 79
