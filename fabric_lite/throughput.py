"""How fast a loop is: batches, samples and operations in a second, and the share of the device's peak (MFU)."""

from __future__ import annotations

import math
import numbers
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fabric_lite.errors import FabricRuntimeError, FabricTypeError, FabricValueError
from fabric_lite.flops import get_available_flops, measure_flops
from fabric_lite.notices import rank_zero_info

if TYPE_CHECKING:
    from fabric_lite.fabric import Fabric

__all__ = ["Throughput", "ThroughputMonitor", "measure_flops"]


class _Totals(NamedTuple):
    """What one update said: totals since the start, except ``flops``, which are those since the update before."""

    time: float
    batches: float
    samples: float
    lengths: float | None
    flops: float | None


class Throughput:
    """Rates over the last updates, from totals that the loop counts; it takes no times and no tensors by itself. ::

        throughput = Throughput()
        start = time.perf_counter()
        for number, batch in enumerate(loader, 1):
            ...
            throughput.update(time=time.perf_counter() - start, batches=number, samples=number * batch_size)
            print(throughput.compute()["device/samples_per_sec"])

    On an accelerator the host runs ahead: over a window of many updates that evens out.

    Args:
        available_flops: The peak of one device in FLOP/s, for ``device/mfu``. None: there is no ``device/mfu``.
        world_size: The number of devices, each as fast as this one.
        window_size: Over how many of the last updates rates are taken, 2 at least.
        separator: Between ``device`` and the name of a rate.

    Raises:
        FabricValueError: A value is not allowed.
        FabricTypeError: A value has the wrong type.
    """

    def __init__(
        self,
        available_flops: float | None = None,
        world_size: int = 1,
        window_size: int = 100,
        separator: str = "/",
    ) -> None:
        if available_flops is not None:
            _check_number("available_flops", available_flops)
            if available_flops <= 0:
                raise FabricValueError(
                    "The peak of a device is positive.",
                    given=f"available_flops={available_flops!r}",
                    fix="the FLOP/s of its data sheet, such as 312e12, or None",
                )
        for name, value, least in (("world_size", world_size, 1), ("window_size", window_size, 2)):
            _check_count(name, value, least)
        self.available_flops = available_flops
        self.world_size = world_size
        self.separator = separator
        self._shares = world_size  # into how many the data is dealt: under tensor parallelism fewer than devices
        self._window: deque[_Totals] = deque(maxlen=window_size)

    def update(
        self,
        *,
        time: float,
        batches: int,
        samples: int,
        lengths: int | None = None,
        flops: float | None = None,
    ) -> None:
        """Take the totals of this device after a batch, or after several; after an error nothing has changed.

        Args:
            time: Seconds since the start of the loop.
            batches: All batches since then.
            samples: All samples since then; no less than ``batches``.
            lengths: All items of these samples, tokens say; no less than ``samples``. With every update or with none.
            flops: The operations on this device since the update before, :func:`measure_flops` times the batches.

        Raises:
            FabricValueError: A total is less than before, or not a finite number.
            FabricTypeError: Not a number; a tensor says ``.item()``, which waits for the device.
            FabricRuntimeError: ``lengths`` came with some of the updates only.
        """
        totals = _Totals(time, batches, samples, lengths, flops)
        for name, value in totals._asdict().items():
            if value is not None:
                _check_number(name, value)
        if self._window:
            _check_goes_on(self._window[-1], totals)
        _check_at_least("samples", samples, "batches", batches)
        if lengths is not None:
            _check_at_least("lengths", lengths, "samples", samples)
        self._window.append(totals)

    def compute(self) -> dict[str, float]:
        """Return what is known so far, by name; nothing before the first update, and rates from the second one on.

        ``time`` (seconds), ``batches``, ``samples`` and ``lengths`` are the last totals. For this device there are
        ``device/batches_per_sec``, ``device/samples_per_sec``, ``device/items_per_sec`` (of ``lengths``),
        ``device/flops_per_sec`` and ``device/mfu``, a share from 0 to 1; the last two where each update in the window
        brought ``flops``. With a world size above 1 also ``batches_per_sec``, ``samples_per_sec``, ``items_per_sec``
        and ``flops_per_sec`` of all devices. No communication.
        """
        if not self._window:
            return {}
        last = self._window[-1]
        metrics = {"time": last.time, "batches": last.batches, "samples": last.samples}
        if last.lengths is not None:
            metrics["lengths"] = last.lengths
        rates = self._rates()
        metrics |= {f"device{self.separator}{name}": rate for name, rate in rates.items()}
        if self.available_flops is not None and "flops_per_sec" in rates:
            metrics[f"device{self.separator}mfu"] = rates["flops_per_sec"] / self.available_flops
        if self.world_size > 1:
            devices = {name: self.world_size if name == "flops_per_sec" else self._shares for name in rates}
            metrics |= {name: rate * devices[name] for name, rate in rates.items()}
        return metrics

    def reset(self) -> None:
        """Forget all updates; the next totals may begin anew."""
        self._window.clear()

    def _rates(self) -> dict[str, float]:
        """This device's rates; none while no time has passed."""
        first, *rest = self._window
        if not rest or rest[-1].time == first.time:
            return {}
        last = rest[-1]
        done = {
            "batches_per_sec": last.batches - first.batches,
            "samples_per_sec": last.samples - first.samples,
        }
        if last.lengths is not None and first.lengths is not None:
            done["items_per_sec"] = last.lengths - first.lengths
        flops = [totals.flops for totals in rest if totals.flops is not None]
        if len(flops) == len(rest):
            done["flops_per_sec"] = math.fsum(flops)
        return {name: amount / (last.time - first.time) for name, amount in done.items()}


class ThroughputMonitor(Throughput):
    """A :class:`Throughput` that knows its Fabric's devices, dtype and world size, and logs to its loggers. ::

        monitor = ThroughputMonitor(fabric)
        ...
            monitor.update(time=time.perf_counter() - start, batches=number, samples=number * batch_size, flops=flops)
            monitor.compute_and_log()

    Each rank has its own, and counts what it does itself. Without ``available_flops`` the peak is that of this rank's
    device in the dtype in which the precision computes; on a CPU it is measured here, in some tenths of a second.

    Args:
        fabric: A launched one.
        available_flops: The peak of one device in FLOP/s. None: that of :func:`~fabric_lite.flops.get_available_flops`.
        window_size: As for :class:`Throughput`.
        separator: As for :class:`Throughput`.

    Raises:
        FabricRuntimeError: The processes of the run are not started yet.
    """

    def __init__(
        self,
        fabric: Fabric,
        *,
        available_flops: float | None = None,
        window_size: int = 100,
        separator: str = "/",
    ) -> None:
        placement = fabric._launched()
        self._dtype = fabric.precision.compute_dtype or fabric.precision.param_dtype or torch.float32
        if available_flops is None:
            available_flops = get_available_flops(fabric.device, self._dtype)
        super().__init__(available_flops, fabric.world_size, window_size, separator)
        self._shares = placement.data_world_size
        self._fabric = fabric
        self.step = -1

    def update(
        self,
        *,
        time: float,
        batches: int,
        samples: int,
        lengths: int | None = None,
        flops: float | None = None,
    ) -> None:
        """As :meth:`Throughput.update`; says once, where ``flops`` come and the device's peak is not known."""
        super().update(time=time, batches=batches, samples=samples, lengths=lengths, flops=flops)
        if flops is not None and self.available_flops is None:
            rank_zero_info(
                f"the peak of {_name_of(self._fabric.device)} in {self._dtype} is not known, so there is no "
                "device/mfu; with ThroughputMonitor(fabric, available_flops=...) there is"
            )

    def compute_and_log(self, step: int | None = None, **kwargs: Any) -> dict[str, float]:
        """:meth:`Throughput.compute` with ``kwargs``, sent to every logger from rank 0; any rank may call.

        Args:
            step: What to log it under. None: the one after the last, 0 at first.

        Returns:
            This rank's metrics.
        """
        self.step = self.step + 1 if step is None else step
        metrics = self.compute(**kwargs)
        self._fabric.log_dict(metrics, self.step)
        return metrics


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _check_goes_on(before: _Totals, now: _Totals) -> None:
    if (before.lengths is None) != (now.lengths is None):
        raise FabricRuntimeError(
            "lengths come with every update or with none.",
            given=f"lengths={now.lengths} after lengths={before.lengths}",
            fix="update(..., lengths=all items so far) each time, or reset() in between",
        )
    for name in ("time", "batches", "samples", "lengths"):
        was, value = getattr(before, name), getattr(now, name)
        if was is not None and value < was:
            raise FabricValueError(
                f"{name} is a total since the start, so it does not become less.",
                given=f"{name}={value} after {name}={was}",
                fix="a sum over all batches so far, not of this one alone; reset() where a count begins anew",
            )


def _check_at_least(name: str, value: float, other: str, least: float) -> None:
    if value < least:
        raise FabricValueError(
            f"There are no less {name} than {other}.",
            given=f"{name}={value}, {other}={least}",
            fix="totals since the start for both, not those of one batch",
        )


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise FabricTypeError(
            f"{name} is a number.",
            given=f"{name}={value!r:.80} of type {type(value).__name__}",
            fix=f"{name}.item() of a tensor" if isinstance(value, torch.Tensor) else "an int or a float",
        )
    if not math.isfinite(value):
        raise FabricValueError(f"{name} is a finite number.", given=f"{name}={value}", fix="look where it comes from")


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise FabricTypeError(f"{name} is an int.", given=f"{name}={value!r:.80}", fix=f"{name}={least}")
    if value < least:
        raise FabricValueError(f"{name} is {least} at least.", given=f"{name}={value}", fix=f"{name}={least}")
