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

# The headings of the page, and how the names of the rows below each begin.
_SECTIONS = {
    "A save is interrupted": ("SIGKILL at", "killed at an operation", "power cut"),
    "The same kills, and others": ("random SIGKILL",),
    "A checkpoint is damaged": ("every bit", "flipped bits"),
    "A run goes on": (
        "exact resume",
        "resume at",
        "a node of two is killed",
        "a rank of 2",
        "a rank of 3",
        "preemption",
    ),
    "A rank or the launcher fails": ("a rank fails", "a rank of two nodes", "the launcher"),
    "A rank hangs": ("hang", "steps of"),
}
# What the columns mean, in their order.
_COLUMNS = {
    "trials": "how often it was tried",
    "cells": "combinations of moment, workers and kind of checkpoint",
    "operations": "what a save asks of the system: each is a moment to be killed at, before it and after it",
    "kills": "processes killed",
    "cuts": "moments at which the power was cut",
    "states_of_the_disk": "what a disk may hold after such a cut, all of it read back",
    "within_a_save": "of the kills, those that hit a save that was under way",
    "bits": "flipped one at a time",
    "old": "afterward the checkpoint was the one before",
    "new": "afterward it was the new one",
    "intact": "afterward one whole checkpoint could be loaded",
    "bitwise": "the run that went on was equal to one that was never stopped, in every bit",
    "states_equal": "what was loaded was equal to what was saved",
    "lost": "afterward no checkpoint could be loaded",
    "mixed": "what was loaded was a part of the old one and a part of the new one",
    "leftovers": "files that nobody removed, after the next save",
    "repeated": "samples that were trained on twice",
    "skipped": "samples that were left out",
    "weights_differ_by_at_most": "from those of a run that was never stopped",
    "saves_at_an_agreed_step": "after a signal to one rank, all ranks saved after the same step",
    "too_late": "signals that came after the last step at which the run could still be asked",
    "runs": "from the first step to the last",
    "steps_lost": "trained, and not in the checkpoint that the next part began from",
    "found": "of the trials or bits, those that were noticed",
    "worst": "the longest time until then",
    "named_on_both": "the failing rank was named by the launchers of both nodes",
    "seconds": "of training",
    "steps": "of the optimizer",
    "false_alarms": "steps that were taken for a hang",
    "seconds_p95": "from the failure to the report, of 95 in 100 trials",
    "seconds_until_nothing_is_left": "from the failure to the end of the last process, at most",
    "lines_at_most": "of the report",
    "orphans": "processes that outlived the job",
}


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
        "was tested. What happened to others under the same kills is written by `python -m tests.faults.peers`.",
    ]
    left = dict(rows)
    for title, beginnings in _SECTIONS.items():
        own = {name: left.pop(name) for name in sorted(left) if name.startswith(beginnings)}
        lines += _section(title, own) if own else []
    assert not left, f"no section of {__file__} takes {', '.join(left)}"
    FIGURES.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _section(title: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A heading, what the columns mean, and a table for all rows that begin alike and have the same ones."""
    tables: dict[tuple[str, tuple[str, ...]], dict[str, Mapping[str, Any]]] = {}
    for name, row in rows.items():
        beginning, _, own = name.partition(": ")
        columns = tuple(sorted(row["figures"], key=list(_COLUMNS).index))
        tables.setdefault((beginning if own else "fault", columns), {})[own or name] = row
    shown = [column for column in _COLUMNS if any(column in columns for _, columns in tables)]
    lines = ["", f"## {title}", "", *(f"- *{_words(column)}*: {_COLUMNS[column]}" for column in shown)]
    for (head, columns), found in tables.items():
        lines += ["", f"| {head} | {' | '.join(map(_words, columns))} | commit |", f"|---|{'---:|' * len(columns)}---|"]
        for name, row in found.items():
            figures = " | ".join(str(row["figures"][column]) for column in columns)
            lines.append(f"| {name} | {figures} | {row['commit']} |")
    return lines


def _words(column: str) -> str:
    return column.replace("_", " ")


def _commit() -> str:
    """What is tested; with a plus where the working tree differs from it."""
    changes = _git("status", "--porcelain", "--", "fabric_lite", "tests")
    return _git("rev-parse", "--short", "HEAD").strip() + "+" * bool(changes)


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=_ROOT, capture_output=True, text=True, check=False).stdout
