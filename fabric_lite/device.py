"""Which devices there are and which of them this run uses; everything that differs by kind of device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from fabric_lite.errors import FabricRuntimeError, FabricTypeError, FabricValueError

__all__ = ["ACCELERATOR_NAMES", "Accelerator", "choose_accelerator", "parse_devices"]

ACCELERATOR_NAMES = ("auto", "cpu", "cuda", "gpu", "mps", "tpu", "xpu")


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A kind of device.

    Args:
        device_type: Torch's name of it: ``"cpu"``, ``"cuda"``, ``"mps"``, ``"xpu"``.
    """

    device_type: str

    def is_available(self) -> bool:
        """Whether this machine has one."""
        if self.device_type == "cpu":
            return True
        return self.device_type == _present_type()

    def auto_device_count(self) -> int:
        """How many ``devices="auto"`` uses: every accelerator, one process on CPU."""
        return 1 if self.device_type == "cpu" else torch.accelerator.device_count()

    def device(self, index: int) -> torch.device:
        """The device with this index; CPU and mps have no indices."""
        return (
            torch.device(self.device_type)
            if self.device_type in ("cpu", "mps")
            else torch.device(self.device_type, index)
        )


def choose_accelerator(name: str | Accelerator) -> Accelerator:
    """Return the accelerator that ``name`` means on this machine.

    Raises:
        FabricValueError: The name is unknown.
        FabricRuntimeError: It is known, but not present here.
    """
    if isinstance(name, Accelerator):
        name = name.device_type
    wanted = name.lower() if isinstance(name, str) else name
    present = _present_type()
    if wanted not in (*ACCELERATOR_NAMES, present):
        raise FabricValueError(
            "This accelerator does not exist.",
            given=f"accelerator={name!r}",
            fix=f"one of {', '.join(ACCELERATOR_NAMES)}",
        )
    if wanted == "auto":
        return Accelerator(present or "cpu")
    device_type = (present if present in ("cuda", "mps", "xpu") else "cuda") if wanted == "gpu" else wanted
    accelerator = Accelerator(str(device_type))
    if not accelerator.is_available():
        what = "needs torch-xla, which is not supported yet" if wanted == "tpu" else "is not present on this machine"
        raise FabricRuntimeError(
            f"The accelerator {wanted!r} {what}.",
            given=f"accelerator={name!r}; present: {', '.join(filter(None, ('cpu', present)))}",
            fix="accelerator='auto' takes the best one present",
        )
    return accelerator


def parse_devices(devices: int | str | Sequence[int], accelerator: Accelerator) -> tuple[int, ...]:
    """Return the index of each process's device on this node; on CPU they only count processes.

    Args:
        devices: A count, ``-1`` or ``"auto"`` (all), a list of indices, or any of these as text: ``"2"``, ``"0,2"``.
        accelerator: Of which kind.

    Raises:
        FabricTypeError: Neither an int, nor a list of ints, nor text.
        FabricValueError: No device, the same twice, or one that is not there.
    """
    count = accelerator.auto_device_count()
    if isinstance(devices, str):
        devices = _parse_text(devices)
    if isinstance(devices, bool) or not isinstance(devices, (int, list, tuple, range)):
        raise _wrong(devices, FabricTypeError, "devices must be a count, a list of indices or 'auto'.")
    if isinstance(devices, int):
        if devices == -1:
            return tuple(range(count))
        if devices < 1:
            raise _wrong(devices, FabricValueError, "The number of devices must be at least 1.")
        if accelerator.device_type != "cpu" and devices > count:
            raise _absent(devices, accelerator, count)
        return tuple(range(devices))
    indices = tuple(devices)
    if any(isinstance(index, bool) or not isinstance(index, int) for index in indices):
        raise _wrong(devices, FabricTypeError, "A list of devices holds indices, which are ints.")
    if not indices or len(set(indices)) < len(indices) or min(indices) < 0:
        raise _wrong(devices, FabricValueError, "A list of devices must name at least one, none twice, none below 0.")
    if accelerator.device_type != "cpu" and max(indices) >= count:
        raise _absent(devices, accelerator, count)
    return indices


def _parse_text(text: str) -> int | list[int]:
    stripped = text.strip().lower()
    if stripped == "auto":
        return -1
    try:
        if "," in stripped:
            return [int(part) for part in stripped.split(",") if part.strip()]
        return int(stripped)
    except ValueError:
        raise _wrong(text, FabricValueError, "This text names no devices.") from None


def _wrong(
    devices: object, kind: type[FabricTypeError] | type[FabricValueError], what: str
) -> FabricTypeError | FabricValueError:
    return kind(what, given=f"devices={devices!r}", fix="devices=2, devices=[0, 1], devices='0,1' or devices='auto'")


def _absent(devices: object, accelerator: Accelerator, count: int) -> FabricValueError:
    return FabricValueError(
        "Not that many devices are present.",
        given=f"devices={devices!r}, and {count} of type {accelerator.device_type}",
        fix="devices='auto' takes all",
    )


def _present_type() -> str | None:
    """The one kind of accelerator that this machine and this build of torch have."""
    if not torch.accelerator.is_available():
        return None
    found = torch.accelerator.current_accelerator()
    return None if found is None else found.type
