"""Step times of a machine that is not quiet: by seeded models, or as they were recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy

from fabric_lite.bench.results import Combination, Results, Row

# ``model(generator, slots, steps)`` returns factors on the time of a step, one line for each run of one combination in
# one round, in the order in which a machine gets to them.
Model = Callable[[numpy.random.Generator, int, int], numpy.ndarray]

STEP_NOISE = 0.02
SAMPLES_PER_STEP = 32.0


def gaussian(spread: float) -> Model:
    """``spread``: standard deviation of the logarithm of the ratio of two runs that stand side by side."""

    def model(generator: numpy.random.Generator, slots: int, steps: int) -> numpy.ndarray:
        levels = generator.normal(0, spread / math.sqrt(2), (slots, 1))
        return numpy.exp(levels + generator.normal(0, STEP_NOISE, (slots, steps)))

    return model


def heavy_tailed(spread: float, share: float = 0.05, factor: float = 1.3) -> Model:
    """In this share of the pairs one run is slower by the factor; and every hundredth step takes twice as long.

    Where one process has a core to itself, as many were seen to; of two ranks that have two cores, ten times as many.
    """

    def model(generator: numpy.random.Generator, slots: int, steps: int) -> numpy.ndarray:
        slow = numpy.where(generator.random((slots, 1)) < share / 2, factor, 1.0)
        late = numpy.where(generator.random((slots, steps)) < 1 / 100, 2.0, 1.0)
        return gaussian(spread)(generator, slots, steps) * slow * late

    return model


def drifting(spread: float, drift: float = 0.2) -> Model:
    """The machine gets slower by this much, and swings as it does."""

    def model(generator: numpy.random.Generator, slots: int, steps: int) -> numpy.ndarray:
        time = numpy.linspace(0, 1, slots)[:, None]
        swing = 0.02 * numpy.sin(2 * math.pi * (2 * time + generator.random()))
        return gaussian(spread)(generator, slots, steps) * (1 + drift * time + swing)

    return model


def autocorrelated(spread: float, memory: float = 0.95) -> Model:
    """Each step is like the one before it, so that a round has far fewer independent steps than it counts."""

    def model(generator: numpy.random.Generator, slots: int, steps: int) -> numpy.ndarray:
        shocks = generator.normal(0, spread / math.sqrt(2), (slots, steps))
        logs = numpy.empty((slots, steps))
        logs[:, 0] = shocks[:, 0]
        for step in range(1, steps):
            logs[:, step] = memory * logs[:, step - 1] + math.sqrt(1 - memory**2) * shocks[:, step]
        return numpy.exp(logs)

    return model


def recorded(path: Path) -> Model:
    """The step times of the baseline and its repeat in a file of results, from a random place on, in their order.

    Both ran the same thing in turn, so that together they are the course of the machine.
    """
    results = Results.from_json(json.loads(path.read_text()))
    pair = [row.step_seconds for row in results.rows if row.combination.name == results.baseline]
    times = numpy.array([steps for beside in zip(*pair, strict=True) for steps in beside])
    times /= times.mean()

    def model(generator: numpy.random.Generator, slots: int, steps: int) -> numpy.ndarray:
        places = generator.integers(len(times)) + numpy.arange(slots)
        return times[places % len(times), :steps]

    return model


def rows_of(
    model: Model, step_seconds: Mapping[Combination, float], *, seed: int, rounds: int, steps: int = 20
) -> list[Row]:
    """Rows as the benchmark takes them: all combinations in turn, in an order that turns too; the first one repeated.

    Args:
        model: The noise.
        step_seconds: The true time of a step.
        seed: Of the noise.
        rounds: How many.
        steps: Of each round.
    """
    combinations = [*step_seconds, next(iter(step_seconds))]
    count = len(combinations)
    factors = model(numpy.random.default_rng(seed), rounds * count, steps).reshape(rounds, count, steps)
    return [
        Row(
            combination,
            step_seconds=[
                (step_seconds[combination] * factors[number][(place + number) % count]).tolist()
                for number in range(rounds)
            ],
            samples_per_step=SAMPLES_PER_STEP * combination.devices,
            is_repeat=place == count - 1,
        )
        for place, combination in enumerate(combinations)
    ]
