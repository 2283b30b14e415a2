"""Where the time of a few steps goes: a trace for each rank, and a table of the operators that cost most."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerAction

from fabric_lite import collectives
from fabric_lite.errors import FabricRuntimeError, FabricTypeError, FabricValueError
from fabric_lite.topology import read_topology

if TYPE_CHECKING:
    from fabric_lite.fabric import Fabric

__all__ = ["Cost", "Profile", "profile"]

# What torch's step marks are called among the operators; their own time is what no operator took: Python, waiting.
_STEP_MARK = "ProfilerStep*"
_BETWEEN = "(between operators)"


class Cost(NamedTuple):
    """What one operator cost, over all recorded steps."""

    name: str
    calls: int
    self_seconds: float
    """On the host, without the operators that it calls."""
    device_seconds: float
    """On the accelerator, of the kernels that it starts itself; 0 without one."""
    share: float
    """Of all operators' ``device_seconds`` where there are any, else of their ``self_seconds``; 0 to 1."""
    self_bytes: int
    """Memory that it took and did not give back, on the accelerator or else the host; 0 without ``memory``."""


def profile(
    fabric: Fabric | None = None,
    *,
    steps: int = 5,
    warmup: int = 2,
    folder: str | os.PathLike[str] = "profile",
    memory: bool = False,
) -> Profile:
    """Return a context to put around a loop: it records some steps, and prints on rank 0 what took their time. ::

        with profile(fabric, folder="runs/a/profile") as profiler:
            for batch in loader:
                ...
                optimizer.step()
                profiler.step()

    When ``warmup + steps`` steps are done, or at the block's end if that comes first, each rank writes its trace,
    ``folder/trace_rank_0.json`` and so on, for https://ui.perfetto.dev or ``chrome://tracing``; the rest of the loop
    runs as without. The table comes at the block's end. There is no communication: any of the ranks may profile.

    Args:
        fabric: Says which rank this is. None: the process group does, or else the launcher's environment.
        steps: How many to record.
        warmup: How many to let pass before; the first ones compile, allocate and choose algorithms.
        folder: Where the traces go; made at the block's start.
        memory: Whether to record allocations as well, which slows the steps.

    Raises:
        FabricValueError: A count is too small.
        FabricTypeError: A count is no whole number.
    """
    for name, value, least in (("steps", steps, 1), ("warmup", warmup, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise FabricTypeError(f"{name} is a number of steps.", given=f"{name}={value!r:.80}", fix=f"{name}=5")
        if value < least:
            raise FabricValueError(f"{name} is {least} at least.", given=f"{name}={value}", fix=f"{name}={least}")
    return Profile(fabric, steps, warmup, Path(folder), memory)


class Profile:
    """What :func:`profile` returns: entered, told of each step, and asked for rows afterward."""

    def __init__(self, fabric: Fabric | None, steps: int, warmup: int, folder: Path, memory: bool) -> None:
        self._fabric = fabric
        self._steps = steps
        self._warmup = warmup
        self._folder = folder
        self._memory = memory
        self._rank = 0
        self._taken = 0
        self._rows: list[Cost] = []
        self._is_inside = False
        self._profiler: Any = None  # torch's, while it records

    @property
    def trace(self) -> Path:
        """Where this rank's trace is, once it is written; known from the block's start on."""
        return self._folder / f"trace_rank_{self._rank}.json"

    def __enter__(self) -> Profile:
        self._rank = _rank() if self._fabric is None else self._fabric.global_rank
        self._folder.mkdir(parents=True, exist_ok=True)
        self._taken, self._rows = 0, []
        profiler = torch.profiler.profile(
            schedule=self._action_of, on_trace_ready=self._keep, profile_memory=self._memory
        )
        profiler.start()
        self._profiler, self._is_inside = profiler, True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_inside = False
        try:
            self._finish()
        except Exception:
            if error is None:  # else what ended the loop is the one to see
                raise
        if error is None:
            self._say()

    def step(self) -> None:
        """Say that a step of the loop is over; after the recorded ones this does nothing.

        Raises:
            FabricRuntimeError: The block is not entered, or left.
        """
        if not self._is_inside:
            raise FabricRuntimeError(
                "A step is told to a profile that runs.",
                given="step() outside of its block",
                fix="with profile(...) as profiler: ... profiler.step() at the end of each step",
            )
        if self._profiler is None:
            return
        self._taken += 1
        self._profiler.step()
        if self._taken == self._warmup + self._steps:
            self._finish()

    def rows(self) -> list[Cost]:
        """Return what each operator cost on this rank, the largest share first; empty before the trace is written.

        One row, ``(between operators)``, is the time of the steps that no operator took: Python, data, waiting.
        """
        return list(self._rows)

    def table(self, top: int = 15) -> str:
        """Return the ``top`` rows as text, with times of all recorded steps together."""
        on_device = any(row.device_seconds for row in self._rows)
        titles = ["calls", "self time", *["device time"] * on_device, "share", *["memory"] * self._memory]
        lines = [_line("operator", titles)]
        for row in self._rows[:top]:
            times = [row.self_seconds, *[row.device_seconds] * on_device]
            cells = [str(row.calls), *(f"{seconds * 1e3:.3f} ms" for seconds in times), f"{row.share:.1%}"]
            lines.append(_line(row.name, cells + [f"{row.self_bytes / 2**20:.2f} MiB"] * self._memory))
        if len(self._rows) > top:
            rest = self._rows[top:]
            lines.append(f"{len(rest)} more operators: {sum(row.share for row in rest):.1%}")
        return "\n".join(lines)

    def _action_of(self, step: int) -> ProfilerAction:
        """What torch does in this step; ``torch.profiler.schedule`` would warn of ``warmup=0``."""
        last = self._warmup + self._steps - 1
        if step < self._warmup:
            return ProfilerAction.WARMUP
        if step > last:
            return ProfilerAction.NONE
        return ProfilerAction.RECORD if step < last else ProfilerAction.RECORD_AND_SAVE

    def _keep(self, profiler: Any) -> None:
        """Write the trace, whole or not at all, and take down the rows."""
        self._rows = _costs_of(profiler.key_averages())
        partial = self.trace.with_name(f".{self.trace.name}.partial")
        try:
            profiler.export_chrome_trace(str(partial))
            os.replace(partial, self.trace)
        finally:
            partial.unlink(missing_ok=True)

    def _finish(self) -> None:
        """Let torch stop, which calls :meth:`_keep` unless it has, or nothing was recorded."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()

    def _say(self) -> None:
        if self._rank != 0:
            return
        if not self._rows:
            warnings.warn(
                f"profile() has recorded nothing: the block ended in its warmup, after {self._taken} steps.\n"
                "  Try: profiler.step() at the end of each step, or profile(warmup=0)",
                UserWarning,
                stacklevel=3,
            )
            return
        recorded = min(max(self._taken - self._warmup, 1), self._steps)
        print(f"profile of rank 0 over {recorded} steps; the trace is in {self.trace}\n{self.table()}", flush=True)


def _rank() -> int:
    return collectives.rank() if collectives.is_distributed() else read_topology(os.environ).rank


def _costs_of(averages: Any) -> list[Cost]:
    """The rows of torch's averages, less those that would count a time twice."""
    # A kernel's time is in the row of the operator that started it, and in one of its own, on the device.
    events = [event for event in averages if event.device_type == DeviceType.CPU]
    # A mark in the user's code has as device time the span of what it encloses.
    on_device = [0.0 if event.is_user_annotation else event.self_device_time_total for event in events]
    total = sum(on_device) or sum(event.self_cpu_time_total for event in events) or 1.0
    is_on_device = any(on_device)
    rows = [
        Cost(
            name=_BETWEEN if event.key == _STEP_MARK else event.key,
            calls=event.count,
            self_seconds=event.self_cpu_time_total / 1e6,
            device_seconds=device / 1e6,
            share=(device if is_on_device else event.self_cpu_time_total) / total,
            self_bytes=event.self_device_memory_usage if is_on_device else event.self_cpu_memory_usage,
        )
        for event, device in zip(events, on_device, strict=True)
    ]
    return sorted(rows, key=lambda row: (-row.share, -row.self_seconds))


def _line(name: str, cells: list[str]) -> str:
    return name[:48].ljust(48) + "".join(cell.rjust(14) for cell in cells)
