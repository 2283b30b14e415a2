"""A dict whose string keys are also attributes."""

from __future__ import annotations

from typing import Any

__all__ = ["AttributeDict"]


class AttributeDict(dict[Any, Any]):
    """A dict whose string keys are also attributes; in a checkpoint it is a plain dict.

    >>> state = AttributeDict(step=1)
    >>> state.step += 1
    >>> state
    AttributeDict({'step': 2})
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no key {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no key {name!r}") from None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({super().__repr__()})"
