"""``fabric-run --check``: do all ranks come, is each connected to each, and how fast is the way between them?

Every rank runs :func:`main`, whoever has started it: ``fabric-run``, ``srun``, ``mpirun``, ``torchrun``. Rank 0 prints.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import DistError, PrefixStore  # type: ignore[attr-defined] # documented, not in its __all__

from fabric_lite import run_config
from fabric_lite.errors import FabricError, LaunchError
from fabric_lite.meeting import names_of
from fabric_lite.mesh import connect, join, leave
from fabric_lite.run import Arguments, Run, resolve

__all__ = ["main"]

_SMALL_BYTES, _SMALL_TIMES = 8, 20
_LARGE_BYTES, _LARGE_TIMES = 4 << 20, 3
# Up to here one pair at a time has the network for itself; of more ranks, all pairs of a round talk at once.
_RANKS_ONE_BY_ONE = 16
_RANKS_IN_A_MATRIX = 8
_SLOWEST_SHOWN = 5

# Of a pair: seconds of a small message, seconds of a large one; or what went wrong.
Ways = dict[tuple[int, int], Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the ways between all ranks; every rank calls. Return 0 where all is well, on every rank, else 1."""
    parser = argparse.ArgumentParser(prog="fabric-run --check", description=__doc__)
    parser.add_argument("--accelerator", default="auto", help="the kind of device")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds to wait for a rank")
    options = parser.parse_args(arguments)
    run = resolve(Arguments(accelerator=options.accelerator), None, run_config.current(), os.environ)
    if run.topology.world_size == 1:
        _print([*_table(run, [_about(run)]), "fabric-run --check: one rank, nothing to connect"])
        return 0
    store = PrefixStore("check", connect(run.topology, options.limit))
    store.set_timeout(datetime.timedelta(seconds=options.limit))
    _show_who_is_there(store, run)
    if not _connect_all(store, run, options.limit):
        return 1
    ways = _time_pairs(store, run, options.limit)
    if run.topology.rank == 0:
        _print(_report(ways, run.topology.world_size))
    leave()
    return 0 if all(isinstance(way, list) for way in ways.values()) else 1


def _about(run: Run) -> list[str]:
    topology = run.topology
    words = (topology.rank, topology.node_rank, socket.gethostname(), run.device, os.getpid())
    return [str(word) for word in words]


def _show_who_is_there(store: Any, run: Run) -> None:
    topology = run.topology
    store.set(f"about {topology.rank}", json.dumps(_about(run)))
    if topology.rank == 0:
        _print(_table(run, [json.loads(store.get(f"about {rank}")) for rank in range(topology.world_size)]))


def _table(run: Run, rows: list[list[str]]) -> list[str]:
    topology = run.topology
    where = f", main address {topology.main_address}:{topology.main_port}" if topology.main_address else ""
    nodes = len({row[1] for row in rows})
    count = f"{len(rows)} rank{'s' * (len(rows) > 1)} on {nodes} node{'s' * (nodes > 1)}"
    head = f"fabric-run --check: {count}, by {topology.source}{where}"
    columns = list(zip(["rank", "node", "host", "device", "process"], *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    return [head, *("  " + _row(cells, widths) for cells in zip(*columns, strict=True))]


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def _connect_all(store: Any, run: Run, limit_seconds: float) -> bool:
    """Make the process group; say which ranks could not, and return whether all could."""
    rank, ranks = run.topology.rank, range(run.topology.world_size)
    try:
        join(run.topology, run.device, limit_seconds)
        store.set(f"joined {rank}", "")
    except LaunchError as error:
        store.set(f"joined {rank}", str(error.__cause__ or error))
    # A rank that failed late has waited for the limit already.
    store.set_timeout(datetime.timedelta(seconds=2 * limit_seconds))

    def failures() -> list[list[Any]]:
        said = [[other, _said(store, f"joined {other}")] for other in ranks]
        return [[other, words] for other, words in said if words]

    failed = _as_rank_0_finds(store, "not connected", rank, failures, 2 * limit_seconds * (len(ranks) + 1))
    if failed and rank == 0:
        lines = [f"  rank {other}: {words.splitlines()[0]}" for other, words in failed]
        _print(
            [f"fabric-run --check: {names_of('rank', [other for other, _ in failed])} could not be connected", *lines]
        )
    _stay_until_all_know(store, rank, len(ranks))
    return failed == []


def _as_rank_0_finds(store: Any, key: str, rank: int, find: Callable[[], Any], limit_seconds: float) -> Any:
    """What rank 0 finds, on every rank: each by its own clock would give up at another moment, and find another thing.

    None where rank 0 says nothing within the limit, which is for the case that it hangs: were it gone, so would the
    store be, or the job.
    """
    if rank == 0:
        found = find()
        store.set(key, json.dumps(found))
        return found
    try:
        store.wait([key], datetime.timedelta(seconds=limit_seconds))
        return json.loads(store.get(key))
    except DistError:
        return None


def _said(store: Any, key: str) -> str:
    try:
        return str(store.get(key).decode())
    except DistError:
        return "said nothing more"


def _stay_until_all_know(store: Any, rank: int, world_size: int) -> None:
    """The rank that serves the store may not leave before the others have read in it."""
    if store.add("ranks that know", 1) == world_size:
        store.set("all know", "")
    if rank == 0:
        _said(store, "all know")


def _time_pairs(store: Any, run: Run, limit_seconds: float) -> Ways:
    """Let each pair send to and fro; return what came of it, on every rank the same."""
    rank, rounds = run.topology.rank, list(_rounds(run.topology.world_size))
    for number, pairs in enumerate(rounds):
        mine = next((pair for pair in pairs if rank in pair), None)
        if mine is not None:
            store.set(f"way {rank} {mine}", json.dumps(_time_pair(mine, rank, run.device, limit_seconds)))
        if store.add(f"round {number}", 1) == run.topology.world_size:
            store.set(f"round {number} has ended", "")
        _said(store, f"round {number} has ended")
    found = _as_rank_0_finds(store, "ways", rank, lambda: _ways(store, rounds), 2 * limit_seconds * (len(rounds) + 1))
    store.set_timeout(datetime.timedelta(seconds=limit_seconds))
    _stay_until_all_know(PrefixStore("end", store), rank, run.topology.world_size)
    return {(0, rank): "rank 0 said nothing more"} if found is None else {(i, j): way for i, j, way in found}


def _ways(store: Any, rounds: Sequence[Sequence[tuple[int, int]]]) -> list[list[Any]]:
    """Both ranks and the way of each pair, by what they have said until now."""
    ways = []
    for pair in itertools.chain(*rounds):
        keys = [f"way {end} {pair}" for end in pair]
        found = [json.loads(store.get(key)) if store.check([key]) else "said nothing more" for key in keys]
        # What either end could not do; else the times of the first, which began.
        ways.append([*pair, next((words for words in found if isinstance(words, str)), found[0])])
    return ways


def _rounds(world_size: int) -> Iterator[list[tuple[int, int]]]:
    """All pairs, in rounds of pairs that share no rank: each of an even number of players meets each, in a circle."""
    players = world_size + world_size % 2
    for turn in range(players - 1):
        circle = [0, *((turn + place) % (players - 1) + 1 for place in range(players - 1))]
        both = ((circle[place], circle[-1 - place]) for place in range(players // 2))
        pairs = sorted((min(pair), max(pair)) for pair in both if max(pair) < world_size)
        if world_size > _RANKS_ONE_BY_ONE:
            yield pairs
        else:
            yield from ([pair] for pair in pairs)


def _time_pair(pair: tuple[int, int], rank: int, device: torch.device, limit_seconds: float) -> list[float] | str:
    """Send small and large messages to the other and back; the seconds of one way, or what went wrong."""
    other = pair[1 - pair.index(rank)]
    limit = datetime.timedelta(seconds=limit_seconds)
    try:
        return [
            min(_there_and_back(size, other, rank < other, device, limit) for _ in range(times)) / 2
            for size, times in ((_SMALL_BYTES, _SMALL_TIMES), (_LARGE_BYTES, _LARGE_TIMES))
        ]
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]


def _there_and_back(size: int, other: int, begins: bool, device: torch.device, limit: datetime.timedelta) -> float:
    sent = torch.arange(size // 8, device=device) + 1
    received = torch.zeros_like(sent)
    start = time.perf_counter()
    for sends in (begins, not begins):
        work = dist.isend(sent if begins else received, other) if sends else dist.irecv(received, other)
        assert work is not None
        work.wait(limit)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    seconds = time.perf_counter() - start
    if not torch.equal(sent, received):
        raise ValueError(f"{size} bytes came back from rank {other} with other values")
    return seconds


def _report(ways: Ways, world_size: int) -> list[str]:
    broken = {pair: words for pair, words in ways.items() if not isinstance(words, list)}
    timed: Mapping[tuple[int, int], list[float]] = {pair: way for pair, way in ways.items() if pair not in broken}
    lines = []
    for title, number in (("microseconds for 8 bytes", _microseconds), ("GB/s with 4 MB", _gigabytes)):
        if timed and world_size <= _RANKS_IN_A_MATRIX:
            lines += [f"  {title}", *_matrix({pair: number(way) for pair, way in timed.items()}, world_size)]
    slowest = sorted(timed, key=lambda pair: -timed[pair][1])[:_SLOWEST_SHOWN]
    if world_size > _RANKS_IN_A_MATRIX:
        lines += [f"  rank {i} and {j}: {_speed(timed[i, j])}" for i, j in slowest]
    lines += [f"  rank {i} and {j}: {words}" for (i, j), words in sorted(broken.items())]
    if broken:
        return [*lines, f"fabric-run --check: {len(broken)} of {len(ways)} pairs of ranks could not talk"]
    i, j = slowest[0]
    return [
        *lines,
        f"fabric-run --check: all is well; the slowest way for 4 MB is between rank {i} and {j}: {_speed(ways[i, j])}",
    ]


def _microseconds(way: list[float]) -> str:
    return f"{way[0] * 1e6:.0f}"


def _gigabytes(way: list[float]) -> str:
    return f"{_LARGE_BYTES / way[1] / 1e9:.2g}"


def _speed(way: list[float]) -> str:
    return f"{_microseconds(way)} us, {_gigabytes(way)} GB/s"


def _matrix(cells: Mapping[tuple[int, int], str], world_size: int) -> list[str]:
    width = max(len(cell) for cell in [*cells.values(), "rank 0"])
    head = ["", *(f"rank {rank}" for rank in range(1, world_size))]
    rows = [
        [f"rank {row}", *(cells.get((row, column), "") for column in range(1, world_size))]
        for row in range(world_size - 1)
    ]
    return ["  " + _row(row, [width] * world_size) for row in [head, *rows]]


def _print(lines: Sequence[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _main_by_itself() -> int:
    """Under fabric-run an error is the launcher's to print; under srun and mpirun each rank does."""
    if run_config.current() is not None:
        return main()
    try:
        return main()
    except FabricError as error:
        print(f"fabric-run --check: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(_main_by_itself())
