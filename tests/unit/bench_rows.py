"""Small results of a benchmark for the tests of what shows them."""

from __future__ import annotations

from fabric_lite.bench.results import About, Combination, Communication, Comparison, Memory, Results, Row
from fabric_lite.bench.shown import Interval, Shown

MIB = 2**20
SAME = Comparison("same", loss=2e-7, gradient=3e-6, parameters=1e-6, tolerance=1e-5)
WRONG = Comparison("differs", loss=0.5, gradient=0.25, tolerance=1e-5, reason="the loss is a sum")
UNSURE = Comparison("not comparable", reason="the script draws random numbers")


def ran(strategy: str, devices: int, *, comparison: Comparison | None = SAME, is_best: bool = False) -> Shown:
    """A row of 4 samples a step and rank, with steps of 10 ms."""
    row = Row(
        Combination(strategy, "32-true", devices),
        step_seconds=[[0.010, 0.012], [0.010, 0.009]],
        samples_per_step=4.0 * devices,
        tokens_per_step=40.0 * devices,
        phases={"data": 0.001, "forward": 0.003, "backward": 0.004, "optimizer": 0.002, "save": 0.0, "other": 0.0},
        exposed_communication=0.001 if devices > 1 else None,
        memory=Memory(resident=300 * MIB, tensors=12 * MIB),
        communication=Communication({"all_reduce": 2}, {"all_reduce": 3 * MIB}) if devices > 1 else None,
        comparison=comparison,
        startup_seconds=1.5,
    )
    rate = 400.0 * devices
    return Shown(
        name=row.combination.name,
        row=row,
        throughput=Interval(rate, rate - 8, rate + 4),
        step_p50_seconds=0.010,
        step_p95_seconds=0.012,
        scaling=0.9 if devices > 1 else None,
        kept=1.0 if devices > 1 else None,
        is_best=is_best,
    )


def failed(strategy: str, failure: str) -> Shown:
    row = Row(Combination(strategy, "32-true", 2), failure=failure)
    return Shown(row.combination.name, row)


def several() -> list[Shown]:
    return [
        ran("single_device", 1),
        ran("ddp", 2, is_best=True),
        ran("ddp_bf16", 2, comparison=WRONG),
        ran("fsdp", 2, comparison=UNSURE),
        failed("hsdp", "OutOfMemoryError on rank 1: tried to allocate 2.50 GiB"),
    ]


def results_of(shown: list[Shown], script: tuple[str, ...] = ("train.py", "--steps", "9")) -> Results:
    return Results(
        script=list(script),
        rows=[one.row for one in shown],
        baseline="ddp, 32-true, 2 devices",
        about=About("2026-01-02", "A processor", 2, None, "3.11.2", "2.9.0", "fabric-bench train.py --steps 9"),
        steps=2,
        warmup=1,
    )
