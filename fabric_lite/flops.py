"""Floating-point operations: how many a model needs, and how many a device does in a second at most."""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["get_available_flops", "measure_flops", "peak_from_datasheet", "peak_of_matmuls"]

# Dense peaks of one device in TFLOP/s, of matrix units where it has them; a vendor's number "with sparsity" is halved.
# The first pattern that is found in torch's name of the device counts. What a device has no units for is left out.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # NVIDIA Blackwell Architecture Datasheet, HGX B200 column, per GPU.
    (r"\bB200\b", {"fp64": 37, "fp32": 75, "tf32": 1100, "fp16": 2250, "bf16": 2250, "fp8": 4500}),
    # NVIDIA H200 Tensor Core GPU Datasheet: NVL, SXM.
    (r"\bH200 NVL\b", {"fp64": 60, "fp32": 60, "tf32": 417.5, "fp16": 835.5, "bf16": 835.5, "fp8": 1670.5}),
    (r"\bH200\b", {"fp64": 67, "fp32": 67, "tf32": 494.5, "fp16": 989.5, "bf16": 989.5, "fp8": 1979}),
    # NVIDIA H100 Tensor Core GPU Datasheet: NVL and SXM; PCIe as in its editions of 2022 and 2023.
    (r"\bH100 NVL\b", {"fp64": 60, "fp32": 60, "tf32": 417.5, "fp16": 835.5, "bf16": 835.5, "fp8": 1670.5}),
    (r"\bH100 PCIe\b", {"fp64": 51, "fp32": 51, "tf32": 378, "fp16": 756.5, "bf16": 756.5, "fp8": 1513}),
    # Torch calls the SXM one "NVIDIA H100 80GB HBM3".
    (r"\bH100\b.*(SXM|HBM3)", {"fp64": 67, "fp32": 67, "tf32": 494.5, "fp16": 989.5, "bf16": 989.5, "fp8": 1979}),
    # NVIDIA A100 Tensor Core GPU Datasheet; SXM and PCIe have the same peaks.
    (r"\bA100\b", {"fp64": 19.5, "fp32": 19.5, "tf32": 156, "fp16": 312, "bf16": 312}),
    # NVIDIA A10G Tensor Core GPU Datasheet, as given for AWS G5; less than half of an A10 in bf16.
    (r"\bA10G\b", {"fp32": 35, "tf32": 35, "fp16": 70, "bf16": 70}),
    # NVIDIA L4 Tensor Core GPU Datasheet.
    (r"\bL4\b", {"fp32": 30.3, "tf32": 60, "fp16": 121, "bf16": 121, "fp8": 242.5}),
    # NVIDIA L40S Datasheet.
    (r"\bL40S\b", {"fp32": 91.6, "tf32": 183, "fp16": 362.05, "bf16": 362.05, "fp8": 733}),
    # NVIDIA T4 Tensor Core GPU Datasheet; bf16 is emulated there, and so has no peak.
    (r"\bT4\b", {"fp32": 8.1, "fp16": 65}),
    # NVIDIA V100 and V100S Datasheet: PCIe, SXM2, V100S; likewise without bf16.
    (r"\bV100S\b", {"fp64": 8.2, "fp32": 16.4, "fp16": 130}),
    (r"\bV100-SXM", {"fp64": 7.8, "fp32": 15.7, "fp16": 125}),
    (r"\bV100-PCIE\b", {"fp64": 7, "fp32": 14, "fp16": 112}),
    # NVIDIA Ampere GA102 GPU Architecture (whitepaper), RTX 3090; the sums in float32, as torch has them.
    (r"\bRTX 3090$", {"fp32": 35.6, "tf32": 35.6, "fp16": 71, "bf16": 71}),
    # NVIDIA Ada GPU Architecture (whitepaper), RTX 4090; the sums in float32. The 4090 D and the laptop's are others.
    (r"\bRTX 4090$", {"fp32": 82.6, "tf32": 82.6, "fp16": 165.2, "bf16": 165.2, "fp8": 330.3}),
    # AMD Instinct MI250X Accelerator (product page). Halved: torch has each of its two dies as a device of its own.
    (r"\bMI250X\b", {"fp64": 47.85, "fp32": 47.85, "fp16": 191.5, "bf16": 191.5}),
    # AMD Instinct MI300X Accelerator Data Sheet.
    (r"\bMI300X\b", {"fp64": 163.4, "fp32": 163.4, "tf32": 653.7, "fp16": 1307.4, "bf16": 1307.4, "fp8": 2614.9}),
    # Google Cloud TPU documentation, system architecture, "peak compute per chip"; the names are libtpu's.
    (r"\bTPU v4\b", {"bf16": 275}),
    (r"\bTPU v5 ?(e|lite)\b", {"bf16": 197}),
    (r"\bTPU v5p?$", {"bf16": 459}),
)
_FORMATS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
    torch.float8_e4m3fnuz: "fp8",
    torch.float8_e5m2fnuz: "fp8",
}

# What is timed on a CPU: the best of so many products of square matrices, which grow until one takes so long. Small
# ones don't fill a large machine; the next size takes eight times as long, so that all is done in some 0.3 s.
_TRIALS = 5
_LONG_SECONDS = 0.005
_SMALLEST, _LARGEST = 128, 4096


def measure_flops(
    model: nn.Module, forward_fn: Callable[[], Any], loss_fn: Callable[[Any], torch.Tensor] | None = None
) -> int:
    """Count the floating-point operations of one forward, and of its backward where ``loss_fn`` is given.

    Counted are products of matrices, convolutions and attention, a multiplication and an addition as two; nothing
    else, as is usual for MFU. Nothing is computed for a model on the meta device::

        with torch.device("meta"):
            model, batch = Model(), torch.ones(8, 128)
        flops = measure_flops(model, lambda: model(batch), lambda output: output.sum())

    Give it the model before ``setup`` and not compiled: a compiled one hides its operations. The gradients of a real
    model are afterward what they were; its buffers and random numbers have moved on, as in any forward.

    Args:
        model: Whose gradients are left as they are.
        forward_fn: Runs the model on one batch, and returns its output.
        loss_fn: Makes of the output a scalar, of which the backward is counted too.

    Returns:
        The operations of one batch on one device.
    """
    with _gradients_kept(model), FlopCounterMode(display=False) as counter:
        output = forward_fn()
        if loss_fn is not None:
            loss_fn(output).backward()
    return int(counter.get_total_flops())


@contextlib.contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


def get_available_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """How many dense operations in ``dtype`` the device does in a second at most, in FLOP/s; None: not known.

    Of a GPU it is the vendor's number. Of a CPU it is measured, the first time for each dtype and number of threads,
    which takes some tenths of a second; other processes that work meanwhile lower it.
    """
    if device.type == "cpu":
        return _measured_peak(dtype, torch.get_num_threads())
    if device.type == "cuda":  # also torch's name for AMD's
        return peak_from_datasheet(torch.cuda.get_device_name(device), dtype, tf32=_allows_tf32())
    return None


def peak_from_datasheet(name: str, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """The vendor's dense peak of a device in FLOP/s; None: it is not in the table, or has no units for ``dtype``.

    Args:
        name: As torch has it, ``"NVIDIA A100-SXM4-80GB"``. A slice of a GPU (MIG) is no device of the table.
        dtype: Of the factors.
        tf32: Whether products of float32 matrices may be computed in TF32.
    """
    if re.search(r"\bMIG\b", name):
        return None
    peaks = next((peaks for pattern, peaks in _PEAKS if re.search(pattern, name, re.IGNORECASE)), {})
    number_format = _FORMATS.get(dtype, "none")
    if number_format == "fp32" and tf32:
        number_format = "tf32" if "tf32" in peaks else "fp32"
    peak = peaks.get(number_format)
    return None if peak is None else peak * 1e12


def _allows_tf32() -> bool:
    # Torch's types don't have the second one: of all backends, unless the first says otherwise.
    backends: Any = torch.backends
    precision = backends.cuda.matmul.fp32_precision
    return (backends.fp32_precision if precision == "none" else precision) == "tf32"


@functools.lru_cache(maxsize=64)
def _measured_peak(dtype: torch.dtype, threads: int) -> float | None:
    del threads  # of the key only
    return peak_of_matmuls(dtype)


@torch.no_grad()
def peak_of_matmuls(dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float | None:
    """Time products of matrices on the CPU; return the best rate in FLOP/s, or None where ``dtype`` has no product.

    Args:
        dtype: Of the factors.
        clock: Returns seconds.
    """
    best, size, seconds = 0.0, _SMALLEST // 2, 0.0
    with torch.autocast("cpu", enabled=False):
        while size < _LARGEST and seconds < _LONG_SECONDS:
            size *= 2
            try:
                factor = torch.ones(size, size, device="cpu").to(dtype)
                seconds = min(_seconds_of_product(factor, clock) for _ in range(_TRIALS))
            except RuntimeError:  # torch has no kernel for it
                return None
            best = max(best, 2 * size**3 / seconds)
    return best


def _seconds_of_product(factor: torch.Tensor, clock: Callable[[], float]) -> float:
    start = clock()
    torch.mm(factor, factor)
    return clock() - start
