"""What ``--accelerator`` and ``Fabric(accelerator=)`` may be: one table, without torch, for the command line too."""

from __future__ import annotations

__all__ = ["ACCELERATOR_NAMES", "COUNTED", "OF_ONE_PROCESS"]

# On a CPU devices only count processes; one process drives all chips of a TPU.
OF_ONE_PROCESS = ("cpu", "tpu")
# Of these a machine has as many as it has, or none; "gpu" is whichever of them there is.
COUNTED = ("cuda", "gpu", "mps", "xpu")
ACCELERATOR_NAMES = tuple(sorted(("auto", *OF_ONE_PROCESS, *COUNTED)))
