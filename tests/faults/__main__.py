"""Run the fault tests, and write the table of their figures.

python -m tests.faults                  a twentieth of each count, as plain pytest does
python -m tests.faults --full           all of it, about an hour on two cores; started again, it goes on where it
                                        stopped, as long as the code is the same
python -m tests.faults --full --again   from the first test on
python -m tests.faults --table          only write docs/faults.md anew from docs/faults.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
FIGURES = DOCS / "faults.json"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the complete counts")
    parser.add_argument("--again", action="store_true", help="also the tests that have passed before")
    parser.add_argument("--table", action="store_true", help="run nothing, only write the table")
    arguments, others = parser.parse_known_args()
    if arguments.table:
        write_table()
        return 0
    if not arguments.full:
        return int(pytest.main([str(HERE), "-m", "not full", *others]))
    progress = Path(tempfile.gettempdir()) / f"fabric-lite-faults-{fingerprint()}"
    if arguments.again:
        progress.unlink(missing_ok=True)
    # The complete counts take longer than a single test otherwise may.
    options = ["-m", "full", "--timeout=3600", f"--figures={FIGURES}", f"--progress={progress}"]
    code = pytest.main([str(HERE), *options, *others])
    write_table()
    return 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else int(code)


def fingerprint() -> str:
    """Of the package's and the tests' code: what passed with other code has to be shown again."""
    digest = hashlib.sha256()
    for folder in (HERE.parent.parent / "fabric_lite", HERE.parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def write_table() -> None:
    """Turn the figures into a page."""
    rows = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    lines = [
        "# What was broken on purpose, and what came of it",
        "",
        "Written by `python -m tests.faults --full`; a row is written when its test has passed.",
        "",
        "| fault | figures |",
        "|---|---|",
    ]
    for name in sorted(rows):
        values = ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in rows[name].items())
        lines.append(f"| {name} | {values} |")
    (DOCS / "faults.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
