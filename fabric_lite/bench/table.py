"""The results as text for a terminal."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence

from fabric_lite.bench.columns import Column, columns, notes
from fabric_lite.bench.results import Results
from fabric_lite.bench.shown import Shown, about_line, one_line

__all__ = ["table"]

_GAP = "  "
# With names of this length, two tables of the usual columns are 120 characters wide.
_SHORT_NAME = 28
_MARKS = {"best": "*", "WRONG": "!", "not comparable": "?"}


def table(results: Results, shown: Sequence[Shown], verdict: Sequence[str], *, width: int = 120) -> str:
    """Return aligned tables of all rows, what is wrong with some of them, and the verdict.

    Groups of columns stand side by side while they fit into ``width`` characters, and below each other otherwise; where
    that would make more than two tables, long names take several lines. A row that failed says so in the first table
    and is left out of the others.
    """
    known = columns(shown)
    name_size = max((len(one_line(one.name)) for one in shown), default=0)
    if len(_packed(known, shown, width - name_size)) > 2:
        name_size = min(name_size, _SHORT_NAME)
    groups = _packed(known, shown, width - name_size)
    tables = [_table(group, shown, name_size, width, is_first=group is groups[0]) for group in groups]
    remarks = [*_legend(shown), *notes(shown)]
    blocks = [
        [_wrapped(" ".join(results.script), width), _wrapped(about_line(results), width)],
        *(tables if shown else []),
        [_wrapped(remark, width) for remark in remarks],
        [one_line(part) for line in verdict for part in line.split("\n")],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _packed(known: Sequence[Column], shown: Sequence[Shown], room: int) -> list[list[Column]]:
    """The columns of each table."""
    groups = [list(group) for _, group in itertools.groupby(known, key=lambda column: column.group)]
    tables: list[list[Column]] = [[]]
    for group in groups:
        sizes = _sizes([*tables[-1], *group], shown)
        if tables[-1] and sum(sizes) + len(_GAP) * len(sizes) > room:
            tables.append([])
        tables[-1] += group
    return tables


def _sizes(of: Sequence[Column], shown: Sequence[Shown]) -> list[int]:
    return [max(map(len, [column.heading, column.unit, *map(column.cell, shown)])) for column in of]


def _table(of: Sequence[Column], shown: Sequence[Shown], name_size: int, width: int, *, is_first: bool) -> list[str]:
    sizes = _sizes(of, shown)

    def line(name: str, cells: Sequence[str]) -> str:
        padded = [cell.rjust(size) for cell, size in zip(cells, sizes, strict=True)]
        return _GAP.join([name.ljust(name_size), *padded]).rstrip()

    def marked(one: Shown, text: str) -> str:
        return f"{text[:name_size]}{_mark(one)}{text[name_size + 1 :]}".rstrip()

    title = ", ".join(dict.fromkeys(column.group for column in of))
    heads = [line("", [column.heading for column in of]), line("", [column.unit for column in of])]
    lines = [
        *([title.capitalize(), *heads] if of else []),
        _GAP.join("-" * size for size in [name_size, *sizes]),
    ]
    said: dict[str, str] = {}  # by cause, the first row that failed of it
    for one in shown:
        names = _name_lines(one.name, name_size)
        if one.row.failure is None:
            lines += [marked(one, line(names[0], [column.cell(one) or "-" for column in of])), *names[1:]]
        elif is_first:
            first = said.setdefault(one.row.failure, one.name)
            words = f"failed: {one.row.failure if one.name == first else f'as {first}'}"
            causes = _wrapped(words, max(width - name_size - len(_GAP), 40)).split("\n")
            pairs = itertools.zip_longest(names, causes, fillvalue="")
            lines += [f"{name.ljust(name_size)}{_GAP}{cause}".rstrip() for name, cause in pairs]
    return lines


def _mark(one: Shown) -> str:
    return _MARKS.get("best" if one.is_best else one.flag, " ")


def _legend(shown: Sequence[Shown]) -> list[str]:
    used = [f"{mark} {words}" for words, mark in _MARKS.items() if mark in map(_mark, shown)]
    exposed = ["exposed: waiting for collectives; it is part of the other shares"]
    return [*([", ".join(used)] if used else []), *(exposed if any(one.share("exposed") for one in shown) else [])]


def _name_lines(name: str, size: int) -> list[str]:
    """A name in lines that end at its commas where they can."""
    joined = one_line(name).replace(" ", "\N{NO-BREAK SPACE}").replace(",\N{NO-BREAK SPACE}", ", ")
    lines = textwrap.wrap(joined, max(size, 1), break_on_hyphens=False) or [""]
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(one_line(text), width, break_on_hyphens=False)
