"""The throughput of all combinations as a picture by itself, for a README say."""

from __future__ import annotations

from collections.abc import Sequence

from fabric_lite.bench.page_style import PICTURE_STYLE
from fabric_lite.bench.plots import throughput_plot
from fabric_lite.bench.shown import Shown
from fabric_lite.bench.svg import drawing, text

__all__ = ["picture"]

_NOTHING = "No combination ran."


def picture(shown: Sequence[Shown]) -> str:
    """Return it as SVG with its own style sheet; it needs no other file."""
    plots = (throughput_plot(shown, unit) for unit in ("samples/s", "steps/s"))
    drawn = next((plot for plot in plots if plot is not None), None)
    drawn = drawn or drawing(_NOTHING, _NOTHING, 30, [text(0, 20, _NOTHING)])
    return drawn.replace("<title>", f"<style>{PICTURE_STYLE}</style><title>", 1) + "\n"
