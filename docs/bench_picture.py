"""Draw the top of a benchmark's page into a PNG: recorded rows, of as many ranks as the machine had cores at most.

python docs/bench_picture.py benchmarks/results/strategies_char_gpt.json docs/pictures/bench.png
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

from fabric_lite.bench.exports import export, read_json
from fabric_lite.bench.showing import shown_rows
from fabric_lite.bench.verdict import judge

CORES = 2  # where the rows were recorded: more ranks than that share them, and say nothing of speed
WIDTH, HEIGHT = 1060, 868  # in pixels


def main() -> None:
    """Read the results that the first argument names, and draw into the file that the second one names."""
    recorded, picture = map(Path, sys.argv[1:])
    results = read_json(recorded)
    rows = [row for row in results.rows if row.combination.devices <= CORES]
    results = dataclasses.replace(results, rows=rows)
    verdict = judge(results)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        export(page, results, shown_rows(results, verdict), verdict.sentences, command=verdict.command)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        size, target = f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture.resolve()}"
        profile = f"--user-data-dir={folder}/profile"
        subprocess.run(["chromium", *options, profile, size, target, page.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    main()
