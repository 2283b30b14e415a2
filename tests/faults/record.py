"""The figures of the fault tests: kept as JSON, each with the commit that was tested, and shown as a page."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["FIGURES", "merge", "write_table"]

_ROOT = Path(__file__).parents[2]
FIGURES = _ROOT / "docs" / "faults.json"


def merge(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Add rows to the file, in the place of earlier ones of their names."""
    known = json.loads(path.read_text()) if path.exists() else {}
    commit = _commit()
    new = {name: {"commit": commit, "figures": values} for name, values in rows.items()}
    path.write_text(json.dumps(known | new, indent=1) + "\n")


def write_table() -> None:
    """Turn the figures into a page."""
    rows = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    lines = [
        "# What was broken on purpose, and what came of it",
        "",
        "Written by `python -m tests.faults --full`; a row is written when its test has passed, with the commit that",
        "was tested. The peers' rows are of `python -m tests.faults.peers`.",
        "",
        "| fault | figures | commit |",
        "|---|---|---|",
    ]
    for name in sorted(rows):
        values = ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in rows[name]["figures"].items())
        lines.append(f"| {name} | {values} | {rows[name]['commit']} |")
    FIGURES.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _commit() -> str:
    """What is tested; with a plus where the working tree differs from it."""
    changes = _git("status", "--porcelain", "--", "fabric_lite", "tests")
    return _git("rev-parse", "--short", "HEAD").strip() + "+" * bool(changes)


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=_ROOT, capture_output=True, text=True, check=False).stdout
