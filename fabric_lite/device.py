"""Which devices there are and which of them this run uses; everything that differs by kind of device.

Where torch treats two kinds alike, so does the library. What they can't do stands in one table, :data:`KINDS`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Sequence

import torch

from fabric_lite.accelerator_names import ACCELERATOR_NAMES
from fabric_lite.errors import FabricRuntimeError, FabricTypeError, FabricValueError
from fabric_lite.precision import Precision

__all__ = [
    "KINDS",
    "Accelerator",
    "Kind",
    "bytes_in_use",
    "check_device",
    "choose_accelerator",
    "generator_state",
    "generators_in_use",
    "kind_of",
    "parse_devices",
    "set_generator_state",
    "widest_dtype",
]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What devices of one kind can do.

    Args:
        is_single: There is one at most, without an index, and ranks cannot talk to each other from it.
        has_float64: None: it differs from device to device.
        pins_memory: Whether copies between it and pinned memory of the host run beside the program.
    """

    is_single: bool = False
    has_float64: bool | None = True
    pins_memory: bool = True


_OTHER = Kind()  # which torch knows by a plug-in, for example
KINDS: dict[str, Kind] = {
    "cpu": Kind(pins_memory=False),
    "meta": Kind(pins_memory=False),
    # Metal has no doubles; memory is one with the host's, and torch refuses to pin it there.
    "mps": Kind(is_single=True, has_float64=False, pins_memory=False),
    "xla": Kind(is_single=True, pins_memory=False),  # one process drives all of them
    "xpu": Kind(has_float64=None),  # Intel's Arc has none, its data center GPUs have
}


def kind_of(device: torch.device) -> Kind:
    """What devices of this kind can do."""
    return KINDS.get(device.type, _OTHER)


def widest_dtype(device: torch.device) -> torch.dtype:
    """The floating-point dtype with the most bits that the device computes in: float64, or float32."""
    return torch.float64 if _has_float64(device) else torch.float32


def _has_float64(device: torch.device) -> bool:
    told = kind_of(device).has_float64
    return bool(torch.xpu.get_device_capability(device)["has_fp64"]) if told is None else told


def check_device(device: torch.device, precision: Precision, world_size: int, is_sharded: bool) -> None:
    """Raise where the device can't do what was asked for, before the first step would fail.

    Args:
        device: Of this rank.
        precision: The run's.
        world_size: The number of ranks.
        is_sharded: Whether the strategy lays parameters out over ranks.

    Raises:
        FabricValueError: It can't.
    """
    if kind_of(device).is_single and (world_size > 1 or is_sharded):
        raise FabricValueError(
            f"{device.type} has one device and no communication between ranks.",
            given=f"{world_size} ranks" + ", a strategy that shards" * is_sharded,
            fix="devices=1 and strategy='auto', or accelerator='cpu'",
        )
    if precision.device_type not in (None, device.type):
        raise FabricValueError(
            f"{device.type} has no {precision.name}.",
            given=f"precision={precision.name!r}",
            fix=f"accelerator={precision.device_type!r}, or precision='bf16-mixed'",
        )
    if precision.param_dtype == torch.float64 and not _has_float64(device):
        raise FabricValueError(
            f"{device} has no float64.", given=f"precision={precision.name!r}", fix="precision='32-true'"
        )
    # torch's GradScaler inverts the scale in float64, but on mps.
    if precision.loss_scale and device.type != "mps" and not _has_float64(device):
        raise FabricValueError(
            f"{device} has no float64, in which torch scales the loss.",
            given=f"precision={precision.name!r}",
            fix="precision='bf16-mixed'",
        )
    if precision.compute_dtype == torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise FabricValueError(
            f"{device} has no autocast to bfloat16.", given=f"precision={precision.name!r}", fix="precision='16-mixed'"
        )


def bytes_in_use(device: torch.device) -> dict[str, int]:
    """Memory of an accelerator that this process uses, in bytes: ``allocated``, ``reserved``; if known, ``peak``."""
    if device.type == "mps":  # has no peak
        return {"allocated": torch.mps.current_allocated_memory(), "reserved": torch.mps.driver_allocated_memory()}
    return {
        "allocated": torch.accelerator.memory_allocated(device),
        "reserved": torch.accelerator.memory_reserved(device),
        "peak": torch.accelerator.max_memory_allocated(device),
    }


def generators_in_use() -> tuple[str, int] | None:
    """The kind and number of accelerators whose generators this process has; None: it has used none.

    Asking an unused accelerator for its state would start it, also in a run on the CPU.
    """
    if "torch_xla" in sys.modules:
        return "xla", 1
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return None
    module = torch.get_device_module(accelerator)
    started = getattr(module, "is_initialized", None)
    return None if started is not None and not started() else (accelerator.type, module.device_count())


def generator_state(device_type: str, index: int) -> torch.Tensor:
    """The state of an accelerator's generator, a tensor on the host."""
    if device_type == "xla":
        return torch.tensor(importlib.import_module("torch_xla").core.xla_model.get_rng_state())
    module = torch.get_device_module(device_type)
    return module.get_rng_state() if kind_of(torch.device(device_type)).is_single else module.get_rng_state(index)


def set_generator_state(device_type: str, index: int, state: torch.Tensor) -> None:
    """Go on from :func:`generator_state`."""
    if device_type == "xla":
        importlib.import_module("torch_xla").core.xla_model.set_rng_state(int(state))
        return
    module = torch.get_device_module(device_type)
    if kind_of(torch.device(device_type)).is_single:
        module.set_rng_state(state)
    else:
        module.set_rng_state(state, index)


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
        if self.device_type == "xla":
            return _xla_problem() is None
        return self.device_type == _present_type()

    def auto_device_count(self) -> int:
        """How many ``devices="auto"`` uses: every accelerator, one process on CPU."""
        return 1 if self.device_type in ("cpu", "xla") else torch.accelerator.device_count()

    def device(self, index: int) -> torch.device:
        """The device with this index, where devices of its kind have one."""
        device = torch.device(self.device_type)
        has_index = self.device_type != "cpu" and not kind_of(device).is_single
        return torch.device(self.device_type, index) if has_index else device


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
    if wanted not in (*ACCELERATOR_NAMES, "xla", present):
        raise FabricValueError(
            "This accelerator does not exist.",
            given=f"accelerator={name!r}",
            fix=f"one of {', '.join(ACCELERATOR_NAMES)}",
        )
    if wanted == "auto":
        return Accelerator(present or "cpu")
    if wanted in ("tpu", "xla"):
        if problem := _xla_problem():
            raise FabricRuntimeError(
                "A TPU needs torch-xla 2.9, the last one, which fits torch 2.9 alone.",
                given=f"torch {torch.__version__}; {problem}",
                fix="an environment of its own: pip install 'torch==2.9.*' 'torch-xla[tpu]==2.9.*'",
            )
        return Accelerator("xla")
    device_type = (present if present in ("cuda", "mps", "xpu") else "cuda") if wanted == "gpu" else wanted
    accelerator = Accelerator(str(device_type))
    if not accelerator.is_available():
        raise FabricRuntimeError(
            f"The accelerator {wanted!r} is not present on this machine.",
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


def _xla_problem() -> str | None:
    """Why torch-xla can't be used here; None: it can."""
    if importlib.util.find_spec("torch_xla") is None:
        return "torch-xla is not installed"
    try:
        importlib.import_module("torch_xla")
    except ImportError as error:  # made for another torch
        return f"torch-xla cannot be imported: {error}"
    return None


def _present_type() -> str | None:
    """The one kind of accelerator that this machine and this build of torch have."""
    if not torch.accelerator.is_available():
        return None
    found = torch.accelerator.current_accelerator()
    return None if found is None else found.type
