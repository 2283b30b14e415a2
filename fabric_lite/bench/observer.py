"""What a benchmark puts into a rank: a callback that times the script's steps, and ends the script after enough."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_lite import process_end
from fabric_lite.bench.files import figures_file
from fabric_lite.bench.stopwatch import Stopwatch
from fabric_lite.bench.tracking import Tracker
from fabric_lite.bench.turns import Gate
from fabric_lite.bench.witness import Witness
from fabric_lite.data import put_around
from fabric_lite.errors import FabricValueError
from fabric_lite.trees import leaves

__all__ = ["StepObserver"]


class StepObserver:
    """Watches the first Fabric of a script that sets up a model or an optimizer; others are left alone.

    A step ends with the ``step`` of the first optimizer. After the last one each rank writes its figures and leaves by
    ``SystemExit(0)``: all ranks after the same step.

    Args:
        folder: Of this run of the script, for what it finds.
        warmup: Steps that do not count.
        steps: Steps that are timed, after those.
        started_at: When the rank was asked for, by ``time.monotonic``.
        check_steps: Steps before the warm-up whose mathematics is recorded, without dropout.
        initial_weights: A checkpoint that these begin with; made here where there is none yet.
        feed: The folder of a run whose batches these steps are fed, those of all its ranks put together.
        batch_size: Of every loader; None leaves the script's own.
        probes: Whether one more step, that is not timed, is followed operator by operator.
        takes_turns: Whether all steps but the first are made in turns with other jobs.
    """

    _followed: StepObserver | None = None  # in this process, each Fabric of which has an observer

    def __init__(
        self,
        *,
        folder: str,
        warmup: int,
        steps: int,
        started_at: float,
        check_steps: int = 0,
        initial_weights: str | None = None,
        feed: str | None = None,
        batch_size: int | None = None,
        probes: bool = False,
        takes_turns: bool = False,
    ) -> None:
        self._folder, self._batch_size, self._started_at = Path(folder), batch_size, started_at
        self._first, self._last = check_steps + warmup, check_steps + warmup + steps
        self._tracker = Tracker() if probes else None
        self._probe: dict[str, Any] = {}
        self._watch = Stopwatch()
        self._witness = Witness(self._folder, check_steps, initial_weights, feed) if check_steps else None
        self._takes_turns = takes_turns
        self._gate: Gate | None = None
        self._works_beside = False  # what goes on while other jobs have their turns would be had for nothing
        self._ends: list[Any] = []  # of steps on an accelerator: its own events
        self._loader_numbers = itertools.count()
        self._batch: Any = None  # the last one, until a backward
        self._samples = 0
        self._tokens: int | None = 0
        self._fabric: Any = None
        self._on_cpu = True
        self._clock: Optimizer | None = None
        self._done = 0
        self._startup_seconds: float | None = None
        self._has_written = False
        self._totals: dict[str, float] = {}
        self._blocked = 0.0
        self._resident = 0
        # A script that ends before has been measured as far as it went.
        atexit.register(self.finish)

    # --- what a Fabric calls ------------------------------------------------------------------------------------

    def on_before_setup_dataloader(self, loader: Any) -> None:
        if self._batch_size is not None:
            _set_batch_size(loader, self._batch_size)

    def on_after_setup_dataloader(self, fabric: Any, loader: Any) -> None:
        self._works_beside |= getattr(loader, "num_workers", 0) > 0
        batches = functools.partial(self._batches, fabric, next(self._loader_numbers))
        put_around(loader, start=functools.partial(self._watch.timed, "data"), batches=batches)

    def on_after_setup(self, fabric: Any, module: nn.Module) -> None:
        if self._follows(fabric) and self._witness is not None:
            self._witness.module_set_up(module)

    def on_after_setup_optimizer(self, fabric: Any, optimizer: Optimizer) -> None:
        if not self._follows(fabric):
            return
        self._clock = self._clock or optimizer

        def before_step(*_: Any) -> None:
            self._watch.enter("optimizer")
            if self._witness is not None:
                self._witness.before_step(optimizer)

        def after_step(*_: Any) -> None:
            self._watch.leave("optimizer")
            # Counted by the Fabric, which tells a step from that of the base class, called within it.
            if optimizer is self._clock and fabric._steps.completed > self._done:
                self._end_step()

        optimizer.register_step_pre_hook(before_step)
        optimizer.register_step_post_hook(after_step)

    # --- the loop -----------------------------------------------------------------------------------------------

    def _follows(self, fabric: Any) -> bool:
        """Whether this Fabric is the one that is measured; from the first time on its calls are timed."""
        if StepObserver._followed is None:
            StepObserver._followed = self
            self._fabric, self._on_cpu = fabric, fabric.device.type == "cpu"
            if self._takes_turns:
                self._gate = Gate(self._folder, fabric.global_rank, spins=torch.get_num_threads() > 1)
            if self._witness is not None:
                self._witness.begin(fabric)
                vars(fabric)["backward"] = self._witness.seeing_losses(fabric.backward)
            vars(fabric)["backward"] = self._counting(fabric.backward)
            for name, phase in (("backward", "backward"), ("clip_gradients", "optimizer")):
                vars(fabric)[name] = self._watch.timed(phase, getattr(fabric, name))
            vars(fabric)["save"] = self._seeing_handles(self._watch.timed("save", fabric.save))
        return StepObserver._followed is self

    def _counting(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """``fabric.backward``, which adds the batch that it is of; those without a backward are for evaluation."""

        def counting(*args: Any, **kwargs: Any) -> Any:
            batch, self._batch = self._batch, None
            if batch is not None and self._first <= self._done < self._last:
                samples, tokens = _size_of(batch)
                self._samples += samples
                self._tokens = None if tokens is None or self._tokens is None else self._tokens + tokens
            return backward(*args, **kwargs)

        return counting

    def _seeing_handles(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """``fabric.save``, after which to wait for an asynchronous save is saving too."""

        def seeing(*args: Any, **kwargs: Any) -> Any:
            handle = save(*args, **kwargs)
            if handle is not None:
                self._works_beside = True
                handle.wait = self._watch.timed("save", handle.wait)
            return handle

        return seeing

    def _batches(self, fabric: Any, number: int, advance: Callable[[], Any]) -> Callable[[], Any]:
        if self._witness is not None:
            advance = self._witness.seeing_batches(fabric, number, advance)

        wait = self._watch.timed("data", advance)

        def noting() -> Any:
            self._batch = batch = wait()
            return batch

        return noting

    def _end_step(self) -> None:
        self._watch.lap()
        self._done += 1
        if self._startup_seconds is None:
            self._startup_seconds = time.monotonic() - self._started_at
        if self._gate is not None and self._done <= self._last:
            self._gate.wait(self._done)
        if self._witness is not None:
            self._witness.after_step(self._done)
        if not self._on_cpu and self._first <= self._done <= self._last:
            self._ends.append(_event_now(self._fabric.device))
        if self._done == self._first:
            _start_peak()
            self._samples = self._tokens = 0
            self._watch.restart()
        if self._done == self._last:
            self._totals, self._blocked = dict(self._watch.phases), self._watch.blocked
        if self._done == self._last and self._tracker is not None:
            self._resident = _peak()
            self._tracker.__enter__()  # until the end of the next step
        elif self._done >= self._last:
            self._leave()
        self._watch.resume()  # what stands here is ours, not the step's

    def _leave(self) -> NoReturn:
        if self._has_written:
            # The script has caught the exit, and would go on for ever.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        if self._tracker is not None:
            self._tracker.end_step()
            self._tracker.__exit__(None, None, None)
            step = self._tracker.steps[-1]
            self._probe = {"tensors": self._tracker.peak, "calls": dict(step.calls), "bytes": dict(step.bytes)}
        self.finish()
        process_end.be_quick()
        raise SystemExit(0)

    def finish(self) -> None:
        """Write what was measured so far; again does nothing, nor where no optimizer was set up."""
        if self._has_written or self._clock is None:
            return
        self._has_written = True
        figures_file(self._folder, self._fabric.global_rank).write_text(json.dumps(self._figures()))

    def _figures(self) -> dict[str, Any]:
        seconds = self._watch.steps[: self._last - self._first] if self._done > self._first else []
        steps = len(seconds)
        placement = self._fabric._placement
        return {
            "done": self._done,
            "data_rank": 0 if placement is None else placement.data_rank,
            "step_seconds": seconds if self._on_cpu else _between(self._ends),
            # Where kernels are only queued, the time of a call is not that of its work.
            "phases": {name: total / steps for name, total in self._totals.items()} if steps and self._on_cpu else {},
            "blocked": self._blocked / steps if steps and self._on_cpu else None,
            "samples": self._samples / steps if steps else None,
            "tokens": self._tokens / steps if steps and self._tokens is not None else None,
            "startup_seconds": self._startup_seconds,
            "resident": self._resident or _peak(),
            "probe": self._probe,
            "works_beside": self._works_beside,
            "worked_while_waiting": 0.0 if self._gate is None else self._gate.worked_seconds,
            **_device_figures(self._fabric.device),
        }


def _size_of(batch: Any) -> tuple[int, int | None]:
    """Samples: the rows of the first tensor. Tokens: all of that where it is of integers, (rows, n); else None."""
    first = batch[0] if type(batch) in (list, tuple) and batch else batch
    if not isinstance(first, torch.Tensor) or first.dim() == 0:
        first = next((leaf for leaf in leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim() > 0), None)
    if first is None:
        return 0, 0
    return len(first), first.numel() if first.dim() == 2 and not first.is_floating_point() else None


def _set_batch_size(loader: Any, batch_size: int) -> None:
    """Change the size of a ``DataLoader``'s batches; DataLoader guards its attribute, so it is written beneath."""
    batches: Any = getattr(loader, "batch_sampler", None)
    if not isinstance(getattr(loader, "batch_size", None), int) or not hasattr(batches, "batch_size"):
        raise FabricValueError(
            "The batch size of this loader cannot be set from outside.",
            given=type(loader).__name__,
            fix="a DataLoader with a batch_size, or no --batch-size",
        )
    batches.batch_size = batch_size
    vars(loader)["batch_size"] = batch_size


def _event_now(device: torch.device) -> Any:
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def _between(events: list[Any]) -> list[float]:
    """Seconds from each event to the next."""
    if events:
        events[-1].synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(events)]


def _start_peak() -> None:
    """Let the peak of resident memory count from here, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    """The most bytes that were resident since :func:`_start_peak`; elsewhere than on Linux since the start."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _device_figures(device: torch.device) -> dict[str, Any]:
    """Peaks of the accelerator's allocator, its name and its memory in bytes; None on a CPU."""
    if device.type != "cuda":
        return dict.fromkeys(("device_allocated", "device_reserved", "device_name", "device_memory"))
    properties = torch.cuda.get_device_properties(device)
    return {
        "device_allocated": torch.cuda.max_memory_allocated(device),
        "device_reserved": torch.cuda.max_memory_reserved(device),
        "device_name": properties.name,
        "device_memory": properties.total_memory,
    }
