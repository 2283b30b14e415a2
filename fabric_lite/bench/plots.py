"""The bar charts of the page: throughput, phases of a step, memory."""

from __future__ import annotations

from collections.abc import Sequence

from fabric_lite.bench.columns import MEMORY, memory_scale
from fabric_lite.bench.results import PHASES
from fabric_lite.bench.shown import Shown, figure
from fabric_lite.bench.svg import Bar, Segment, bar_chart

__all__ = ["memory_plot", "phases_plot", "throughput_plot"]

_PHASE_STYLES = {
    "data": "orange",
    "forward": "sky",
    "backward": "blue",
    "optimizer": "green",
    "save": "purple",
    "other": "gray",
}
_MEMORY_STYLES = {"resident": "blue", "tensors": "orange", "device_allocated": "green", "device_reserved": "purple"}
_MEMORY_WORDS = {
    "resident": "RSS",
    "tensors": "tensors",
    "device_allocated": "allocated on the device",
    "device_reserved": "reserved on the device",
}


def throughput_plot(shown: Sequence[Shown], unit: str) -> str | None:
    """Bars with their intervals, in one unit; rows that failed say so. None where no row has that unit."""
    known = [(one, one.throughput) for one in shown if one.throughput is not None and one.throughput_unit == unit]
    if not any(one.row.failure is None for one, _ in known):
        return None
    bars = [_throughput_bar(one, unit) for one in shown if one.throughput_unit == unit or one.row.failure is not None]
    used = {bar.segments[0].style for bar in bars if bar.segments}
    words = {"green": "best", "blue": "ran", "gray": "not comparable", "hatched": "WRONG"}
    entries = [(style, name) for style, name in words.items() if style in used]
    most = max(rate.value for _, rate in known)
    return bar_chart(
        f"throughput-{unit.partition('/')[0]}",
        f"Throughput in {unit} by combination",
        f"Up to {figure(most)} {unit}. " + "; ".join(f"{bar.name}: {bar.note}" for bar in bars),
        f"{unit}, all ranks together",
        bars,
        [*entries, ("whisker", "95 % interval")],
    )


def _throughput_bar(one: Shown, unit: str) -> Bar:
    if one.row.failure is not None:
        return Bar(one.name, note=f"failed: {one.row.failure}")
    rate = one.throughput
    if rate is None:
        return Bar(one.name, note="no figure")
    styles = {"WRONG": "hatched", "not comparable": "gray"}
    style = "green" if one.is_best else styles.get(one.flag, "blue")
    bar = Segment(0.0, rate.value, style, f"{one.name}: {rate} {unit}")
    return Bar(one.name, [bar], _noted(one, f"{rate}"), (rate.low, rate.high) if rate.says_something else None)


def phases_plot(shown: Sequence[Shown]) -> str | None:
    """Where the time of a step goes, phase behind phase; below it in a thin bar what of it waits for collectives."""
    rows = [one for one in shown if one.row.failure is None and one.row.phases]
    if not rows:
        return None
    waits = any(one.row.exposed_communication for one in rows)
    used = [phase for phase in PHASES if any(one.row.phases.get(phase) for one in rows)]
    entries = [(_PHASE_STYLES[phase], phase) for phase in used]
    bars = [_phases_bar(one) for one in rows]
    return bar_chart(
        "phases",
        "Phases of a step by combination, in milliseconds",
        "; ".join(f"{bar.name}: {', '.join(part.tip for part in bar.segments)}" for bar in bars),
        "ms of a step, the slowest rank",
        bars,
        [*entries, *([("red", "of it waiting for collectives (exposed)")] if waits else [])],
        lanes=(14, 7) if waits else (16,),
    )


def _phases_bar(one: Shown) -> Bar:
    segments, start = [], 0.0
    for phase in PHASES:
        took = one.row.phases.get(phase, 0.0) * 1e3
        if took:
            tip = f"{phase} {figure(took)} ms ({(one.share(phase) or 0) * 100:.1f} %)"
            segments.append(Segment(start, start + took, _PHASE_STYLES[phase], tip))
            start += took
    exposed = (one.row.exposed_communication or 0.0) * 1e3
    if exposed:
        segments.append(Segment(0.0, exposed, "red", f"exposed communication {figure(exposed)} ms", lane=1))
    return Bar(one.name, segments, _noted(one, f"{figure(start)} ms"))


def memory_plot(shown: Sequence[Shown]) -> str | None:
    """The peak of the rank that needs most, by kind of memory."""
    rows = [one for one in shown if one.row.failure is None and one.row.memory is not None]
    if not rows:
        return None
    size, unit = memory_scale(rows)
    kinds = [kind for kind in MEMORY if any(getattr(one.row.memory, kind) is not None for one in rows)]
    bars = []
    for one in rows:
        amounts = [(lane, kind, getattr(one.row.memory, kind)) for lane, kind in enumerate(kinds)]
        segments = [
            Segment(0.0, amount / size, _MEMORY_STYLES[kind], f"{MEMORY[kind]} {figure(amount / size)} {unit}", lane)
            for lane, kind, amount in amounts
            if amount is not None
        ]
        note = " / ".join("-" if amount is None else figure(amount / size) for _, _, amount in amounts)
        bars.append(Bar(one.name, segments, _noted(one, f"{note} {unit}")))
    return bar_chart(
        "memory",
        f"Peak memory of the rank that needs most, by combination, in {unit}",
        "; ".join(f"{bar.name}: {', '.join(part.tip for part in bar.segments)}" for bar in bars),
        f"{unit} at the peak",
        bars,
        [(_MEMORY_STYLES[kind], _MEMORY_WORDS[kind]) for kind in kinds],
        lanes=[10] * len(kinds) if len(kinds) > 1 else (16,),
    )


def _noted(one: Shown, words: str) -> str:
    """What is written behind the bar of a row, with what a reader must not overlook."""
    return ", ".join([words, *(["★ best"] if one.is_best else []), *([one.flag] if one.flag not in ("", "ok") else [])])
