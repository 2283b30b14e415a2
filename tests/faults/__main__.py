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
import tempfile
from pathlib import Path

import pytest

from tests.faults.record import FIGURES, write_table

HERE = Path(__file__).parent


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


if __name__ == "__main__":
    raise SystemExit(main())
