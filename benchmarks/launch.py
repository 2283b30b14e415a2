"""How long from the command to the script's first line, and to the first optimizer step under DDP?

    python benchmarks/launch.py                  # the whole table, medians of 11 interleaved runs
    python benchmarks/launch.py --repeats 3 --ranks 1 2 --json launch.json

First line: the last rank's first statement after its ``import torch``, since the command was given.
Bare line: the same without that import, which torchrun's agent has paid for itself but its ranks have not yet.
First step: the end of the last rank's first optimizer step of the same hand-written DDP loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

BARE_LINE = """\
import time; now = time.monotonic()
import os, pathlib, sys
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(str(now))
"""

FIRST_LINE = "import torch\n" + BARE_LINE

FIRST_STEP = """\
import os, pathlib, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(4, 8)).sum().backward()
optimizer.step()
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(str(time.monotonic()))
dist.destroy_process_group()
os._exit(0)  # gloo aborts some raw scripts at their end, after what is measured here
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: the same script under fabric-run and under torchrun (None: against ``import torch``)."""

    name: str
    script: str
    ranks: int
    bar: float | None


CASES = (
    Case("bare line", BARE_LINE, 2, None),
    Case("first line", FIRST_LINE, 1, None),
    Case("first line", FIRST_LINE, 2, 0.6),
    Case("first line", FIRST_LINE, 4, None),
    Case("first line", FIRST_LINE, 8, None),
    Case("first step", FIRST_STEP, 2, 0.7),
    Case("first step", FIRST_STEP, 4, 0.5),
)
ONE_RANK_BAR = 1.25


def launcher(name: str, ranks: int) -> list[str]:
    """Return the command that starts a script in this many ranks."""
    if name == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, "-m", "fabric_lite", "--accelerator", "cpu", "--devices", str(ranks)]


def seconds_to_mark(command: Sequence[str], script: str, ranks: int) -> float:
    """Return the seconds from giving the command to the last rank's mark."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "script.py")
        path.write_text(script)
        marks = Path(folder, "marks")
        marks.mkdir()
        start = time.monotonic()
        subprocess.run(
            [*command, str(path), str(marks)],
            check=True,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        ended = [float(mark.read_text()) for mark in marks.iterdir()]
    assert len(ended) == ranks, f"{len(ended)} of {ranks} ranks left a mark"
    return max(ended) - start


def seconds_to_import_torch() -> float:
    """Return the seconds that ``python -c "import torch"`` takes until the import is done."""
    start = time.monotonic()
    code = "import torch, time; print(time.monotonic())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout) - start


def measure(cases: Sequence[Case], repeats: int) -> list[dict[str, object]]:
    """Run everything ``repeats`` times, interleaved, and return one row per case."""
    samples: dict[tuple[Case, str], list[float]] = {}
    imports: list[float] = []
    for _ in range(repeats):
        imports.append(seconds_to_import_torch())
        for case in cases:
            for name in ("fabric-run", "torchrun"):
                seconds = seconds_to_mark(launcher(name, case.ranks), case.script, case.ranks)
                samples.setdefault((case, name), []).append(seconds)
    import_torch = statistics.median(imports)
    rows = []
    for case in cases:
        ours, theirs = (statistics.median(samples[case, name]) for name in ("fabric-run", "torchrun"))
        row = {
            "what": case.name,
            "ranks": case.ranks,
            "fabric_run_seconds": ours,
            "torchrun_seconds": theirs,
            "import_torch_seconds": import_torch,
            "over_torchrun": ours / theirs,
            "over_import_torch": ours / import_torch,
            "bar_over_torchrun": case.bar,
            "bar_over_import_torch": ONE_RANK_BAR if case.ranks == 1 else None,
            "samples": {name: samples[case, name] for name in ("fabric-run", "torchrun")},
        }
        rows.append(row)
    return rows


def show(rows: Sequence[dict[str, object]]) -> None:
    """Print the table."""
    print(
        f"{'':12}{'ranks':>6}{'fabric-run':>12}{'torchrun':>10}{'ratio':>7}{'bar':>6}{'/ import torch':>16}{'bar':>6}"
    )
    for row in rows:
        bars = ["" if row[key] is None else str(row[key]) for key in ("bar_over_torchrun", "bar_over_import_torch")]
        print(
            f"{row['what']:12}{row['ranks']:6}{row['fabric_run_seconds']:10.2f} s{row['torchrun_seconds']:8.2f} s"
            f"{row['over_torchrun']:7.2f}{bars[0]:>6}{row['over_import_torch']:16.2f}{bars[1]:>6}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--json", type=Path, help="also write the table and all samples here")
    arguments = parser.parse_args()
    rows = measure([case for case in CASES if case.ranks in arguments.ranks], arguments.repeats)
    show(rows)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
