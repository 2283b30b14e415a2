"""``fabric-bench --simulate``: what a rank of a job of any size needs under each strategy, as text."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from fabric_lite.bench.devices import DEVICES
from fabric_lite.bench.results import THE_SCRIPTS
from fabric_lite.bench.shown import figure, one_line
from fabric_lite.bench.simulation import Simulated, SimulationError, simulate
from fabric_lite.errors import FabricValueError

__all__ = ["Cluster", "parse_cluster", "simulated_table"]

_PARTS = ("parameters", "gradients", "optimizer", "activations", "communication", "other")
# By how an operator's name begins, without underscores: torch has several operators for one collective.
_COLLECTIVES = {
    "allgather": "all_gather",
    "allreduce": "all_reduce",
    "reducescatter": "reduce_scatter",
    "alltoall": "all_to_all",
}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The job that is simulated.

    Args:
        devices: Ranks, over all nodes.
        nodes: Of equally many ranks.
        device: The name of an accelerator; None: a CPU, of which nothing is known but that tensors are in its memory.
    """

    devices: int
    nodes: int = 1
    device: str | None = None


def parse_cluster(text: str) -> Cluster:
    """Return the cluster of ``"devices=64,nodes=8,gpu=h100-80gb"``; all but ``devices`` can be left out.

    Raises:
        FabricValueError: It can't be read so, or there is no such cluster.
    """
    fields = dict(part.partition("=")[::2] for part in text.split(","))
    try:
        cluster = Cluster(int(fields.pop("devices")), int(fields.pop("nodes", "1")), fields.pop("gpu", None))
    except (KeyError, ValueError):
        cluster = None
    if cluster is None or fields or cluster.devices < 1:
        raise FabricValueError(
            "The cluster to simulate could not be read.", given=text, fix='"devices=64,nodes=8,gpu=h100-80gb"'
        )
    if cluster.nodes < 1 or cluster.devices % cluster.nodes:
        raise FabricValueError(
            "Every node has equally many devices, at least one.", given=text, fix="devices= a multiple of nodes="
        )
    if cluster.device is not None and cluster.device.lower() not in DEVICES:
        raise FabricValueError(
            "This gpu is not known.", given=f"gpu={cluster.device}", fix=f"gpu= one of {', '.join(DEVICES)}"
        )
    return cluster


def simulated_table(
    script: Sequence[str],
    cluster: Cluster,
    strategies: Sequence[str],
    precisions: Sequence[str],
    batch_size: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[str, bool]:
    """Simulate every combination, and return what was found as text, and whether anything was.

    Args:
        script: Path and arguments.
        cluster: Where it would run.
        strategies: As in ``Fabric(strategy=)``, or "script".
        precisions: As in ``Fabric(precision=)``, or "script".
        batch_size: Of every loader, per rank; None: the script's own.
        progress: Called before each simulation with its name.

    Raises:
        FabricValueError: There is no such cluster, strategy or precision; nothing was simulated then.
    """
    _check(cluster, strategies, precisions)
    is_own = set(precisions) == {THE_SCRIPTS}
    found: dict[str, Simulated] = {}
    failed: list[tuple[str, SimulationError]] = []
    for precision, strategy in itertools.product(precisions, strategies):
        name = _name(strategy, None if is_own else precision)
        progress(name)
        try:
            found[name] = simulate(
                script[0],
                script[1:],
                world_size=cluster.devices,
                nodes=cluster.nodes,
                strategy=None if strategy == THE_SCRIPTS else strategy,
                precision=None if precision == THE_SCRIPTS else precision,
                device=cluster.device,
                batch_size=batch_size,
            )
        except SimulationError as error:
            failed.append((name, error))
    head = [
        f"{' '.join(script)} on {cluster.devices} devices, {cluster.nodes} node{'s' * (cluster.nodes != 1)}"
        + ("" if cluster.device is None else f", {cluster.device}")
        + (", in the script's own precision" if is_own else "")
        + ": simulated, as rank 0 sees it",
        "",
    ]
    notices = dict.fromkeys(notice for one in found.values() for notice in one.notices)
    parts = [*head, *_table(found), *_said(found), *_failures(failed), *(f"Note: {notice}." for notice in notices)]
    return "\n".join(parts), bool(found)


def _check(cluster: Cluster, strategies: Iterable[str], precisions: Iterable[str]) -> None:
    """Raise for names that every simulation would fail at, the first of them after seconds."""
    # With torch, which the command's help does not need.
    from fabric_lite.precision import parse_precision
    from fabric_lite.strategies import parse_strategy

    for strategy in strategies:
        if strategy != THE_SCRIPTS:
            parse_strategy(strategy, cluster.devices)
    for precision in precisions:
        if precision != THE_SCRIPTS:
            parse_precision(precision)


def _name(strategy: str, precision: str | None) -> str:
    """What a row is called, in words where it is the script's; without a precision that is the same in all rows."""
    strategy = "the script's own strategy" if strategy == THE_SCRIPTS else strategy
    precision = "the script's own precision" if precision == THE_SCRIPTS else precision
    return ", ".join(filter(None, [strategy, precision]))


def _listed(names: list[str]) -> str:
    return ("; " if any("," in name for name in names) else ", ").join(names)


def _failures(failed: Iterable[tuple[str, SimulationError]]) -> list[str]:
    """Each cause once, with all that failed of it."""
    names: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name, error in failed:
        names[one_line(error.cause), one_line(error.fix)].append(name)
    return [
        line
        for (cause, fix), alike in names.items()
        for line in (f"{_listed(alike)} could not be simulated: {cause}", f"  Try: {fix}")
    ]


def _table(found: dict[str, Simulated]) -> list[str]:
    """Mebibytes at the peak and what they are; collectives of the last step and the MiB put into them; flops."""
    header = ["", "peak MiB", *_PARTS, "collectives", "MiB into collectives", "GFLOP", "est. ms"]
    rows = [
        [
            name,
            _mebibytes(one.peak_bytes),
            *(_mebibytes(one.parts.get(part, 0)) for part in _PARTS),
            str(sum(one.steps[-1].calls.values())),
            _mebibytes(sum(one.steps[-1].bytes.values())),
            figure(sum(one.steps[-1].flops.values()) / 1e9),
            "-" if one.estimate is None else figure(one.estimate.seconds * 1e3),
        ]
        for name, one in found.items()
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in [header, ["-" * width for width in widths], *rows]
    ]
    return [*lines, ""] if rows else []


def _said(found: dict[str, Simulated]) -> list[str]:
    """What fits, and what an estimate is worth."""
    lines = [f"{name}{':' * one.offloads} {one.sentence}." for name, one in found.items() if one.sentence]
    calls = [
        f"{name} a step: " + ", ".join(f"{count} {call}" for call, count in _collectives(one.steps[-1].calls).items())
        for name, one in found.items()
        if one.steps[-1].calls
    ]
    caveat = [
        "Times are estimates that have never been compared with hardware: take a factor of two either way, and more "
        "for small models."
    ]
    return [*lines, *calls, *(caveat if any(one.estimate for one in found.values()) else [])]


def _collectives(calls: Mapping[str, int]) -> dict[str, int]:
    """Calls by what they do, in the words of ``torch.distributed``; by operator they are in ``Step.calls``."""
    merged: Counter[str] = Counter()
    for name, count in calls.items():
        plain = name.replace("_", "")
        merged[next((word for start, word in _COLLECTIVES.items() if plain.startswith(start)), name)] += count
    return dict(sorted(merged.items()))


def _mebibytes(count: float) -> str:
    return figure(count / 2**20)
