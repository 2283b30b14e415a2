"""Lightning Fabric's classes, as names for what here is data or the user's own object.

``isinstance`` says of an object of ours what it would say there, and calling a class makes what serves for it here.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from fabric_lite.adopt import extension_of
from fabric_lite.data import is_extended_loader
from fabric_lite.device import Accelerator
from fabric_lite.errors import FabricValueError
from fabric_lite.extension import ModuleExtension
from fabric_lite.optim import OptimizerExtension
from fabric_lite.precision import PRECISIONS, Precision, parse_precision
from fabric_lite.precision_layers import check_torchao
from fabric_lite.precision_low_bits import LowBits, names_of

__all__ = [
    "BitsandbytesPrecision",
    "CPUAccelerator",
    "CUDAAccelerator",
    "CheckpointIO",
    "ClusterEnvironment",
    "DoublePrecision",
    "FabricDataLoader",
    "FabricModule",
    "FabricOptimizer",
    "HalfPrecision",
    "MPSAccelerator",
    "MixedPrecision",
    "XLAAccelerator",
]


class _Kind(type):
    """A class whose instances are told by a test."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return bool(cls.describes(instance))  # type: ignore[attr-defined]


class FabricModule(metaclass=_Kind):
    """A model that went through ``setup``."""

    @staticmethod
    def describes(instance: Any) -> bool:
        """Whether it is one."""
        return isinstance(extension_of(instance), ModuleExtension)


class FabricOptimizer(metaclass=_Kind):
    """An optimizer that went through ``setup``."""

    @staticmethod
    def describes(instance: Any) -> bool:
        """Whether it is one."""
        return isinstance(extension_of(instance), OptimizerExtension)


class FabricDataLoader(metaclass=_Kind):
    """A loader that went through ``setup_dataloaders``."""

    @staticmethod
    def describes(instance: Any) -> bool:
        """Whether it is one."""
        return is_extended_loader(instance)


class MixedPrecision(metaclass=_Kind):
    """``"16-mixed"`` or ``"bf16-mixed"``; the device and the scaler that Lightning takes are the Fabric's here."""

    def __new__(cls, precision: str, *_: Any, **__: Any) -> Precision:  # type: ignore[misc]
        return _one_of(precision, "16-mixed", "bf16-mixed")

    @staticmethod
    def describes(instance: Any) -> bool:
        """Whether it is one."""
        return isinstance(instance, Precision) and instance.is_mixed


class HalfPrecision(metaclass=_Kind):
    """``"16-true"`` or ``"bf16-true"``."""

    def __new__(cls, precision: str = "16-true") -> Precision:  # type: ignore[misc]
        return _one_of(precision, "16-true", "bf16-true")

    @staticmethod
    def describes(instance: Any) -> bool:
        """Whether it is one."""
        return isinstance(instance, Precision) and instance.param_dtype in (torch.float16, torch.bfloat16)


class DoublePrecision(metaclass=_Kind):
    """``"64-true"``."""

    def __new__(cls) -> Precision:  # type: ignore[misc]
        return PRECISIONS["64-true"]

    @staticmethod
    def describes(instance: Any) -> bool:
        """Whether it is one."""
        return isinstance(instance, Precision) and instance.param_dtype == torch.float64


class BitsandbytesPrecision(metaclass=_Kind):
    """A :class:`Precision` for ``Fabric(plugins=)``: frozen linear layers get weights of 4 or 8 bits, by torchao.

    Torchao does here what bitsandbytes does under Lightning.

    Args:
        mode: ``"nf4"`` or ``"nf4-dq"``, which are one here, since the scales are always in 8 bits; or ``"int8"``.
        dtype: Of everything else, and of the computation. None is bfloat16.
        ignore_modules: Full names of modules; they, and what is below them, keep their weights.

    Raises:
        FabricImportError: torchao is not installed.
        FabricValueError: The mode is unknown here, or the dtype is not one to compute in.
        FabricTypeError: ``ignore_modules`` is one text instead of several.
    """

    def __new__(  # type: ignore[misc]
        cls, mode: str, dtype: torch.dtype | None = None, ignore_modules: Iterable[str] | None = None
    ) -> Precision:
        given = f"BitsandbytesPrecision({mode!r}, dtype={dtype})"
        kept = {"nf4": "nf4", "nf4-dq": "nf4", "int8": "int8"}
        names = {torch.bfloat16: "bf16-true", torch.float16: "16-true", torch.float32: "32-true"}
        base = names.get(dtype or torch.bfloat16)
        if mode not in kept or base is None:
            raise FabricValueError(
                "fabric_lite has no such precision with weights of few bits.",
                given=given,
                fix=f"mode: {', '.join(kept)}; dtype: {', '.join(map(str, names))}",
            )
        check_torchao(given)
        convert = LowBits(kept[mode], names_of(ignore_modules))
        return dataclasses.replace(PRECISIONS[base], name=f"{kept[mode]}-weights, {base}", convert=convert)

    @staticmethod
    def describes(instance: Any) -> bool:
        """Whether it is one."""
        return isinstance(instance, Precision) and isinstance(instance.convert, LowBits)


class _AcceleratorKind(_Kind):
    device_type: str

    def describes(cls, instance: Any) -> bool:
        return isinstance(instance, Accelerator) and instance.device_type == cls.device_type

    def is_available(cls) -> bool:
        """Whether this machine has one."""
        return Accelerator(cls.device_type).is_available()

    def auto_device_count(cls) -> int:
        """How many ``devices="auto"`` uses."""
        return Accelerator(cls.device_type).auto_device_count() if cls.is_available() else 0

    def __call__(cls) -> Accelerator:
        return Accelerator(cls.device_type)


class CPUAccelerator(metaclass=_AcceleratorKind):
    """The processor."""

    device_type = "cpu"


class CUDAAccelerator(metaclass=_AcceleratorKind):
    """GPUs of NVIDIA, and those of AMD under ROCm."""

    device_type = "cuda"


class MPSAccelerator(metaclass=_AcceleratorKind):
    """GPUs of Apple."""

    device_type = "mps"


class XLAAccelerator(metaclass=_AcceleratorKind):
    """TPUs, by torch-xla."""

    device_type = "xla"


class ClusterEnvironment(abc.ABC):
    """The place of a process among all; for annotations: fabric_lite reads Slurm, Open MPI and PMI by itself."""

    @abc.abstractmethod
    def world_size(self) -> int:
        """The number of processes."""

    @abc.abstractmethod
    def global_rank(self) -> int:
        """Which of them this one is."""


class CheckpointIO(abc.ABC):
    """A writer of checkpoints; for annotations: fabric_lite writes them by itself."""

    @abc.abstractmethod
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write one."""

    @abc.abstractmethod
    def load_checkpoint(self, path: Any, map_location: Any = None) -> dict[str, Any]:
        """Read one."""


def _one_of(precision: str, *allowed: str) -> Precision:
    if precision not in allowed:
        raise FabricValueError(
            "This class does not stand for that precision.", given=f"precision={precision!r}", fix=" or ".join(allowed)
        )
    return parse_precision(precision)
