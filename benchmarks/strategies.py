"""Every strategy on this project's own examples, on 1, 2 and 4 ranks, as ``fabric-bench`` measures it.

    OMP_NUM_THREADS=1 python benchmarks/strategies.py
    OMP_NUM_THREADS=1 python benchmarks/strategies.py --only char_gpt --devices 1,2
    OMP_NUM_THREADS=1 python benchmarks/strategies.py --quick

Writes ``benchmarks/results/strategies_EXAMPLE`` as .json, .md, .html and .svg. On fewer cores than ranks the ranks take
turns, so that what several ranks have there is the cost of a strategy and not its speed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fabric_lite import bench
from fabric_lite.bench.exports import export
from fabric_lite.bench.showing import shown_rows
from fabric_lite.bench.table import table
from fabric_lite.bench.verdict import judge

HERE = Path(__file__).parent
EXAMPLES = ("char_gpt", "image_classifier")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", choices=EXAMPLES, help="one example")
    options.add_argument("--devices", default="1,2,4", help="numbers of ranks (default 1,2,4)")
    options.add_argument("--budget", type=float, default=600.0, help="seconds for each example (default 600)")
    options.add_argument("--folder", type=Path, default=HERE / "results", help="where the results go")
    options.add_argument("--quick", action="store_true", help="one round of two steps: whether it works at all")
    given = options.parse_args()
    devices = [int(count) for count in given.devices.split(",")]
    # Paths as they stand in the results, whoever runs this.
    os.chdir(HERE.parent)
    for example in [given.only] if given.only else EXAMPLES:
        results = bench.run(
            f"examples/{example}.py",
            devices=devices,
            strategies=["ddp", "fsdp"],
            precisions=["32-true", "bf16-mixed"],
            baseline=f"ddp, 32-true, {devices[0]} device",
            accelerator="cpu",
            steps=2 if given.quick else 20,
            warmup=1 if given.quick else 5,
            rounds=1 if given.quick else None,
            budget_seconds=given.budget,
            progress=lambda done, total, what: print(f"{done}/{total} {what}", file=sys.stderr, flush=True),
        )
        verdict = judge(results)
        shown = shown_rows(results, verdict)
        print(table(results, shown, verdict.sentences))
        for ending in (".json", ".md", ".html", ".svg"):
            path = given.folder / f"strategies_{example}{ending}"
            export(path, results, shown, verdict.sentences, command=verdict.command)


if __name__ == "__main__":
    main()
