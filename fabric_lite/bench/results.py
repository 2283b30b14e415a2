"""What a benchmark has found, as plain data that goes to JSON and back."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["THE_SCRIPTS", "About", "Combination", "Communication", "Comparison", "Memory", "Results", "Row"]

# The strategy or precision of a combination that leaves it to the script.
THE_SCRIPTS = "script"
PHASES = ("data", "forward", "backward", "optimizer", "save", "other")


@dataclasses.dataclass(frozen=True)
class Combination:
    """One way to run the script.

    Args:
        strategy: As in ``Fabric(strategy=)``; "script": the script's own, which may be an object.
        precision: As in ``Fabric(precision=)``; "script": the script's own.
        devices: Ranks on this machine.
        batch_size: Of every loader, per rank; None: the script's own.
    """

    strategy: str
    precision: str
    devices: int
    batch_size: int | None = None

    @property
    def name(self) -> str:
        """As it stands in tables: ``ddp, 32-true, 2 devices``."""
        batch = [] if self.batch_size is None else [f"batch {self.batch_size}"]
        return ", ".join([self.strategy, self.precision, f"{self.devices} device{'s' * (self.devices > 1)}", *batch])

    def command(self, script: Sequence[str]) -> str:
        """The command line that runs the script so; ``script`` is its path and arguments."""
        options = ["--devices", str(self.devices)]
        for name, value in (("--strategy", self.strategy), ("--precision", self.precision)):
            options += [] if value == THE_SCRIPTS else [name, value]
        return shlex.join(["fabric-run", *options, *script])


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs most, at their peak.

    Args:
        resident: Resident memory of the process (RSS).
        tensors: Of tensors that live at once in a step, counted operator by operator; what kernels take for themselves
            in between is not seen.
        device_allocated: Of the accelerator's allocator; None on a CPU.
        device_reserved: What that allocator has taken from the device; None on a CPU.
    """

    resident: int
    tensors: int | None = None
    device_allocated: int | None = None
    device_reserved: int | None = None


@dataclasses.dataclass(frozen=True)
class Communication:
    """Collectives of one step on one rank: by name, how many, and the bytes that the rank puts into them."""

    calls: Mapping[str, int]
    bytes: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Whether the mathematics is that of one process that is fed the ranks' batches put together.

    Args:
        verdict: ``"same"``, ``"differs"`` or ``"not comparable"``.
        loss: Largest relative difference of the loss; None where there is none. All three are differences to one
            process in full precision, or in the row's own, whichever is nearer.
        gradient: Largest relative difference (of norms) of the gradients that the steps use.
        parameters: Relative difference of what the steps have changed.
        tolerance: What rounding in this precision allows of the gradient's.
        reason: In words, where the verdict is not "same".
    """

    verdict: str
    loss: float | None = None
    gradient: float | None = None
    parameters: float | None = None
    tolerance: float | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found of one combination.

    Args:
        combination: Which one.
        failure: In one line, why it did not run; None if it did. Then the other fields may be empty.
        step_seconds: By round, the seconds of each measured step, by the clock of the rank that takes longest for the
            round. The rounds of all combinations were taken in turn: round ``i`` of one stands beside that of another.
        samples_per_step: Over all ranks; None where no batch shows it.
        tokens_per_step: Over all ranks; None where no batch shows it.
        phases: Seconds of a step by phase (``PHASES``) on the slowest rank: means of a round, medians over rounds.
        exposed_communication: Seconds of a step in which the rank waits for a collective; it is part of the phases.
        memory: Of the rank that needs most.
        communication: Of a step.
        comparison: With the reference; None where it was not asked for.
        startup_seconds: From the fork of the ranks to the end of their first step.
        is_repeat: Whether it is the baseline once more, to know the noise.
    """

    combination: Combination
    failure: str | None = None
    step_seconds: Sequence[Sequence[float]] = ()
    samples_per_step: float | None = None
    tokens_per_step: float | None = None
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)
    exposed_communication: float | None = None
    memory: Memory | None = None
    communication: Communication | None = None
    comparison: Comparison | None = None
    startup_seconds: float | None = None
    is_repeat: bool = False

    @property
    def is_wrong(self) -> bool:
        """Whether it ran, and computes something else than one process does."""
        return self.comparison is not None and self.comparison.verdict == "differs"


@dataclasses.dataclass(frozen=True)
class About:
    """When and on what the figures were taken.

    Args:
        date: ISO 8601.
        processor: Its name.
        cores: That the ranks could use.
        accelerator: Its name; None on a CPU.
        python: The version.
        torch: The version.
        command: That took them.
        memory: Bytes of one accelerator, or on a CPU of the machine; None where they are not known.
    """

    date: str
    processor: str
    cores: int
    accelerator: str | None
    python: str
    torch: str
    command: str
    memory: int | None = None


@dataclasses.dataclass(frozen=True)
class Results:
    """All rows, and what they are of.

    Args:
        script: Path and arguments.
        rows: One for each combination, in the order asked for; the repeat of the baseline last.
        baseline: The name of the combination that the others are compared with.
        about: Date and hardware.
        steps: Measured steps of each round.
        warmup: Steps before them, of each round.
        is_complete: Whether nothing has ended the benchmark before all rounds were done, such as Ctrl-C.
        stopped_by: What that was, in one line.
        in_turns: Whether the combinations lived side by side and took turns; else one run followed the other.
    """

    script: Sequence[str]
    rows: Sequence[Row]
    baseline: str
    about: About
    steps: int
    warmup: int
    is_complete: bool = True
    stopped_by: str = ""
    in_turns: bool = False

    def as_json(self) -> dict[str, Any]:
        """As plain data for ``json.dumps``."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Results:
        """The inverse of :meth:`as_json`."""
        rows = [
            Row(
                **{
                    **row,
                    "combination": Combination(**row["combination"]),
                    "memory": _made(Memory, row["memory"]),
                    "communication": _made(Communication, row["communication"]),
                    "comparison": _made(Comparison, row["comparison"]),
                }
            )
            for row in data["rows"]
        ]
        return Results(**{**data, "rows": rows, "about": About(**data["about"])})


def _made(kind: Any, fields: Mapping[str, Any] | None) -> Any:
    return None if fields is None else kind(**fields)
