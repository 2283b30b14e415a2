"""Bars, axes and legends as SVG for the page, whose style sheet gives the colors by class."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

from fabric_lite.bench.shown import one_line

__all__ = ["WIDTH", "Bar", "Segment", "bar_chart", "drawing", "elided", "legend", "marker", "swatch", "text", "ticks"]

WIDTH = 1040
# Of the text in plots, at 12 px in the widest of the usual fonts.
_CHARACTER = 7.3
_LONGEST_NAME = 54
_GAP = 8


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a bar, on the axis of the figures.

    Args:
        start: Where it begins.
        end: Where it ends.
        style: A class of the style sheet, or ``"hatched"``.
        tip: What a pointer on it shows.
        lane: In which of the bar's lanes, from above.
    """

    start: float
    end: float
    style: str
    tip: str
    lane: int = 0


@dataclasses.dataclass(frozen=True)
class Bar:
    """A row of a bar chart: its name, its parts, and what is written behind them."""

    name: str
    segments: Sequence[Segment] = ()
    note: str = ""
    whisker: tuple[float, float] | None = None


def bar_chart(
    key: str,
    title: str,
    description: str,
    axis: str,
    bars: Sequence[Bar],
    entries: Sequence[tuple[str, str]],
    *,
    lanes: Sequence[int] = (16,),
) -> str:
    """Return a chart of horizontal bars.

    Args:
        key: Unique on the page.
        title: Read out for the whole.
        description: The same, in more words.
        axis: What the horizontal axis shows, with its unit.
        bars: From above.
        entries: Of the legend: a style and its words.
        lanes: Heights of the lanes of a bar.
    """
    left = max((len(elided(bar.name)) for bar in bars), default=0) * _CHARACTER + _GAP
    behind = max((len(bar.note) for bar in bars if bar.segments), default=0) * _CHARACTER + 2 * _GAP
    # A long remark must not squeeze the bars: so much of the room is theirs.
    room = max(WIDTH - left - behind, (WIDTH - left) * 0.4)
    most = max((_end_of(bar) for bar in bars), default=0)
    places = ticks(most)
    scale = room / max(most, places[-1])
    key_parts, top = legend([(swatch(style, key), words) for style, words in entries])
    step = sum(lanes) + 14
    bottom = top + step * len(bars)
    parts = [_hatch(key), *key_parts]
    for place in places:
        x = left + place * scale
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>')
        parts.append(text(x, bottom + 16, f"{place:,g}", "quiet", "middle"))
    parts.append(text(left + room / 2, bottom + 34, axis, "quiet", "middle"))
    for number, bar in enumerate(bars):
        parts += _drawn(bar, key, left, top + step * number + 7, scale, lanes)
    return drawing(title, description, bottom + 42, parts)


def _end_of(bar: Bar) -> float:
    return max([segment.end for segment in bar.segments] + [bar.whisker[1] if bar.whisker else 0.0])


def _drawn(bar: Bar, key: str, left: float, top: float, scale: float, lanes: Sequence[int]) -> list[str]:
    middle = top + sum(lanes) / 2
    parts = [text(left - _GAP, middle + 4, elided(bar.name), "", "end", tip=bar.name)]
    for segment in bar.segments:
        width = max((segment.end - segment.start) * scale, 0.5)
        place = f'x="{left + segment.start * scale:.1f}" y="{top + sum(lanes[: segment.lane])}"'
        size = f'width="{width:.1f}" height="{lanes[segment.lane] - (1 if len(lanes) > 1 else 0)}"'
        tip = f"<title>{escape(one_line(segment.tip))}</title>"
        parts.append(f"<rect {place} {size} {_style(segment.style, key)}>{tip}</rect>")
    if bar.whisker:
        low, high = (left + end * scale for end in bar.whisker)
        line = f"M{low:.1f} {middle - 4}v8M{low:.1f} {middle}H{high:.1f}M{high:.1f} {middle - 4}v8"
        parts.append(f'<path class="whisker" d="{line}"/>')
    x = left + _end_of(bar) * scale + _GAP
    room = int((WIDTH - x) / _CHARACTER)
    parts.append(text(x, middle + 4, elided(bar.note, room), "" if bar.segments else "quiet", tip=bar.note))
    return parts


def _style(style: str, key: str) -> str:
    return f'class="outlined" style="fill: url(#{key}-hatch)"' if style == "hatched" else f'class="{style}"'


def _hatch(key: str) -> str:
    """The filling of what is wrong; a name on a page is its only owner's, hence the key."""
    return (
        f'<defs><pattern id="{key}-hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><path class="hatching" d="M0 0V6"/></pattern></defs>'
    )


def swatch(style: str, key: str = "") -> str:
    """What stands for a style in a legend, 12 pixels wide and high."""
    if style == "whisker":
        return '<path class="whisker" d="M0 2v8M0 6h12M12 2v8"/>'
    if style == "dashed":
        return '<path class="dashed" d="M0 6h12"/>'
    return f'<rect width="12" height="12" {_style(style, key)}/>'


def marker(number: int, style: str, x: float, y: float, tip: str = "") -> str:
    """A point of a line; the shape goes round with the line's number, for those who can't tell its color."""
    shape = ("M-5 -5h10v10h-10z", "M0 -6L6 5H-6z", "M0 -7L7 0L0 7L-7 0z", "M-6 -5H6L0 6z", "M-6 -3H6V3H-6z")[number % 5]
    more = f"<title>{escape(one_line(tip))}</title>" if tip else ""
    return f'<path class="{style}" transform="translate({x:.1f} {y:.1f})" d="{shape}">{more}</path>'


def legend(entries: Sequence[tuple[str, str]]) -> tuple[list[str], int]:
    """Swatches with words, in as many lines as they need, and where the lines end."""
    parts, x, y = [], 0.0, 4
    for symbol, words in entries:
        width = 18 + len(words) * _CHARACTER + 22
        if x and x + width > WIDTH:
            x, y = 0.0, y + 20
        parts.append(f'<g transform="translate({x:.1f} {y})">{symbol}</g>')
        parts.append(text(x + 18, y + 10, words))
        x += width
    return parts, y + 22


def drawing(title: str, description: str, height: float, parts: Sequence[str]) -> str:
    """The whole picture; a title and a description are read out in its place."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'aria-label="{escape(one_line(title))}"><title>{escape(one_line(title))}</title>'
        f"<desc>{escape(one_line(description))}</desc>{''.join(parts)}</svg>"
    )


def text(x: float, y: float, words: str, style: str = "", anchor: str = "start", *, tip: str = "") -> str:
    """Words at a place; ``tip`` shows under a pointer where it says more than they do."""
    words = one_line(words)
    more = f"<title>{escape(one_line(tip))}</title>" if one_line(tip) not in ("", words) else ""
    style = f' class="{style}"' if style else ""
    anchor = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}{anchor}>{more}{escape(words)}</text>'


def elided(words: str, longest: int = _LONGEST_NAME) -> str:
    """Words of at most this length: what names differ in is at either end, so the middle goes."""
    words = one_line(words)
    if len(words) <= longest:
        return words
    tail = max(longest // 2 - 1, 0)
    return f"{words[: max(longest - tail - 1, 0)]}…{words[len(words) - tail :]}"


def ticks(most: float, count: int = 5) -> list[float]:
    """Round numbers from 0 up to ``most``.

    >>> ticks(870.0)
    [0.0, 200.0, 400.0, 600.0, 800.0]
    """
    if not most > 0 or not math.isfinite(most):
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(most / count))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * count >= most)
    return [number * step for number in range(int(most / step + 1e-9) + 1)]
