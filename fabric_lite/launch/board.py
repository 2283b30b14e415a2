"""Where the supervisors of several nodes tell each other what has failed, and never wait for long."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch.distributed import DistError

from fabric_lite.side_store import reconnect

__all__ = ["Board"]

Answer = TypeVar("Answer")

_ANSWER_SECONDS = 2.0
# Between two tries to reach a store that has not answered.
_AGAIN_SECONDS = 3.0


class Board:
    """The nodes' store by a connection of its own, that gives up: who serves it, or the way there, may have gone.

    A wait inside torch's store runs no Python: a supervisor that waited there would not even end its own ranks.

    Args:
        store: The nodes' store.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._connection: Any = None
        self._not_before = 0.0

    def ask(self, question: Callable[[Any], Answer], otherwise: Answer) -> Answer:
        """Return ``question(store)``; ``otherwise`` where the store does not answer within two seconds."""
        if time.monotonic() < self._not_before:
            return otherwise
        try:
            if self._connection is None:
                self._connection = reconnect(self._store)
                self._connection.set_timeout(datetime.timedelta(seconds=_ANSWER_SECONDS))
            return question(self._connection)
        except (DistError, OSError):
            self._connection, self._not_before = None, time.monotonic() + _AGAIN_SECONDS
            return otherwise
