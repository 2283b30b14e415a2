"""Run the fault tests: ``python -m tests.faults`` a twentieth of each count, ``--full`` all of it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--full", action="store_true", help="the complete counts")
    arguments, others = parser.parse_known_args()
    chosen = "full" if arguments.full else "not full"
    # The complete counts take longer than a single test otherwise may.
    return int(pytest.main([str(Path(__file__).parent), "-m", chosen, "--timeout=3600", *others]))


if __name__ == "__main__":
    raise SystemExit(main())
