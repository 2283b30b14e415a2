"""The results as one page that opens without a network: all it needs is in it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape

from fabric_lite.bench.columns import Column, columns, notes
from fabric_lite.bench.line_plots import rounds_plot, scaling_plot
from fabric_lite.bench.page_style import SCRIPT, STYLE
from fabric_lite.bench.plots import memory_plot, phases_plot, throughput_plot
from fabric_lite.bench.results import Results
from fabric_lite.bench.shown import UNITS, Shown, about_line, one_line

__all__ = ["page", "parts_of_verdict"]

# A browser that reads this asks nobody for anything, whatever a name in the results says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_CAPTIONS = {
    "Throughput": "The lines at the ends of the bars are 95 % intervals.",
    "Phases of a step": "On the slowest rank: means of a round, medians over rounds. "
    "Waiting for collectives is part of the phases above it.",
    "Memory": "Peaks of the rank that needs most.",
    "Step times over the rounds": "The rounds of all combinations were taken in turn, so a machine that slows down "
    "shows in all panels at the same round. What is farther out than the axis is drawn at its edge.",
    "Scaling": "Throughput over that of one device times the number of devices; rows that are wrong are left out.",
}


def page(results: Results, shown: Sequence[Shown], verdict: Sequence[str], *, command: str | None = None) -> str:
    """Return the page as HTML.

    Args:
        results: Of which the page is.
        shown: Its rows, in the order to show them.
        verdict: Lines of words.
        command: The command line that the verdict recommends.
    """
    title = escape(one_line(f"fabric-bench: {' '.join(results.script)}"))
    plots = {
        "Throughput": [throughput_plot(shown, unit) for unit in UNITS],
        "Phases of a step": [phases_plot(shown)],
        "Memory": [memory_plot(shown)],
        "Step times over the rounds": [rounds_plot(shown)],
        "Scaling": [scaling_plot(shown)],
    }
    tables = _tables(shown)
    sections = [
        _section("Verdict", _verdict(verdict, command)),
        *(
            _section(_heading(group), _table(group, shown, is_first=group is tables[0]), _caption(group))
            for group in tables
        ),
        _section("Remarks", _remarks(shown)),
        *(
            _section(name, "".join(f"<figure>{plot}</figure>" for plot in drawn if plot), _CAPTIONS[name])
            for name, drawn in plots.items()
        ),
    ]
    about = f"<p>{escape(one_line(about_line(results)))}</p><p><code>{escape(results.about.command)}</code></p>"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{title}</h1>{about}</header>\n<main>\n{''.join(sections)}</main>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def parts_of_verdict(verdict: Sequence[str], command: str | None) -> list[tuple[str, bool]]:
    """The lines in parts, and whether each is the command line: it stands by itself where a line has it, else last."""
    if not command:
        return [(line, False) for line in verdict]
    parts = []
    for line in verdict if any(command in line for line in verdict) else [*verdict, command]:
        before, found, after = line.partition(command)
        parts += [(before.strip(), False), (found, True), (after.strip(), False)]
    return [part for part in parts if part[0]]


def _section(name: str, content: str, caption: str = "") -> str:
    if not content:
        return ""
    words = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    return f"<section><h2>{escape(name)}</h2>{words}{content}</section>\n"


def _verdict(verdict: Sequence[str], command: str | None) -> str:
    return "".join(
        f"<pre><code>{escape(part)}</code></pre>" if is_command else f"<p>{escape(one_line(part))}</p>"
        for part, is_command in parts_of_verdict(verdict, command)
    )


def _remarks(shown: Sequence[Shown]) -> str:
    remarks = "".join(f"<li>{escape(one_line(note))}</li>" for note in notes(shown))
    return f"<ul>{remarks}</ul>" if remarks else ""


def _tables(shown: Sequence[Shown]) -> list[list[Column]]:
    """Speed and its shares in one table, the rest in another: a page is about that wide."""
    halves = itertools.groupby(columns(shown), key=lambda column: column.group in ("speed", "share of a step"))
    return [list(half) for _, half in halves] or [[]] * bool(shown)


def _heading(of: Sequence[Column]) -> str:
    return " and ".join(dict.fromkeys(column.group for column in of)).capitalize() or "Combinations"


def _caption(of: Sequence[Column]) -> str:
    exposed = any(column.heading == "exposed" for column in of)
    return "Exposed: waiting for collectives; it is part of the other shares." if exposed else ""


def _table(of: Sequence[Column], shown: Sequence[Shown], *, is_first: bool) -> str:
    heads = "".join(
        f'<th scope="col">{escape(column.heading)}<small>{escape(column.unit)}</small></th>' for column in of
    )
    lines = "".join(_line(one, of, is_first=is_first) for one in shown)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(_heading(of))}"><table>'
        f'<thead><tr><th scope="col">combination<small></small></th>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _line(one: Shown, of: Sequence[Column], *, is_first: bool) -> str:
    state = "best" if one.is_best else {"WRONG": "wrong", "not comparable": "unsure"}.get(one.flag, "")
    mark = {"best": "★ best", "wrong": "WRONG", "unsure": "not comparable"}.get(state, "")
    name = escape(one_line(one.name)) + (f' <span class="mark">{mark}</span>' if mark else "")
    if one.row.failure is not None:
        words = f"failed: {escape(one_line(one.row.failure))}" if is_first else "failed"
        cause = f'<td class="failure" colspan="{max(1, len(of))}">{words}</td>'
        return f'<tr class="failed"><th scope="row">{name}</th>{cause}</tr>'
    cells = "".join(f"<td{_sorted_by(column, one)}>{escape(column.cell(one)) or '-'}</td>" for column in of)
    return f'<tr class="{state}"><th scope="row">{name}</th>{cells}</tr>'


def _sorted_by(column: Column, one: Shown) -> str:
    number = column.number(one)
    return "" if number is None or math.isnan(number) else f' data-value="{number!r}"'
