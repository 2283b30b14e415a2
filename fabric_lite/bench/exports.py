"""The results as files: JSON, CSV, Markdown, the page and a picture."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fabric_lite import whole_file
from fabric_lite.bench.columns import columns, notes
from fabric_lite.bench.page import page, parts_of_verdict
from fabric_lite.bench.picture import picture
from fabric_lite.bench.results import PHASES, Results
from fabric_lite.bench.shown import Shown, about_line, one_line
from fabric_lite.errors import FabricRuntimeError, FabricValueError

__all__ = ["as_csv", "as_json", "as_markdown", "check_output", "export", "read_json", "write_whole"]

_ENDINGS = (".json", ".csv", ".md", ".html", ".svg")


def export(
    path: Path, results: Results, shown: Sequence[Shown], verdict: Sequence[str], *, command: str | None = None
) -> None:
    """Write the results in the form that the name's ending asks for: .json, .csv, .md, .html or .svg.

    Raises FabricValueError for other endings, and FabricRuntimeError where the file can't be written; a file that was
    there before is then as it was.
    """
    _check_ending(path)
    if path.suffix == ".json":
        text = as_json(results)
    elif path.suffix == ".csv":
        text = as_csv(shown)
    elif path.suffix == ".md":
        text = as_markdown(results, shown, verdict, command=command)
    elif path.suffix == ".svg":
        text = picture(shown)
    else:
        text = page(results, shown, verdict, command=command)
    write_whole(path, text)


def check_output(path: Path) -> None:
    """Raise FabricValueError if it is known before that the results cannot be written there."""
    _check_ending(path)
    folder = path.parent
    if path.exists() and not path.is_file():
        raise FabricValueError("This is no file to write results to.", given=path, fix="the name of a file.")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise FabricValueError(
            "The results could not be written there.", given=path, fix="a folder that exists and is writable."
        )


def _check_ending(path: Path) -> None:
    """Raise FabricValueError if results are not written to files with this ending."""
    if path.suffix not in _ENDINGS:
        raise FabricValueError(
            "Results are not written to files of this kind.",
            given=path,
            fix=f"a name that ends in {', '.join(_ENDINGS)}.",
        )


def as_json(results: Results) -> str:
    """All that was found, for :func:`read_json`. What is infinite or not a number is written as Python's json does."""
    return json.dumps(results.as_json(), indent=2) + "\n"


def read_json(path: Path) -> Results:
    """The inverse of :func:`as_json`, from a file."""
    try:
        return Results.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FabricValueError(
            f"{path} could not be read as results: {type(error).__name__}: {error}",
            fix="a file that fabric-bench has written as JSON.",
        ) from error


def as_csv(shown: Sequence[Shown]) -> str:
    """One line for each row, plain numbers, the unit at the end of each heading; what is not known is empty."""
    lines = [_plain(one) for one in shown]
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(lines[0]) if lines else ["name"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def as_markdown(results: Results, shown: Sequence[Shown], verdict: Sequence[str], *, command: str | None = None) -> str:
    """A table as GitHub shows it, and the verdict above it."""
    known = columns(shown)
    heads = [f"{column.heading} {column.unit}".strip() for column in known]
    lines = [
        f"# {_escaped(' '.join(results.script))}",
        *(_fenced(part) if is_command else _escaped(part) for part, is_command in parts_of_verdict(verdict, command)),
        "\n".join(
            [
                _cells(["combination", *heads]),
                _cells(["---", *("---:" for _ in known)]),
                *(_cells([_name(one), *(_escaped(column.cell(one)) for column in known)]) for one in shown),
            ]
        ),
        "\n".join(f"- {_escaped(note)}" for note in [*_failures(shown), *notes(shown)]),
        _escaped(about_line(results)),
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Let the file have this content, or be as it was before.

    What of a script's path is no text (bytes that are not UTF-8) is spelled out.
    """
    try:
        whole_file.write_whole(path, text.encode(errors="backslashreplace"))
    except OSError as error:
        raise FabricRuntimeError(
            f"The results could not be written; what was there before is as it was: {error}",
            given=path,
            fix="a folder that exists, is writable and has room.",
        ) from error


def _plain(one: Shown) -> dict[str, Any]:
    row, combination = one.row, one.row.combination
    rate, memory, communication, comparison = one.throughput, row.memory, row.communication, row.comparison
    per_second = one.throughput_unit.replace("/s", "_per_second")
    rates = {
        f"{unit}{end}": getattr(rate, field) if rate is not None and unit == per_second else None
        for unit in ("samples_per_second", "steps_per_second")
        for end, field in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
    return {
        "name": one.name,
        "strategy": combination.strategy,
        "precision": combination.precision,
        "devices": combination.devices,
        "batch_size": combination.batch_size,
        "is_best": one.is_best,
        "is_repeat": row.is_repeat,
        "failure": row.failure,
        **rates,
        "tokens_per_second": one.tokens_per_second,
        "step_p50_seconds": one.step_p50_seconds,
        "step_p95_seconds": one.step_p95_seconds,
        **{f"{phase}_seconds": row.phases.get(phase) for phase in PHASES},
        "exposed_communication_seconds": row.exposed_communication,
        "resident_bytes": memory and memory.resident,
        "tensors_bytes": memory and memory.tensors,
        "device_allocated_bytes": memory and memory.device_allocated,
        "device_reserved_bytes": memory and memory.device_reserved,
        "collectives_per_step": communication and sum(communication.calls.values()),
        "collective_bytes_per_step": communication and sum(communication.bytes.values()),
        "startup_seconds": row.startup_seconds,
        "scaling_fraction": one.scaling,
        "kept_of_ddp_fraction": one.kept,
        "comparison": comparison and comparison.verdict,
        "loss_difference": comparison and comparison.loss,
        "gradient_difference": comparison and comparison.gradient,
        "parameters_difference": comparison and comparison.parameters,
        "tolerance": comparison and comparison.tolerance,
        "reason": comparison and comparison.reason,
    }


def _failures(shown: Sequence[Shown]) -> list[str]:
    return [f"{one.name}: failed: {one.row.failure}" for one in shown if one.row.failure is not None]


def _name(one: Shown) -> str:
    state = "failed" if one.row.failure is not None else "best" * one.is_best
    return f"**{_escaped(one.name)}**" if state == "best" else _escaped(one.name) + f" ({state})" * bool(state)


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{character}" if character in "\\`*[]|" else character for character in text)


def _fenced(command: str) -> str:
    """A block of code whose fence is longer than any in it."""
    fence = "```"
    while fence in command:
        fence += "`"
    return f"{fence}bash\n{command}\n{fence}"
