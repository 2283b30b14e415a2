"""Accelerators by their names in Lightning Fabric; see :mod:`fabric_lite.names`."""

from fabric_lite.device import Accelerator
from fabric_lite.names.kinds import CPUAccelerator, CUDAAccelerator, MPSAccelerator, XLAAccelerator

__all__ = ["Accelerator", "CPUAccelerator", "CUDAAccelerator", "MPSAccelerator", "XLAAccelerator"]
