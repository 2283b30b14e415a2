"""The throughput of all combinations as a picture by itself, for a README say."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from fabric_lite.bench.page_style import PICTURE_STYLE
from fabric_lite.bench.plots import throughput_plot
from fabric_lite.bench.shown import UNITS, Shown
from fabric_lite.bench.svg import drawing, text

__all__ = ["picture"]

_NOTHING = "No combination ran."
_SVG = "{http://www.w3.org/2000/svg}"
_GAP = 16


def picture(shown: Sequence[Shown]) -> str:
    """Return it as SVG with its own style sheet; it needs no other file.

    Rows in another unit have a panel of their own, below.
    """
    plots = [plot for unit in UNITS if (plot := throughput_plot(shown, unit)) is not None]
    if not plots:
        drawn = drawing(_NOTHING, _NOTHING, 30, [text(0, 20, _NOTHING)])
    else:
        drawn = plots[0] if len(plots) == 1 else _below_each_other(plots)
    return drawn.replace("<title>", f"<style>{PICTURE_STYLE}</style><title>", 1) + "\n"


def _below_each_other(plots: Sequence[str]) -> str:
    """One drawing of several, each with the size that it has alone."""
    panels, words, top = [], [], 0
    for plot in plots:
        root = ElementTree.fromstring(plot)
        height = int(root.attrib["viewBox"].split()[3])
        panels.append(plot.replace("<svg ", f'<svg y="{top}" height="{height}" ', 1))
        words.append(root.findtext(f"{_SVG}desc") or "")
        top += height + _GAP
    return drawing("Throughput by combination", " ".join(words), top - _GAP, panels)
