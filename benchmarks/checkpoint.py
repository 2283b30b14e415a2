"""Seconds and extra memory of saving and loading a model with its AdamW state, beside torch and, if installed, peers.

First two ratios that have a bar: how long an asynchronous save holds the training up, over one memory copy of what the
rank writes (``Tensor.copy_`` of every tensor into memory that is there already; bar 1.3), and a synchronous save over
``torch.save`` and fsync (bar 1.1). They are medians of pairs that were measured side by side, with 95 % intervals.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py
    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py --megabytes 1024 --json benchmarks/results/checkpoint.json
    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py --only-ratios
    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py --quick

Every way has objects of its own, and they take turns. A save ends when all is on the disk: whoever does not flush its
files is followed by fsync. "cold" loads read from the disk, "warm" ones from memory, where a save has just left it.
Extra memory is the peak of resident memory over what the objects hold already, on the rank that needs most; the pages
of a file that is mapped count. Lightning Fabric and Accelerate take part where they are installed
(pip install -e '.[peers]'); Accelerate only on one rank, since it shards on no CPU.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from measure import parser, peak, ratio, show, start_peak, write

from fabric_lite import Fabric
from fabric_lite.testing import RankPool

WIDTH = 1024  # one layer is 4 MiB, with its moments 12
PROCESSOR = ", processor time"
PHASES = ("save", "load, cold", "load, warm")


@dataclasses.dataclass
class Way:
    """One way to save and load.

    Args:
        model: Whose parameters are seen to change.
        save: ``save(path)``.
        load: ``load(path)``; None: it is only saved.
        flushes: Whether ``save`` has all on the disk when it returns.
    """

    model: nn.Module
    save: Callable[[Path], Any]
    load: Callable[[Path], Any]
    flushes: bool = True


def make(layers: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(layers)])
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)


def fill(model: nn.Module, optimizer: Any) -> None:
    """One step, so that there are moments; the gradients go."""
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.1
    optimizer.step()
    optimizer.zero_grad()


def fabric_lite_way(layers: int, strategy: str, ranks: int, kind: str | None) -> Way:
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy)
    model, optimizer = fabric.setup(*make(layers))
    fill(model, optimizer)
    state = {"model": model, "optimizer": optimizer, "step": 1}
    return Way(
        model,
        lambda path: fabric.save(path, state, state_dict_type=kind),
        lambda path: fabric.load(path, state),
    )


def plain_torch(layers: int, mmap: bool) -> Way:
    model, optimizer = make(layers)
    fill(model, optimizer)

    def save(path: Path) -> None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}, path)

    def load(path: Path) -> None:
        saved = torch.load(path, weights_only=True, mmap=mmap)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])

    return Way(model, save, load, flushes=False)


def lightning(layers: int, **options: Any) -> Way:
    from lightning_fabric import Fabric as Lightning

    fabric = Lightning(accelerator="cpu", **options)
    fabric.launch()
    plain, _ = make(layers)
    model = fabric.setup_module(plain)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False))
    fill(model, optimizer)
    state = {"model": model, "optimizer": optimizer, "step": 1}
    return Way(model, lambda path: fabric.save(path, state), lambda path: fabric.load(path, state), flushes=False)


def lightning_sharded(layers: int, ranks: int) -> Way:
    from lightning_fabric.strategies import ModelParallelStrategy

    def parallelize(model: Any, mesh: Any) -> Any:
        return shard(model, mesh["data_parallel"])

    return lightning(layers, devices=ranks, strategy=ModelParallelStrategy(parallelize, ranks, 1))


def accelerate(layers: int) -> Way:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*make(layers))
    fill(model, optimizer)
    return Way(model, accelerator.save_state, lambda path: accelerator.load_state(str(path)), flushes=False)


def shard(model: Any, mesh: Any = None) -> Any:
    from torch.distributed.fsdp import fully_shard

    for part in [*model, model]:
        fully_shard(part, mesh=mesh)
    return model


def distributed_checkpoint(layers: int, is_sharded: bool = True) -> Way:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = make(layers)
    if is_sharded:
        model = shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    fill(model, optimizer)

    def state() -> dict[str, Any]:
        return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True), step=1)

    def load(path: Path) -> None:
        loaded = state()
        dcp.load(loaded, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])

    return Way(model, lambda path: dcp.save(state(), checkpoint_id=path), load)


def gathered(layers: int) -> Way:
    """One full file from shards as torch's own state dict functions make it, and back from rank 0."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    model = shard(make(layers)[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    fill(model, optimizer)

    def save(path: Path) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_state_dict(model, optimizer, options=options)
        if dist.get_rank() == 0:
            torch.save(dict(zip(("model", "optimizer"), state, strict=True)), path)

    def load(path: Path) -> None:
        saved: dict[str, Any] = {"model": {}, "optimizer": {}}
        if dist.get_rank() == 0:
            saved = torch.load(path, weights_only=True, mmap=True)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        # Not set_state_dict(): it waits for ever where the other ranks have nothing.
        set_model_state_dict(model, saved["model"], options=options)
        set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)

    return Way(model, save, load, flushes=False)


def one_device_ways(layers: int) -> dict[str, Way]:
    ways = {
        "fabric_lite, file": fabric_lite_way(layers, "auto", 1, None),
        "torch.save, torch.load": plain_torch(layers, mmap=False),
        "the same, mmap=True": plain_torch(layers, mmap=True),
    }
    if importlib.util.find_spec("lightning_fabric"):
        ways["Lightning Fabric"] = lightning(layers, devices=1)
    if importlib.util.find_spec("accelerate"):
        ways["Accelerate, save_state"] = accelerate(layers)
    return ways


def sharded_ways(layers: int, ranks: int) -> dict[str, Way]:
    ways = {
        "fabric_lite, folder": fabric_lite_way(layers, "fsdp", ranks, "sharded"),
        "torch.distributed.checkpoint": distributed_checkpoint(layers),
        "fabric_lite, full file": fabric_lite_way(layers, "fsdp", ranks, "full"),
        "full state dict, torch.save": gathered(layers),
    }
    if importlib.util.find_spec("lightning_fabric"):
        ways["Lightning Fabric, folder"] = lightning_sharded(layers, ranks)
    return ways


def files_of(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def flush(path: Path) -> None:
    for file in files_of(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def evict(path: Path) -> None:
    """Drop the files from the page cache; what is not on the disk yet would stay."""
    for file in files_of(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def measured(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds until every rank is done, and MiB that resident memory rose by at most."""
    meet()
    before = start_peak()
    start = time.perf_counter()
    call()
    meet()
    return time.perf_counter() - start, peak() - before


def save_flushed(way: Way, path: Path) -> None:
    way.save(path)
    if not way.flushes and path.exists() and (not dist.is_initialized() or dist.get_rank() == 0):
        flush(path)


def load_checked(way: Way, path: Path) -> tuple[float, float]:
    """Measured, and seen to have put the first parameter back."""
    [parameter, *_] = way.model.parameters()
    with torch.no_grad():
        parameter.zero_()
    figures = measured(functools.partial(way.load, path))
    local = getattr(parameter, "_local_tensor", parameter)
    assert local.detach().abs().sum() > 0, "the load changed nothing"
    return figures


def turns(folder: Path, layers: int, ranks: int, runs: int) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """On each rank: figures of each way and phase, by run; of several, one more goes first and does not count."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|lightning|accelerate")
    ways = one_device_ways(layers) if ranks == 1 else sharded_ways(layers, ranks)
    figures: dict[str, dict[str, list[Any]]] = {name: {phase: [] for phase in PHASES} for name in ways}
    names = list(ways)
    for run in range(runs + (runs > 1)):
        turn = run % len(names)
        for number, name in enumerate(names[turn:] + names[:turn]):
            path, way = folder / f"{ranks}-{run}-{number}", ways[name]
            found = [measured(functools.partial(save_flushed, way, path))]
            evict(path)
            found += [load_checked(way, path), load_checked(way, path)]
            if run or runs == 1:
                for phase, value in zip(PHASES, found, strict=True):
                    figures[name][phase].append(value)
            meet()
            if not dist.is_initialized() or dist.get_rank() == 0:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return figures


def tensors_of(model: nn.Module, optimizer: Any) -> list[torch.Tensor]:
    """What a rank writes of a state: the tensors of its own memory."""
    tensors = [*model.state_dict().values()]
    tensors += [value for entry in optimizer.state.values() for value in entry.values()]
    return [getattr(tensor, "_local_tensor", tensor).detach() for tensor in tensors]


def stall_beside_copy(folder: Path, layers: int, ranks: int, runs: int) -> dict[str, list[float]]:
    """On each rank: seconds that an asynchronous save takes to return, and of one memory copy, in turn.

    Also the processor time of the calling thread, which is of use on a machine that others use as well.
    """
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy="fsdp" if ranks > 1 else "auto")
    model, optimizer = fabric.setup(*make(layers))
    fill(model, optimizer)
    state = {"model": model, "optimizer": optimizer, "step": 1}
    tensors = tensors_of(model, optimizer)
    copies = [torch.empty_like(tensor) for tensor in tensors]
    names = ("memory copy", "asynchronous save")
    times: dict[str, list[float]] = {f"{name}{kind}": [] for name in names for kind in ("", PROCESSOR)}

    def copy_once() -> None:
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor)

    def save_once() -> Any:
        return fabric.save(folder / "beside", state, state_dict_type="sharded" if ranks > 1 else "full", async_=True)

    for run in range(runs + 1):
        for name in sorted(names, reverse=bool(run % 2)):
            meet()
            start, used = time.perf_counter(), time.thread_time()
            handle = copy_once() if name == "memory copy" else save_once()
            seconds, used = time.perf_counter() - start, time.thread_time() - used
            if handle is not None:
                handle.result()
            if run:
                times[name].append(seconds)
                times[name + PROCESSOR].append(used)
    fabric.close()
    return times


def save_beside_torch(folder: Path, layers: int, runs: int) -> dict[str, list[float]]:
    """On one device: seconds of a save and of ``torch.save`` with fsync, in turn, each over its own last file."""
    ways = {"fabric_lite": fabric_lite_way(layers, "auto", 1, None), "torch.save": plain_torch(layers, mmap=False)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 1):
        for name in sorted(ways, reverse=bool(run % 2)):
            path = folder / name
            path.unlink(missing_ok=True)
            os.sync()
            start = time.perf_counter()
            save_flushed(ways[name], path)
            if run:
                times[name].append(time.perf_counter() - start)
    return times


def ratios(folder: Path, layers: int, ranks: int, runs: int) -> list[dict[str, Any]]:
    """The two ratios with a bar; the stall on one rank and on several, where the slowest rank of each run counts."""
    rows = []
    for count in (1, ranks):
        with RankPool(timeout_seconds=3600) as pool:
            by_rank = pool.run(stall_beside_copy, folder, layers, count, runs, ranks=count)
            times = {
                name: [max(run) for run in zip(*(one[name] for one in by_rank), strict=True)] for name in by_rank[0]
            }
            for kind in ("", PROCESSOR):
                what = f"stall, {count} rank{'s' * (count > 1)}{kind}"
                rows.append(compared(what, times, f"asynchronous save{kind}", f"memory copy{kind}", 1.3))
            if count == 1:
                [times] = pool.run(save_beside_torch, folder, layers, runs, ranks=1)
                rows.append(compared("synchronous save, 1 rank", times, "fabric_lite", "torch.save", 1.1))
    return rows


def compared(what: str, times: dict[str, list[float]], name: str, baseline: str, bar: float) -> dict[str, Any]:
    middle, low, high = ratio(times, name, baseline)
    seconds = {one: statistics.median(times[one]) for one in (name, baseline)}
    return {"what": what, "ratio": middle, "interval": [low, high], "bar": bar, "seconds": seconds}


def leave_folders(folder: Path, layers: int, ranks: int) -> None:
    """On each of several ranks: leave a folder of shards of each kind."""
    fabric_lite_way(layers, "fsdp", ranks, "sharded").save(folder / "ours")
    distributed_checkpoint(layers).save(folder / "dcp")


def load_folders(folder: Path, layers: int, runs: int) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """On one device: load what several ranks left."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant to be
    ours, theirs = fabric_lite_way(layers, "auto", 1, None), distributed_checkpoint(layers, is_sharded=False)
    ways = {
        "fabric_lite, its folder": (ours, folder / "ours"),
        "torch.distributed.checkpoint, its folder": (theirs, folder / "dcp"),
        "fabric_lite, that folder": (ours, folder / "dcp"),
    }
    figures: dict[str, dict[str, list[Any]]] = {name: {phase: [] for phase in PHASES[1:]} for name in ways}
    for run in range(runs + (runs > 1)):
        for name, (way, path) in ways.items():
            evict(path)
            cold, warm = load_checked(way, path), load_checked(way, path)
            if run or runs == 1:
                figures[name]["load, cold"].append(cold)
                figures[name]["load, warm"].append(warm)
    return figures


def summary(what: str, by_rank: list[dict[str, dict[str, list[tuple[float, float]]]]]) -> list[dict[str, Any]]:
    """Medians of seconds, and the largest extra memory of any rank and run."""
    rows = []
    for name, phases in by_rank[0].items():
        row: dict[str, Any] = {"what": what, "way": name}
        for phase, values in phases.items():
            row[phase] = {
                "seconds": statistics.median(seconds for seconds, _ in values),
                "least_seconds": min(seconds for seconds, _ in values),
                "extra_mib": max(extra for figures in by_rank for _, extra in figures[name][phase]),
            }
        rows.append(row)
    return rows


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--megabytes", type=int, default=1024, help="MiB of parameters and moments (default 1024)")
    options.add_argument("--ranks", type=int, default=2, help="ranks that hold the shards (default 2)")
    options.add_argument("--runs", type=int, default=5, help="runs of each way, in turn, after one more (default 5)")
    options.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    options.add_argument("--quick", action="store_true", help="24 MiB and one run: whether it works at all")
    options.add_argument("--only-ratios", action="store_true", help="only the two ratios that have a bar")
    options.add_argument("--ratio-runs", type=int, default=15, help="pairs of runs for each ratio (default 15)")
    given = options.parse_args()
    pairs = 2 if given.quick else given.ratio_runs
    megabytes, runs = (24, 1) if given.quick else (given.megabytes, given.runs)
    layers = max(megabytes // 12, 1)
    figures: dict[str, Any] = {"mebibytes": layers * 12}
    with tempfile.TemporaryDirectory(prefix="fabric_lite_checkpoints_", dir=given.folder) as folder:
        figures["on_the_disk_of_the_repository"] = os.stat(folder).st_dev == os.stat(__file__).st_dev
        figures |= {"pairs": pairs, "ratios": ratios(Path(folder), layers, given.ranks, pairs)}
        show_ratios(figures)
        if not given.only_ratios:
            figures |= {"runs": runs, "rows": all_ways(Path(folder), layers, given.ranks, runs)}
            show_ways(figures)
    write(given.json, figures)


def all_ways(folder: Path, layers: int, several: int, runs: int) -> list[dict[str, Any]]:
    """Save and load of every way that is installed, on one rank, on several, and from several to one."""
    rows = []
    for ranks in (1, several):
        with RankPool(timeout_seconds=3600) as pool:
            by_rank = pool.run(turns, folder, layers, ranks, runs, ranks=ranks)
            rows += summary(f"{ranks} ranks, fsdp" if ranks > 1 else "one device", by_rank)
    with RankPool(timeout_seconds=3600) as pool:
        pool.run(leave_folders, folder, layers, several, ranks=several)
        by_rank = pool.run(load_folders, folder, layers, runs, ranks=1)
        rows += summary(f"one device, from {several} ranks", by_rank)
    return rows


def show_ratios(figures: dict[str, Any]) -> None:
    def cells(row: dict[str, Any]) -> list[str]:
        seconds = ", ".join(f"{name} {value:.3f}" for name, value in row["seconds"].items())
        low, high = row["interval"]
        return [row["what"], f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}", f"{row['bar']:.1f}", seconds]

    show(
        f"{figures['mebibytes']} MiB: ratios, medians of {figures['pairs']} pairs side by side",
        ["", "ratio", "95 % interval", "bar", "seconds (medians)"],
        [cells(row) for row in figures["ratios"]],
    )


def show_ways(figures: dict[str, Any]) -> None:
    def cell(measures: dict[str, float] | None) -> list[str]:
        return ["-", "-"] if measures is None else [f"{measures['seconds']:.2f}", f"{measures['extra_mib']:.0f}"]

    show(
        f"{figures['mebibytes']} MiB of parameters and moments in all: seconds (medians), and peak of extra memory per "
        "rank",
        ["", "", *(column for phase in PHASES for column in (f"{phase}, s", "MiB"))],
        [
            [row["what"], row["way"], *(text for phase in PHASES for text in cell(row.get(phase)))]
            for row in figures["rows"]
        ],
    )


if __name__ == "__main__":
    main()
