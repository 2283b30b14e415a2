"""Accelerators by name, and how long a step takes on one if all goes as its data sheet says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from fabric_lite.bench.steps import Step
from fabric_lite.errors import FabricValueError

__all__ = ["DEVICES", "Device", "Estimate", "estimate_step", "find_device"]


@dataclasses.dataclass(frozen=True)
class Device:
    """What a data sheet says of one accelerator, dense figures (no sparsity), in bytes and per second.

    Args:
        memory_bytes: In decimal GB, as sold. A card sold with 80 GB shows some 85e9 bytes; what the driver's context,
            the communication library and gaps between tensors take is to fit between the two.
        half_flops: In bfloat16 and float16, of the matrix units.
        single_flops: In float32.
        memory_bandwidth: Of its own memory.
        node_bandwidth: To the others of its node, one way.
        network_bandwidth: To other nodes, one way, this device's share.
    """

    memory_bytes: float
    half_flops: float
    single_flops: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float


DEVICES: Mapping[str, Device] = {
    # NVIDIA A100 data sheet: SXM; NVLink 600 GB/s both ways. DGX A100: one 200 Gb/s port to a GPU.
    "a100-40gb": Device(40e9, 312e12, 19.5e12, 1.555e12, 300e9, 25e9),
    "a100-80gb": Device(80e9, 312e12, 19.5e12, 2.039e12, 300e9, 25e9),
    # NVIDIA H100 data sheet: SXM; NVLink 900 GB/s both ways. DGX H100: one 400 Gb/s port to a GPU.
    "h100-80gb": Device(80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    # NVIDIA H200 data sheet: SXM; as H100 but for the memory.
    "h200-141gb": Device(141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9),
    # NVIDIA L4 data sheet: PCIe 4.0 x16, 64 GB/s both ways; a network of 100 Gb/s to the node of 8 is assumed.
    "l4-24gb": Device(24e9, 121e12, 30.3e12, 0.3e12, 32e9, 1.5e9),
    # AMD Instinct MI300X data sheet: seven links of 128 GB/s both ways; a 400 Gb/s port to a GPU is assumed.
    "mi300x-192gb": Device(192e9, 1307e12, 163.4e12, 5.3e12, 448e9, 50e9),
}

# What well-tuned training reaches of the peak: 38 to 43 % for Llama 3 405B (arXiv:2407.21783, table 4), 46 % for PaLM.
_REACHED = 0.4
_LINK_REACHED = 0.8
# Engines communicate while backward computes, which is two thirds of a step of matrix products.
_OVERLAP = 2 / 3


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step on one device. **An estimate that has never been compared with hardware.**

    Meant to tell a step that waits for its network from one that does not. Take a factor of two either way for its
    error; more for small models, whose kernels end before the next one is launched.

    Args:
        seconds: ``max(arithmetic, memory) + exposed_communication``.
        arithmetic: Floating point operations at 40 % of the device's peak.
        memory: Bytes that operators read and write, each by itself, at the memory's full bandwidth.
        communication: By rings, at 80 % of the slowest link of each group.
        exposed_communication: What does not fit beside backward, taken for two thirds of the computing.
    """

    seconds: float
    arithmetic: float
    memory: float
    communication: float
    exposed_communication: float


def find_device(name: str) -> Device:
    """Return the device of that name.

    Raises:
        FabricValueError: There is none.
    """
    if name.lower() not in DEVICES:
        raise FabricValueError(
            "This device is not known.", given=f"device={name!r}", fix=f"one of {', '.join(DEVICES)}"
        )
    return DEVICES[name.lower()]


def estimate_step(step: Step, device: Device) -> Estimate:
    """Return how long ``step`` would take on ``device``.

    >>> step = Step({}, {}, flops={"bfloat16": 989e12 * 0.4}, touched_bytes=0, traffic={"node": 0, "network": 0})
    >>> estimate_step(step, find_device("h100-80gb")).seconds
    1.0
    """
    arithmetic = sum(
        flops / (_REACHED * (device.half_flops if "16" in dtype else device.single_flops))
        for dtype, flops in step.flops.items()
    )
    memory = step.touched_bytes / device.memory_bandwidth
    links = {"node": device.node_bandwidth, "network": device.network_bandwidth}
    communication = sum(sent / (_LINK_REACHED * links[link]) for link, sent in step.traffic.items())
    computing = max(arithmetic, memory)
    exposed = max(0.0, communication - _OVERLAP * computing)
    return Estimate(computing + exposed, arithmetic, memory, communication, exposed)
