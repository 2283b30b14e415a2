"""What a backend that fails costs: a warning, and some of what was to be logged."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from fabric_lite.call_site import user_frame
from fabric_lite.errors import FabricError

__all__ = ["Guard"]

# A call that fails may do so after minutes of waiting for a server. For so many times as long none is made, where it
# took so long that it matters.
_REST, _LONG_SECONDS = 10, 0.1


class Guard:
    """Makes calls of one backend; the first failure is a warning, and how many calls came to nothing is another.

    Args:
        name: Of the logger.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._failures = 0
        self._rests_until = 0.0

    def attempt(self, call: Callable[..., Any], *args: Any, even_at_rest: bool = False) -> bool:
        """Make a call, unless the backend rests after a failure that took long; returns whether it was made and done.

        Raises:
            FabricError: What the call raises of this kind: it is used wrongly, and the backend has no part in it.
        """
        begin = time.monotonic()
        if begin < self._rests_until and not even_at_rest:
            self._failures += 1
            return False
        try:
            call(*args)
        except FabricError:
            raise
        except Exception as error:  # whatever a backend raises
            now = time.monotonic()
            if now - begin > _LONG_SECONDS:
                self._rests_until = now + _REST * (now - begin)
            self._failures += 1
            if self._failures == 1:
                self._warn(
                    f"{self._name} failed, and the training goes on without what it was to log: "
                    f"{type(error).__name__}: {error}. Its later failures are counted."
                )
            return False
        return True

    def report(self) -> None:
        """Say how many calls have failed, if there was more than the one that was said."""
        count, self._failures = self._failures, 0
        if count > 1:
            self._warn(f"{self._name} failed {count} times in all.")

    def _warn(self, message: str) -> None:
        frame = user_frame(sys._getframe())
        if frame is None:
            warnings.warn(message, stacklevel=2)
        else:
            warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno)
