"""Random draws that are put off: noted while recording, made in the same order by the replay.

A generator whose draws are put off must not stand still: whether the script seeded it, or put an earlier state back,
could not be seen, and the script's own later draws would repeat the model's. So each noted draw moves the generator to
a state of its own, a *marker*, which is a function of the state before, thus the same in each run and on each rank.
"""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from typing import Any

import torch

__all__ = ["Draw", "Place", "Stream", "default_generator"]

_SEED_BYTES = 8  # the first bytes of a CPU generator's state hold its initial seed
# The stream whose recording ended with this marker: a recording that starts there comes after it.
_ended_with: weakref.WeakValueDictionary[bytes, Stream] = weakref.WeakValueDictionary()


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that draws on ``device`` use when none is given."""
    if device.type == "cpu":
        return torch.default_generator
    torch.empty(0, device=device)  # generators of accelerators exist from the first use on
    module: Any = torch.get_device_module(device)
    return module.default_generators[module.current_device() if device.index is None else device.index]


@dataclasses.dataclass(frozen=True)
class Draw:
    """One draw, and what the generator's state was before it.

    ``state`` is None when it is the one that the previous draw left, a number when it is the one after that many
    draws (the script put it back), and a tensor when the script set it.
    """

    stream: Stream
    state: torch.Tensor | int | None


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a replay is: after how many draws, and the generator's true state there."""

    draws: int
    state: torch.Tensor


class Stream:
    """The draws of one generator in one recording.

    Args:
        generator: Whose draws are put off.
        recording: Whose draws they are; it can make them, for a later recording that needs to know where they end.
    """

    def __init__(self, generator: torch.Generator, recording: Any) -> None:
        self.generator = generator
        self.recording = recording
        self.end: torch.Tensor | None = None  # the true state after the last draw, once it is known
        self._start: torch.Tensor | Stream | None = None
        self._markers: dict[bytes, int] = {}  # marker -> how many draws it stands for
        self._marker = b""
        self._wanted: set[int] = set()  # numbers of draws after which the script took a state that it put back
        self._states: dict[int, torch.Tensor] = {}
        self._drawn = 0
        self._left: bytes | None = None

    # --- while recording ----------------------------------------------------------------------------------------

    def note(self) -> Draw:
        """Note a draw, and move the generator on."""
        state = self.generator.get_state()
        digest = _digest(state)
        before: torch.Tensor | int | None = None
        if self._start is None:
            self._start = _ended_with.get(digest, state)
        elif digest != self._marker:
            before = self._markers.get(digest, state)
            if isinstance(before, int):
                self._wanted.add(before)
                self.recording.forget_places()  # a replay has to pass there again, to find the state
        self._marker = self._move_on(state)
        self._markers[self._marker] = len(self._markers) + 1
        return Draw(self, before)

    def has_put_off(self) -> bool:
        """Whether the generator's state stands for draws that were not made."""
        return _digest(self.generator.get_state()) in self._markers

    def close(self) -> None:
        """The recording is over: note what the generator is left with."""
        if _digest(self.generator.get_state()) == self._marker:
            self._left = self._marker
            _ended_with[self._marker] = self

    def _move_on(self, state: torch.Tensor) -> bytes:
        number = int.from_bytes(hashlib.blake2b(_digest(state), digest_size=7).digest(), "little")
        marker = torch.Generator(self.generator.device).manual_seed(number).get_state()
        if self.generator.device.type == "cpu":
            marker[:_SEED_BYTES] = state[:_SEED_BYTES]  # initial_seed() goes on telling the script's seed
        self.generator.set_state(marker)
        return _digest(self.generator.get_state())

    # --- while replaying ----------------------------------------------------------------------------------------

    def is_as_left(self) -> bool:
        """Whether nobody drew or seeded since the recording ended."""
        return _digest(self.generator.get_state()) == self._left

    def go_to(self, place: Place | None) -> None:
        """Put the generator to where a replay was after some draws; None: to where the recording began."""
        self._drawn = 0 if place is None else place.draws
        self.generator.set_state(self._first_state() if place is None else place.state)

    def place(self) -> Place:
        """Where the replay is."""
        return Place(self._drawn, self.generator.get_state())

    def before(self, draw: Draw) -> None:
        """Prepare the generator for a draw of the log; each is announced, in order."""
        if self._drawn in self._wanted:
            self._states[self._drawn] = self.generator.get_state()
        if draw.state is not None:
            self.generator.set_state(self._states[draw.state] if isinstance(draw.state, int) else draw.state)
        self._drawn += 1

    def _first_state(self) -> torch.Tensor:
        if not isinstance(self._start, Stream):
            assert self._start is not None, "a stream is made for its first draw"
            return self._start
        if self._start.end is None:
            self._start.recording.draw()
        assert self._start.end is not None
        self._start = self._start.end  # the earlier recording is not needed any more
        return self._start


def _digest(state: torch.Tensor) -> bytes:
    return hashlib.blake2b(state.numpy().tobytes(), digest_size=16).digest()
