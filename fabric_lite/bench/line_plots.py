"""What the page draws over rounds and over devices."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from fabric_lite.bench.shown import Shown, figure
from fabric_lite.bench.svg import WIDTH, drawing, elided, legend, marker, swatch, text, ticks

__all__ = ["rounds_plot", "scaling_plot"]

_LINE_STYLES = ("blue", "orange", "green", "purple", "sky", "red", "gray")
_MOST_DOTS = 400


def rounds_plot(shown: Sequence[Shown]) -> str | None:
    """Every step of every round against the row's own median, a panel a row, so that drift is seen."""
    rows = [one for one in shown if one.row.failure is None and any(one.row.step_seconds)]
    if not rows:
        return None
    relative = [_relative(one) for one in rows]
    ends = [value for rounds in relative for values in rounds for value in values]
    # Figures far out are drawn at the edge: they must not flatten the rest.
    spread = sorted(abs(value) for value in ends)[int(0.97 * (len(ends) - 1))]
    moved = max(abs(statistics.median(values)) for rounds in relative for values in rounds if values)
    reach = min(max(1.2 * spread, 1.2 * moved, 0.05), 1.0)
    parts, top = legend([(swatch("orange"), "a step"), (swatch("ink"), "median of a round")])
    half, height = WIDTH / min(2, len(rows)), 104
    for number, (one, rounds) in enumerate(zip(rows, relative, strict=True)):
        parts += _panel(one, rounds, reach, number % 2 * half, top + number // 2 * height, half - 20)
    bottom = top + (len(rows) + 1) // 2 * height
    parts.append(text(WIDTH / 2, bottom + 14, "rounds, in the order in which they were taken", "quiet", "middle"))
    drift = [
        f"{one.name}: {', '.join(f'{statistics.median(values) * 100:+.1f} %' for values in rounds if values)}"
        for one, rounds in zip(rows, relative, strict=True)
    ]
    title = "Step times over the rounds, against the median of all steps of the same combination"
    return drawing(title, f"Median of each round. {'; '.join(drift)}", bottom + 22, parts)


def _relative(one: Shown) -> list[list[float]]:
    median = statistics.median(itertools.chain.from_iterable(one.row.step_seconds))
    return [[value / median - 1 if median else 0.0 for value in values] for values in one.row.step_seconds]


def _panel(one: Shown, rounds: list[list[float]], reach: float, left: float, top: float, width: float) -> list[str]:
    inner, height = left + 52, 58
    middle = top + 20 + height / 2
    span = (width - 52) / len(rounds)
    median = statistics.median(itertools.chain.from_iterable(one.row.step_seconds))

    def across(value: float) -> float:
        return middle - max(-1.0, min(1.0, value / reach)) * height / 2

    parts = [text(inner, top + 12, f"{elided(one.name, 50)}: {figure(median * 1e3)} ms", tip=one.name)]
    for value in (-reach, 0.0, reach):
        parts.append(f'<path class="grid" d="M{inner:.1f} {across(value):.1f}H{left + width:.1f}"/>')
        words = f"{value * 100:+.0f} %" if value else "median"
        parts.append(text(inner - 6, across(value) + 4, words, "quiet small", "end"))
    every = max(1, sum(map(len, rounds)) // _MOST_DOTS)
    labeled = max(1, -(-len(rounds) // 12))
    dots, medians = [], []
    for number, values in enumerate(rounds):
        start = inner + number * span
        if number:
            parts.append(f'<path class="grid" d="M{start:.1f} {top + 20}v{height}"/>')
        if number % labeled == 0:
            parts.append(text(start + span / 2, top + 20 + height + 14, str(number + 1), "quiet small", "middle"))
        for place, value in enumerate(values):
            if place % every == 0:
                dots.append(f"M{start + (place + 0.5) * span / len(values):.1f} {across(value):.1f}h.01")
        if values:
            y = across(statistics.median(values))
            medians.append(f"M{start + span * 0.08:.1f} {y:.1f}h{span * 0.84:.1f}")
    return [
        *parts,
        f'<path class="dots" d="{"".join(dots)}"/>',
        f'<path class="median" d="{"".join(medians)}"/>',
    ]


def scaling_plot(shown: Sequence[Shown]) -> str | None:
    """What several devices reach of as many times one; rows that are wrong are left out. None where there are none."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for one in shown:
        combination = one.row.combination
        if one.scaling is None or combination.devices == 1 or one.row.is_repeat or one.flag == "WRONG":
            continue
        batch = [] if combination.batch_size is None else [f"batch {combination.batch_size}"]
        name = ", ".join([combination.strategy, combination.precision, *batch])
        lines.setdefault(name, [(1, 1.0)]).append((combination.devices, one.scaling))
    if not lines:
        return None
    styles = dict(zip(lines, itertools.cycle(_LINE_STYLES), strict=False))
    entries = [(marker(number, styles[name], 6, 6), name) for number, name in enumerate(lines)]
    key_parts, top = legend([*entries, (swatch("dashed"), "ideal")])
    counts = sorted({count for points in lines.values() for count, _ in points})
    most = max(share for points in lines.values() for _, share in points) * 100
    left, right, high, bottom = 60.0, WIDTH - 40.0, top + 24.0, top + 264.0

    def place(count: int, share: float) -> tuple[float, float]:
        # Evenly, whatever the counts: they often double.
        across = counts.index(count) / (len(counts) - 1)
        return left + 30 + across * (right - left - 30), bottom - share * 100 / most * (bottom - high)

    parts = [*key_parts, text(left - 8, high - 14, "% of ideal", "quiet")]
    for tick in ticks(most):
        y = place(1, tick / 100)[1]
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(text(left - 8, y + 4, f"{tick:,g}", "quiet", "end"))
    parts += [text(place(count, 0)[0], bottom + 18, str(count), "quiet", "middle") for count in counts]
    parts.append(text((left + right) / 2, bottom + 36, "devices", "quiet", "middle"))
    parts.append(f'<path class="dashed" d="{_path([place(1, 1.0), place(counts[-1], 1.0)])}"/>')
    for number, (name, points) in enumerate(lines.items()):
        drawn = [(count, share, *place(count, share)) for count, share in sorted(points)]
        parts.append(f'<path class="line {styles[name]}" d="{_path([(x, y) for _, _, x, y in drawn])}"/>')
        for count, share, x, y in drawn:
            parts.append(marker(number, styles[name], x, y, f"{name}: {share * 100:.1f} % on {count}"))
    described = [
        f"{name}: {', '.join(f'{share * 100:.1f} % on {count}' for count, share in sorted(points))}"
        for name, points in lines.items()
    ]
    return drawing("Scaling efficiency over the number of devices", "; ".join(described), bottom + 44, parts)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
