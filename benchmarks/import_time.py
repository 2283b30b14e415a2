"""What ``import fabric_lite`` costs over ``import torch``, and what ``fabric-run --help`` takes.

python benchmarks/import_time.py --json benchmarks/results/import_time.json
"""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from measure import parser, show, write

STATEMENTS = {
    "import torch": "import torch",
    "import torch; from fabric_lite import Fabric": "import torch; from fabric_lite import Fabric",
}
PEERS = {
    "lightning_fabric": "import torch; from lightning_fabric import Fabric",
    "accelerate": "import torch; from accelerate import Accelerator",
}


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--runs", type=int, default=11, help="runs of each command, in turn (default 11)")
    given = options.parse_args()
    commands = {name: [sys.executable, "-c", code] for name, code in STATEMENTS.items()}
    for module, code in PEERS.items():
        if importlib.util.find_spec(module):
            commands[code] = [sys.executable, "-c", code]
    commands["fabric-run --help"] = [sys.executable, "-m", "fabric_lite", "--help"]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for run in range(given.runs + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if run:  # the first one warms the disk cache
                seconds[name].append(time.perf_counter() - start)
    base = seconds["import torch"]
    rows = {
        name: {
            "seconds": statistics.median(values),
            "over_import_torch": statistics.median(mine - other for mine, other in zip(values, base, strict=True)),
        }
        for name, values in seconds.items()
    }
    show(
        "Seconds, medians of runs in turn",
        ["command", "seconds", "over import torch"],
        [[name, f"{row['seconds']:.2f}", f"{row['over_import_torch']:+.2f}"] for name, row in rows.items()],
    )
    write(given.json, {"rows": rows})


if __name__ == "__main__":
    main()
