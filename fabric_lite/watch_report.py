"""What is said about a job that hangs: who did not arrive, and where each rank stands."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

from fabric_lite.call_site import names_of
from fabric_lite.watch_position import Position

__all__ = ["RankStatus", "absent_ranks", "explain", "explain_late"]

# Ten in all, with what the watch and the launcher add.
_MAX_LINES = 8
_MAX_TEXT_CHARACTERS = 100


@dataclasses.dataclass(frozen=True)
class RankStatus:
    """What one rank says about itself.

    Args:
        beat: Counts how often it has said so.
        age_seconds: Since anything moved on it.
        arrived_seconds: Since it entered its latest collective, or came to the comparison of one.
        sequence: By process group, how many collectives it has entered; by check, how many calls it has come to.
        position: Where its training thread stands.
        is_debugged: Whether a debugger follows that thread.
        has_left: Whether it has closed its Fabric, or come to the end of its script.
        host: The name of its node.
        pid: Its process.
    """

    beat: int = 0
    age_seconds: float = 0.0
    arrived_seconds: float = 0.0
    sequence: Mapping[str, int] = dataclasses.field(default_factory=dict)
    position: Position | None = None
    is_debugged: bool = False
    has_left: bool = False
    host: str = ""
    pid: int = 0

    @property
    def waits(self) -> bool:
        """Whether it stands in a collective or the check of one, or in backward, which may be one."""
        return _waits_in(self) is not None

    @staticmethod
    def of(fields: dict[str, Any]) -> RankStatus:
        """From ``dataclasses.asdict``."""
        position = fields.pop("position")
        return RankStatus(**fields, position=None if position is None else Position(**position))


def absent_ranks(statuses: Mapping[int, RankStatus], silent: Iterable[int] = ()) -> list[int]:
    """The ranks that others wait for, by rank; empty when none can be told from the others.

    Args:
        statuses: By rank, those that are known.
        silent: Ranks that do not respond.
    """
    silent = sorted(silent)
    if silent:
        return silent
    left = [rank for rank, status in statuses.items() if status.has_left]
    if left:
        return sorted(left)
    top: dict[str, int] = {}
    for status in statuses.values():
        for group, count in status.sequence.items():
            top[group] = max(count, top.get(group, 0))
    behind = {rank for rank, s in statuses.items() if any(count < top[group] for group, count in s.sequence.items())}
    # A rank that waits in a collective has arrived, if at another one. One in backward may or may not wait.
    late = sorted(rank for rank in behind if _waits_in(statuses[rank]) in (None, "backward"))
    if late and len(late) < len(statuses):
        return late
    outside = sorted(rank for rank, status in statuses.items() if _waits_in(status) is None)
    return outside if len(outside) < len(statuses) else []


def explain(
    statuses: Mapping[int, RankStatus], silent: Mapping[int, str], missing: Iterable[int], limit_seconds: float
) -> list[str]:
    """Return the report: its first line names rank and cause.

    Args:
        statuses: By rank, what each has said last.
        silent: By rank, why it does not respond, in words.
        missing: Ranks of which nothing was ever heard.
        limit_seconds: For so long nothing has moved.
    """
    missing = sorted(missing)
    first = _cause(statuses, silent, missing, limit_seconds)
    lines = [first]
    for ranks, status in _grouped(statuses, silent):
        heard = f"when last heard of; {silent[ranks[0]]}" if ranks[0] in silent else None
        note = heard or ("has left" if status.has_left else _arrival(status))
        lines.append(f"  {names_of(ranks)}: {_place(status.position)}{f'; {note}' if note else ''}")
    if missing:
        lines.append(f"  {names_of(missing)}: nothing was heard")
    if len(lines) > _MAX_LINES:
        lines[_MAX_LINES - 1 :] = [f"  ... and {len(lines) - _MAX_LINES + 1} more places"]
    return lines


def explain_late(late: Mapping[int, RankStatus], waiting: Mapping[int, RankStatus]) -> str:
    """Return the line about ranks that came after the others had waited long.

    Args:
        late: By rank, where those ranks stood while the others waited.
        waiting: The others, then.
    """
    stood = sorted({_short(status.position) for status in late.values()} - {""})
    where = f"; {'it' if len(late) == 1 else 'they'} stood at {', '.join(stood[:3])}" if stood else ""
    seconds = max(status.age_seconds for status in waiting.values())
    call = _call(next(iter(waiting.values())))
    return f"{names_of(sorted(late))} kept {names_of(sorted(waiting))} waiting {call} for {seconds:.0f} s{where}"


def _cause(
    statuses: Mapping[int, RankStatus], silent: Mapping[int, str], missing: list[int], limit_seconds: float
) -> str:
    if missing and not silent:
        return f"{names_of(missing)} did not start: {_others(statuses, missing)}"
    absent = absent_ranks(statuses, silent)
    if silent:
        reasons = sorted(set(silent.values()))
        return f"{names_of(absent)} did not arrive and {reasons[0]}: {_others(statuses, absent)}"
    if absent and statuses[absent[0]].has_left:
        place = _short(statuses[absent[0]].position)
        return f"{names_of(absent)} left the run{f' at {place}' if place else ''}: {_others(statuses, absent)}"
    if absent:
        return f"{names_of(absent)} did not arrive: {_others(statuses, absent)}"
    everyone = sorted(statuses)
    calls = collections.Counter(_call(status) for status in statuses.values())
    if all(_waits_in(status) is None for status in statuses.values()):
        return f"{names_of(everyone)} did not move for {limit_seconds:.3g} s, and none waits in a collective"
    if len(calls) == 1:
        waits = "waits" if len(everyone) == 1 else "wait"
        return f"{names_of(everyone)} {waits} {next(iter(calls))}, which does not end, {_since(statuses, everyone)}"
    # The odd one out; of two, the one with fewer calls behind it.
    rare = min(statuses, key=lambda rank: (calls[_call(statuses[rank])], sum(statuses[rank].sequence.values()), rank))
    odd = [rank for rank in everyone if _call(statuses[rank]) == _call(statuses[rare])]
    return f"{names_of(odd)} {_verb(odd)} {_call(statuses[rare])}, another call: {_others(statuses, odd)}"


def _others(statuses: Mapping[int, RankStatus], absent: list[int]) -> str:
    """What the ranks that are there do."""
    others = [rank for rank in sorted(statuses) if rank not in absent and not statuses[rank].has_left]
    if not others:
        return "no other rank is left"
    calls = collections.Counter(_call(statuses[rank]) for rank in others)
    call = max(calls, key=lambda name: calls[name])
    there = [rank for rank in others if _call(statuses[rank]) == call]
    waits = "waits" if len(there) == 1 else "wait"
    does = waits if _waits_in(statuses[there[0]]) is not None else ("stands" if len(there) == 1 else "stand")
    return f"{names_of(there)} {does} {call} {_since(statuses, there)}"


def _call(status: RankStatus) -> str:
    """``in all_reduce (train.py:41)``, or ``at train.py:41``."""
    place = _short(status.position) or "an unknown line"
    name = _waits_in(status)
    return f"at {place}" if name is None else f"in {name} ({place})"


def _since(statuses: Mapping[int, RankStatus], ranks: list[int]) -> str:
    return f"for {max(statuses[rank].age_seconds for rank in ranks):.0f} s"


def _arrival(status: RankStatus) -> str:
    if not sum(status.sequence.values()):
        return "no collective yet"
    return f"last collective entered {status.arrived_seconds:.1f} s ago"


def _waits_in(status: RankStatus) -> str | None:
    return None if status.position is None else status.position.waits_in


def _grouped(statuses: Mapping[int, RankStatus], silent: Mapping[int, str]) -> list[tuple[list[int], RankStatus]]:
    """Ranks that stand at the same place, with the status of the first."""
    groups: dict[Any, list[int]] = {}
    for rank, status in sorted(statuses.items()):
        groups.setdefault((status.position, status.has_left, silent.get(rank)), []).append(rank)
    return [(ranks, statuses[ranks[0]]) for ranks in groups.values()]


def _verb(ranks: list[int]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _short(position: Position | None) -> str:
    return "" if position is None else f"{os.path.basename(position.file)}:{position.line}"


def _place(position: Position | None) -> str:
    if position is None:
        return "its line is not known"
    text = f": {position.text[:_MAX_TEXT_CHARACTERS]}" if position.text else ""
    return f"{position.file}:{position.line}, in {position.function}{text}"
