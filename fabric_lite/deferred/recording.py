"""One recording: its log, the storages that it stands for, and making their values."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fabric_lite.deferred.log import Entry, Piece, facts_of, storage_key
from fabric_lite.deferred.randomness import Draw, Place, Stream
from fabric_lite.deferred.replay import Replay, Step, plan
from fabric_lite.errors import StrategyError

__all__ = ["Recording", "recording_of", "refuse_if_sparse"]

_Receive = Callable[[int, Replay], None]
# Recordings of which a tensor lives.
_recordings: dict[int, Recording] = {}


def recording_of(tensor: torch.Tensor) -> Recording | None:
    """The recording in which a meta tensor was made."""
    key = storage_key(tensor)
    return next((recording for recording in _recordings.values() if key in recording.storages), None)


def refuse_if_sparse(operation: Any, tensor: torch.Tensor) -> None:
    """Raise for a result that no storage and geometry describe."""
    if tensor.layout is not torch.strided:
        raise StrategyError(
            f"{operation} makes a tensor that is not strided; fabric.init_module(empty_init=True) can't put that off.",
            given=f"{tensor.layout} of shape {tuple(tensor.shape)}",
            fix="build with fabric.init_module() without empty_init",
        )


class Recording:
    """The log of one block, and the meta storages that were made in it.

    It lives as long as one of its tensors does that lived at the end of the block.

    Args:
        device: Where a plain construction would make its tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.entries: list[Entry] = []
        self.storages: dict[int, torch.UntypedStorage] = {}  # held, so that no key is given twice
        self.streams: dict[torch.Generator, Stream] = {}
        # By number of entries: where the streams are there, as far as it was found out.
        self._places: dict[int, dict[Stream, Place]] = {}
        self._alive: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}

    def stands_for_real(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor was made here."""
        return tensor.is_meta and storage_key(tensor) in self.storages

    def add(self, operation: Any, args: Any, kwargs: Any, outputs: Iterable[Any], draw: Draw | None) -> None:
        """Log a call on meta tensors; one that only looks at its arguments in another way is left out.

        Raises:
            StrategyError: It makes a sparse tensor.
        """
        created = []
        for position, output in enumerate(outputs):
            if not isinstance(output, torch.Tensor):
                continue
            refuse_if_sparse(operation, output)
            if output.is_meta and storage_key(output) not in self.storages:
                self.storages[storage_key(output)] = output.untyped_storage()
                created.append((position, Piece.of(output)))
        if created or facts_of(operation).written:
            self.entries.append(Entry.of(operation, args, kwargs, created, draw, self.storages))

    def value(self, tensor: torch.Tensor) -> torch.Tensor:
        """Make the values of one meta tensor at once.

        Random draws that they depend on are made as they will be made again by the final replay, so that code that
        decides by them (``nn.init.trunc_normal_`` draws until all values are in range) decides right.
        """
        piece = Piece.of(tensor)
        steps = plan(self.entries, {piece.storage}, draws_from=len(self.entries))
        first_draw = next((step.index for step in steps if step.entry.draw is not None), None)
        made: list[torch.Tensor] = []
        self._make_now({piece.storage}, first_draw, lambda _, replay: made.append(replay.tensor(piece).clone()))
        return made[0]

    def catch_up(self, stream: Stream) -> None:
        """Put the generator to its true state, for a draw that happens now."""
        if stream.has_put_off():
            self._make_now((), len(self.entries), lambda *_: None)
            stream.go_to(self._places[len(self.entries)][stream])

    def _make_now(self, wanted: Iterable[int], first_draw: int | None, receive: _Receive) -> None:
        """Run what ``wanted`` needs, and, if it needs draws, all draws from the last known place before them on."""
        if first_draw is None:
            self._run(plan(self.entries, wanted, draws_from=len(self.entries)), receive)
            return
        start = max((index for index in self._places if index <= first_draw), default=0)
        places = self._places.get(start, {})
        with self._generators_restored():
            for stream in self.streams.values():
                stream.go_to(places.get(stream))
            self._run(plan(self.entries, wanted, draws_from=start), receive)
            self._places[len(self.entries)] = {stream: stream.place() for stream in self.streams.values()}

    def _run(self, steps: list[Step], receive: _Receive) -> int:
        replay = Replay(self.storages, self.device)
        with _disable_current_modes():
            replay.run(steps, lambda key: receive(key, replay))
        return replay.peak_bytes

    @contextlib.contextmanager
    def _generators_restored(self) -> Iterator[None]:
        states = [(stream.generator, stream.generator.get_state()) for stream in self.streams.values()]
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)

    def replay(self, wanted: Iterable[int], receive: _Receive) -> int:
        """Make the values of the storages ``wanted``, and every random draw; returns the most bytes held at a time.

        A generator from which nobody drew since the recording goes on from the replay's last draw; any other is put
        back to the state that it has now.
        """
        untouched = [stream for stream in self.streams.values() if stream.is_as_left()]
        with self._generators_restored():
            for stream in self.streams.values():
                stream.go_to(None)
            peak_bytes = self._run(plan(self.entries, wanted, draws_from=0), receive)
            for stream in self.streams.values():
                stream.end = stream.place().state
        for stream in untouched:
            assert stream.end is not None
            stream.generator.set_state(stream.end)
        return peak_bytes

    def draw(self) -> None:
        """Make the random draws alone, to know where they end; the generators are left as they are."""
        with self._generators_restored():
            self.replay((), lambda *_: None)

    def forget_places(self) -> None:
        """Let the next read begin at the start."""
        self._places.clear()

    def stream_of(self, generator: torch.Generator) -> Stream:
        """This recording's draws of ``generator``."""
        if generator not in self.streams:
            self.streams[generator] = Stream(generator, self)
        return self.streams[generator]

    def close(self) -> None:
        """The block is over: note which tensors live, and how often each was written."""
        self.forget_places()
        for stream in self.streams.values():
            stream.close()
        for found in gc.get_objects():
            if issubclass(type(found), torch.Tensor) and found.is_meta and self._holds(found):
                self._watch(found)
        if self._alive:
            _recordings[id(self)] = self

    def was_written_since(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor that was made here was written after the block."""
        known = self._alive.get(id(tensor))
        if known is not None:
            return tensor._version != known[1]
        # A tensor that was made from one of ours by ``detach`` has its counter, by ``data`` a counter of its own.
        alive = [(reference(), version) for reference, version in self._alive.values()]
        key = storage_key(tensor)
        return tensor._version not in {0, *(v for other, v in alive if other is not None and storage_key(other) == key)}

    def forget(self, tensor: torch.Tensor) -> None:
        """The tensor is about to get its values: it keeps this recording alive no longer."""
        self._drop(id(tensor))

    def _holds(self, tensor: torch.Tensor) -> bool:
        return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ and self.stands_for_real(tensor)

    def _watch(self, tensor: torch.Tensor) -> None:
        # The callback holds the recording weakly: else its log would be a cycle that only the collector frees.
        key, myself = id(tensor), weakref.ref(self)

        def gone(_: object) -> None:
            recording = myself()
            if recording is not None:
                recording._drop(key)

        self._alive[key] = (weakref.ref(tensor, gone), tensor._version)

    def _drop(self, key: int) -> None:
        self._alive.pop(key, None)
        if not self._alive:
            _recordings.pop(id(self), None)
