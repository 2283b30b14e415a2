"""Drawing an order without leaving a trace: random states taken, set for a while and put back.

States are plain lists, numbers and strings, so that they fit in JSON and in ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import base64
import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler

from fabric_lite.errors import FabricValueError

__all__ = ["Apart", "capture", "decode", "encode", "generators_of", "replayed", "seeded"]


def generators_of(sampler: Any) -> list[torch.Generator]:
    """The torch generators that ``sampler``, or a sampler within it, was given."""
    found: list[torch.Generator] = []
    for _ in range(8):  # samplers wrap samplers, but not endlessly
        if isinstance(generator := getattr(sampler, "generator", None), torch.Generator):
            found.append(generator)
        inner = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
        if inner is None or inner is sampler:
            break
        sampler = inner
    return found


def capture(sampler: Any) -> dict[str, Any] | None:
    """What :func:`replayed` needs to let ``sampler``, or a dataset, draw the same order again.

    Changes no random state.
    """
    if type(sampler) in (SequentialSampler, DistributedSampler):
        return None
    generators = generators_of(sampler)
    if type(sampler) is RandomSampler and not generators:
        with Apart(lambda: None):
            return {"seed": int(torch.empty((), dtype=torch.int64).random_().item())}
    states: dict[str, Any] = {"generators": [encode(generator.get_state()) for generator in generators]}
    if not (type(sampler) is RandomSampler and generators):
        states["torch"] = encode(torch.get_rng_state())
    if type(sampler).__module__ not in ("torch.utils.data.sampler", "torch.utils.data.distributed"):
        version, words, gauss = random.getstate()
        kind, keys, position, has_gauss, cached = np.random.get_state()
        states["python"] = [version, list(words), gauss]
        states["numpy"] = [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)]
    return states


class Apart:
    """Random states of its own: those of the process are put aside for the length of each ``with`` block.

    Entered again, it goes on where it was left, so that an endless sampler can be drawn from bit by bit.

    Args:
        prepare: Sets the random states at the first entry.
        generators: The generators that are put aside too, beside torch's, numpy's and Python's global ones.
    """

    def __init__(self, prepare: Callable[[], None], generators: Sequence[torch.Generator] = ()) -> None:
        self._prepare = prepare
        self._generators = generators
        self._inside: _Snapshot | None = None
        self._outside: _Snapshot | None = None

    def __enter__(self) -> None:
        self._outside = _Snapshot.take(self._generators)
        if self._inside is None:
            self._prepare()
        else:
            self._inside.restore(self._generators)

    def __exit__(self, *_: object) -> None:
        assert self._outside is not None
        self._inside = _Snapshot.take(self._generators)
        self._outside.restore(self._generators)


def replayed(sampler: Any, draw: dict[str, Any]) -> tuple[Any, Apart]:
    """Return a sampler that draws what ``sampler`` drew when ``draw`` was captured, and where to draw from it.

    The user's own generators are left advanced, as the draw left them the first time.
    """
    if "seed" in draw:
        generator = torch.Generator()
        generator.manual_seed(draw["seed"])
        sampler = RandomSampler(sampler.data_source, sampler.replacement, sampler._num_samples, generator)
        return sampler, Apart(lambda: None)

    generators = generators_of(sampler)
    if len(generators) != len(draw["generators"]):
        raise FabricValueError(
            "The order of the epoch was drawn by a sampler with other generators.",
            given=f"{len(draw['generators'])} in the state; in this {type(sampler).__name__}: {len(generators)}",
            fix="the sampler that was saved, with the same generator= arguments",
        )

    def prepare() -> None:
        for generator, state in zip(generators, draw["generators"], strict=True):
            generator.set_state(decode(state))
        if "torch" in draw:
            torch.set_rng_state(decode(draw["torch"]))
        if "python" in draw:
            version, words, gauss = draw["python"]
            random.setstate((version, tuple(words), gauss))
            np.random.set_state(tuple(draw["numpy"]))

    return sampler, Apart(prepare)


def seeded(sampler: Any, seed: int, epoch: int) -> Apart:
    """Where ``sampler`` draws an order that is a function of ``(seed, epoch)`` alone.

    A generator of the user's own counts from its own seed, so that epoch 0 is the order of the script without us.
    """
    generators = generators_of(sampler)

    def prepare() -> None:
        torch.default_generator.manual_seed(seed + epoch)
        random.seed(seed + epoch)
        np.random.seed((seed + epoch) % 2**32)
        for generator in generators:
            generator.manual_seed(generator.initial_seed() + epoch)

    return Apart(prepare, generators)


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    torch_state: torch.Tensor
    python_state: Any
    numpy_state: Any
    generators: list[torch.Tensor]

    @staticmethod
    def take(generators: Sequence[torch.Generator]) -> _Snapshot:
        states = [generator.get_state() for generator in generators]
        return _Snapshot(torch.get_rng_state(), random.getstate(), np.random.get_state(), states)

    def restore(self, generators: Sequence[torch.Generator]) -> None:
        torch.set_rng_state(self.torch_state)
        random.setstate(self.python_state)
        np.random.set_state(self.numpy_state)
        for generator, state in zip(generators, self.generators, strict=True):
            generator.set_state(state)


def encode(state: torch.Tensor) -> str:
    """Return a generator's state as text."""
    return base64.b64encode(state.numpy().tobytes()).decode()


def decode(state: str) -> torch.Tensor:
    """Return the state that :func:`encode` made text of."""
    return torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8)
