"""Comparing collectives over the ranks before they are entered: a difference is an error on all ranks, not a hang.

Each rank says in the store what it is about to call, and waits until all ranks of the call have said what they call. So
nothing is sent through the collectives themselves, which ranks that differ could not end.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
import weakref
from collections.abc import Sequence

from torch.distributed import DistError

from fabric_lite.call_site import names_of, user_line
from fabric_lite.errors import CollectiveError
from fabric_lite.side_store import connect

__all__ = ["CollectiveCheck", "check_numbers"]

_FIRST_PAUSE_SECONDS = 0.0002
_LONGEST_PAUSE_SECONDS = 0.01
# Once a difference is seen, how long to wait for what the remaining ranks call, so that all report the same.
_GRACE_SECONDS = 5.0

_DIFFERENCE = "The ranks called different collectives, or with different shapes or dtypes."

_numbers = itertools.count()  # every rank makes the same checks in the same order
_checks: list[weakref.ref[CollectiveCheck]] = []


def check_numbers() -> dict[str, int]:
    """How many calls this process has come to, by check and the ranks of the call; of checks that it has left, none.

    For the hang watch, which tells by them who has not come, as by the counts of collectives. Any thread may ask.
    """
    checks = [check for reference in list(_checks) if (check := reference()) is not None]
    return {name: number for check in checks for name, number in check.numbers().items()}


@dataclasses.dataclass(frozen=True)
class _Call:
    """What a rank is about to enter.

    Args:
        number: Of this call among the rank's calls in the group.
        operation: What is compared: its name and options.
        details: Compared too: shapes and dtypes.
        site: The user's line.
    """

    number: int
    operation: str
    details: str
    site: str

    @property
    def key(self) -> tuple[str, str]:
        return self.operation, self.details

    def __str__(self) -> str:
        return f"{' '.join(filter(None, self.key))} at {self.site}"


@dataclasses.dataclass(frozen=True)
class _Said:
    """What a rank has said last.

    Args:
        calls: By group, written as ``"0 1 3"``: its latest two calls. It cannot be further ahead of a reader than one.
        current: The group of its latest call; None before the first.
        left: The user's line at which it has left.
    """

    calls: dict[str, list[_Call]] = dataclasses.field(default_factory=dict)
    current: str | None = None
    left: str | None = None

    @staticmethod
    def parse(value: bytes) -> _Said:
        fields = json.loads(value)
        calls = {group: [_Call(**call) for call in latest] for group, latest in fields["calls"].items()}
        return _Said(calls, fields["current"], fields["left"])

    def call(self, group: str, number: int) -> _Call | None:
        return next((call for call in self.calls.get(group, ()) if call.number == number), None)


class CollectiveCheck:
    """Every rank makes one, at its first collective.

    Args:
        rank: Of this process.
        timeout_seconds: How long a call waits for the others, of whichever group: as collectives do by default.
    """

    def __init__(self, rank: int, timeout_seconds: float) -> None:
        self._rank = rank
        self._timeout_seconds = timeout_seconds
        self._name = f"check {next(_numbers)}"
        self._store = connect(self._name)
        self._said = _Said()
        _checks.append(weakref.ref(self, _checks.remove))

    def enter(self, operation: str, details: str, ranks: Sequence[int], site: str | None = None) -> None:
        """Wait until all of ``ranks`` are about to call the same; ``site`` is said where no line of the user's runs.

        Raises:
            CollectiveError: On each of them, when they are not, with the lines of all; when one has not
                come in time; when the rank that the store was with has ended.
        """
        try:
            self._compare(operation, details, ranks, site)
        except DistError as error:
            raise CollectiveError(
                f"The ranks lost each other while they compared a call of {operation}.",
                given=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                fix="see the messages of the rank that ended first",
            ) from error

    def _compare(self, operation: str, details: str, ranks: Sequence[int], site: str | None) -> None:
        group = " ".join(map(str, ranks))
        latest = self._said.calls.get(group, [])[-1:]
        call = _Call(
            latest[0].number + 1 if latest else 0, operation, details, user_line() or site or "an unknown line"
        )
        self._say(_Said({**self._said.calls, group: [*latest, call]}, group))
        found: dict[int, _Call | str] = {self._rank: call}
        pause, deadline = _FIRST_PAUSE_SECONDS, time.monotonic() + self._timeout_seconds
        differ = False
        while True:
            for rank, said in self._read([rank for rank in ranks if rank not in found]).items():
                answer = said.call(group, call.number) or self._elsewhere(said)
                if answer is not None:
                    found[rank] = answer
            if not differ and any(not isinstance(other, _Call) or other.key != call.key for other in found.values()):
                differ, deadline = True, min(deadline, time.monotonic() + _GRACE_SECONDS)
            if len(found) == len(ranks) or time.monotonic() > deadline:
                break
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        if differ:
            raise _difference(_DIFFERENCE, found, ranks)
        if len(found) < len(ranks):
            raise _difference(f"Not all ranks came to a call within {self._timeout_seconds:g} s.", found, ranks)

    def leave(self) -> None:
        """Say that this rank makes no more calls; those that wait for one raise."""
        try:
            self._say(dataclasses.replace(self._said, left=user_line() or "the end of the program"))
        except DistError:
            return  # the store has ended, with the rank that served it: nobody waits there

    def numbers(self) -> dict[str, int]:
        """How many calls this rank has come to, by their ranks; none once it has left."""
        said = self._said
        if said.left is not None:
            return {}
        return {f"{self._name} of ranks {group}": latest[-1].number + 1 for group, latest in said.calls.items()}

    def _elsewhere(self, said: _Said) -> str | None:
        """What a rank does that will never come here; None for one that may be on its way."""
        if said.left is not None:
            return f"has left the run at {said.left}"
        if said.current is None or str(self._rank) not in said.current.split():
            return None
        waiting = said.calls[said.current][-1]
        own = self._said.calls.get(said.current, [])
        # It waits for this rank, in a call of another group that this rank has not come to.
        return str(waiting) if not own or own[-1].number < waiting.number else None

    def _say(self, said: _Said) -> None:
        self._said = said
        self._store.set(f"rank {self._rank}", json.dumps(dataclasses.asdict(said)))

    def _read(self, ranks: list[int]) -> dict[int, _Said]:
        keys = {rank: f"rank {rank}" for rank in ranks}
        there = [rank for rank in ranks if self._store.check([keys[rank]])]
        return {rank: _Said.parse(self._store.get(keys[rank])) for rank in there}


def _difference(what: str, found: dict[int, _Call | str], ranks: Sequence[int]) -> CollectiveError:
    said = {rank: str(found.get(rank, "has not come to this call")) for rank in ranks}
    lines = [
        f"    {names_of([rank for rank in ranks if said[rank] == words])}: {words}"
        for words in dict.fromkeys(said.values())
    ]
    return CollectiveError(
        what,
        given="\n" + "\n".join(lines),
        fix="let every rank make the same calls in the same order, with equal shapes and dtypes",
    )
