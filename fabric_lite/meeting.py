"""Waiting in a store until all have come, and saying who has not."""

from __future__ import annotations

import datetime
import socket
import time
from collections.abc import Sequence
from typing import Any

from torch.distributed import DistError

from fabric_lite.errors import LaunchError

__all__ = ["meet", "names_of"]

_ALL = "all have come"
# How long the one that may serve the store stays for the others, once somebody has not come.
_OTHERS_READ_SECONDS = 2.0
_LOOK_SECONDS = 0.05


def meet(
    store: Any, kind: str, number: int, count: int, timeout_seconds: float, *, may_come_again: bool = False
) -> None:
    """Return once ``count`` have come; each of them calls, with its own number. Number 0 may serve the store.

    Args:
        store: Where they meet; nothing else is in it.
        kind: What they are: ``"rank"`` or ``"node"``.
        number: Which one this is.
        count: How many there are.
        timeout_seconds: How long to wait for the others.
        may_come_again: Whether one with this number that has been here may have ended, and this one come for it.

    Raises:
        LaunchError: Some have not come, which it names, on all that have; or another has come with this number.
    """
    is_first = store.add(f"arrivals of {number}", 1) == 1
    if not is_first and not may_come_again:
        raise LaunchError(
            f"Another {kind} {number} has come before this one: two jobs meet at one place.",
            given=f"{kind} {number} of {count} on {socket.gethostname()}",
            fix="another port for one of them: MASTER_PORT=..., or fabric-run --main-port",
        )
    store.set(f"host of {number}", socket.gethostname())
    if is_first and store.add("arrivals", 1) == count:
        store.compare_set(_ALL, "", _ALL)
    try:
        outcome = _outcome(store, kind, count, timeout_seconds)
    except DistError as error:
        raise LaunchError(
            f"The place where the {kind}s meet has gone: {kind} 0, or who else serves it, has ended.",
            given=f"{kind} {number} of {count} on {socket.gethostname()}: {str(error).splitlines()[0]}",
            fix=f"see what {kind} 0 says",
        ) from error
    if outcome != _ALL:
        who, _, there = outcome.partition("\n")
        _let_others_read(store, number, len(there.splitlines()))
        raise LaunchError(
            f"{who} not come within {timeout_seconds:g} s.",
            given="there: " + ", ".join(there.splitlines()),
            fix="see whether they have started, and what they say",
        )


def _outcome(store: Any, kind: str, count: int, timeout_seconds: float) -> str:
    """Wait for the others; the first whose time is over says for all who is not there."""
    try:
        store.wait([_ALL], datetime.timedelta(seconds=timeout_seconds))
    except DistError:
        hosts = {number: _host(store, number) for number in range(count)}
        absent = [number for number, host in hosts.items() if host is None]
        there = [f"{kind} {number} ({host})" for number, host in hosts.items() if host is not None]
        has = "has" if len(absent) == 1 else "have"
        if absent:
            store.compare_set(_ALL, "", "\n".join([f"{names_of(kind, absent)} of {count} {has}", *there]))
    return str(store.get(_ALL).decode())


def _host(store: Any, number: int) -> str | None:
    key = f"host of {number}"
    return str(store.get(key).decode()) if store.check([key]) else None


def _let_others_read(store: Any, number: int, count: int) -> None:
    deadline, readers = time.monotonic() + _OTHERS_READ_SECONDS, store.add("readers", 1)
    while number == 0 and readers < count and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
        readers = store.add("readers", 0)


def names_of(kind: str, numbers: Sequence[int]) -> str:
    """``"Rank 3"``, ``"Ranks 1, 2"``; of many, the first ones."""
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"{kind.capitalize()}{'s' * (len(numbers) > 1)} {shown}"
