"""Rates are those of a hand count; operations are those of the formulas; peaks are the vendors'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fabric_lite import Fabric, ModelParallelStrategy, Throughput, ThroughputMonitor, flops, measure_flops
from fabric_lite.errors import FabricError, FabricRuntimeError, FabricTypeError, FabricValueError
from fabric_lite.flops import get_available_flops, peak_from_datasheet, peak_of_matmuls
from fabric_lite.testing import RankPool


def updated(throughput: Throughput, *updates: dict[str, Any]) -> Throughput:
    for update in updates:
        throughput.update(**update)
    return throughput


# --- rates --------------------------------------------------------------------------------------------------------


def test_nothing_is_known_before_an_update_and_no_rate_before_the_second() -> None:
    throughput = Throughput(available_flops=1.0, world_size=2)
    assert throughput.compute() == {}
    throughput.update(time=1.5, batches=1, samples=4, lengths=40, flops=10)
    assert throughput.compute() == {"time": 1.5, "batches": 1, "samples": 4, "lengths": 40}


def test_rates_are_the_differences_over_the_window() -> None:
    throughput = updated(
        Throughput(available_flops=50.0),
        {"time": 2.0, "batches": 1, "samples": 4, "lengths": 40, "flops": 1000},
        {"time": 4.0, "batches": 3, "samples": 12, "lengths": 100, "flops": 30},
        {"time": 6.0, "batches": 5, "samples": 16, "lengths": 140, "flops": 50},
    )
    # 4 s lie between the first and the last; the first one's operations were done before.
    assert throughput.compute() == {
        "time": 6.0,
        "batches": 5,
        "samples": 16,
        "lengths": 140,
        "device/batches_per_sec": 1.0,
        "device/samples_per_sec": 3.0,
        "device/items_per_sec": 25.0,
        "device/flops_per_sec": 20.0,
        "device/mfu": 0.4,
    }


def test_several_devices_are_as_many_times_as_fast_and_the_separator_is_ones_own() -> None:
    throughput = updated(
        Throughput(available_flops=20.0, world_size=3, separator="."),
        {"time": 0.0, "batches": 0, "samples": 0, "lengths": 0},
        {"time": 2.0, "batches": 1, "samples": 4, "lengths": 8, "flops": 10},
    )
    assert throughput.compute() == {
        "time": 2.0,
        "batches": 1,
        "samples": 4,
        "lengths": 8,
        "device.batches_per_sec": 0.5,
        "device.samples_per_sec": 2.0,
        "device.items_per_sec": 4.0,
        "device.flops_per_sec": 5.0,
        "device.mfu": 0.25,
        "batches_per_sec": 1.5,
        "samples_per_sec": 6.0,
        "items_per_sec": 12.0,
        "flops_per_sec": 15.0,
    }


def test_updates_that_left_the_window_do_not_count() -> None:
    throughput = Throughput(window_size=2)
    for time, samples in ((0.0, 0), (1.0, 100), (3.0, 104)):
        throughput.update(time=time, batches=0, samples=samples, flops=samples)
    assert throughput.compute()["device/samples_per_sec"] == 2.0
    assert throughput.compute()["device/flops_per_sec"] == 52.0


def test_without_flops_in_each_update_there_is_no_rate_of_them() -> None:
    throughput = Throughput(available_flops=1.0)
    for number, operations in enumerate([5, None, 5]):
        throughput.update(time=float(number), batches=number, samples=number, flops=operations)
    assert set(throughput.compute()) == {
        "time", "batches", "samples", "device/batches_per_sec", "device/samples_per_sec",
    }  # fmt: skip


def test_while_no_time_has_passed_there_are_no_rates() -> None:
    throughput = updated(
        Throughput(), {"time": 1.0, "batches": 1, "samples": 1}, {"time": 1.0, "batches": 2, "samples": 2}
    )
    assert throughput.compute() == {"time": 1.0, "batches": 2, "samples": 2}


def test_after_a_reset_totals_begin_anew() -> None:
    throughput = updated(Throughput(), {"time": 9.0, "batches": 9, "samples": 9, "lengths": 9})
    throughput.reset()
    assert throughput.compute() == {}
    throughput.update(time=1.0, batches=1, samples=1)
    assert throughput.compute() == {"time": 1.0, "batches": 1, "samples": 1}


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"time": 1.0}, r"time is a total.*\n  Given: time=1.0 after time=2.0\n  Try: .*reset"),
        ({"batches": 2}, r"batches is a total.*\n  Given: batches=2 after batches=3"),
        ({"samples": 5}, r"samples is a total.*\n  Given: samples=5 after samples=6"),
        ({"lengths": 11}, r"lengths is a total.*\n  Given: lengths=11 after lengths=12"),
        ({"batches": 9}, r"no less samples than batches.\n  Given: samples=7, batches=9"),
        ({"samples": 99}, r"no less lengths than samples.\n  Given: lengths=20, samples=99"),
        ({"time": float("nan")}, r"time is a finite number.\n  Given: time=nan"),
    ],
)
def test_what_is_no_total_is_refused_with_both_values_and_changes_nothing(update: dict[str, Any], message: str) -> None:
    throughput = updated(Throughput(), {"time": 2.0, "batches": 3, "samples": 6, "lengths": 12})
    before = throughput.compute()
    with pytest.raises(FabricValueError, match=message):
        throughput.update(**{"time": 3.0, "batches": 4, "samples": 7, "lengths": 20, **update})
    assert throughput.compute() == before


@pytest.mark.parametrize("given", [{"lengths": 9}, {}])
def test_lengths_come_with_every_update_or_with_none(given: dict[str, Any]) -> None:
    first: dict[str, Any] = {} if given else {"lengths": 9}
    throughput = updated(Throughput(), {"time": 1.0, "batches": 1, "samples": 1, **first})
    with pytest.raises(FabricRuntimeError, match=r"lengths come with every update or with none"):
        throughput.update(time=2.0, batches=2, samples=2, **given)


def test_a_tensor_is_refused_since_reading_it_waits_for_the_device() -> None:
    with pytest.raises(FabricTypeError, match=r"lengths is a number(.|\n)*of type Tensor\n  Try: lengths.item()"):
        Throughput().update(time=1.0, batches=1, samples=1, lengths=torch.tensor(3))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"available_flops": 0}, FabricValueError, "available_flops=0"),
        ({"available_flops": "312e12"}, FabricTypeError, "available_flops='312e12'"),
        ({"world_size": 0}, FabricValueError, "world_size is 1 at least"),
        ({"window_size": 1}, FabricValueError, "window_size is 2 at least"),
        ({"window_size": 2.5}, FabricTypeError, "window_size is an int"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], kind: type[FabricError], message: str) -> None:
    with pytest.raises(kind, match=message):
        Throughput(**arguments)


# --- the monitor --------------------------------------------------------------------------------------------------


class KeepsMetrics:
    def __init__(self) -> None:
        self.seen: list[tuple[int | None, dict[str, Any]]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.seen.append((step, metrics))


def test_the_monitor_logs_what_it_computes_and_counts_the_steps_on_from_those_given() -> None:
    logger = KeepsMetrics()
    monitor = ThroughputMonitor(Fabric(accelerator="cpu", devices=1, loggers=logger), available_flops=10.0)
    returned = []
    for number, step in enumerate([None, None, 7, None]):
        monitor.update(time=float(number), batches=number, samples=2 * number, flops=5)
        returned.append(monitor.compute_and_log(step))
    assert logger.seen == list(zip([0, 1, 7, 8], returned, strict=True))
    assert returned[-1] == {
        "time": 3.0, "batches": 3, "samples": 6, "device/batches_per_sec": 1.0, "device/samples_per_sec": 2.0,
        "device/flops_per_sec": 5.0, "device/mfu": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32), ("64-true", torch.float64), ("bf16-true", torch.bfloat16),
        ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_dtype_in_which_the_precision_computes(
    precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = {(torch.device("cpu"), dtype): 123.0}
    monkeypatch.setattr("fabric_lite.throughput.get_available_flops", lambda *key: peaks[key])
    assert ThroughputMonitor(Fabric(accelerator="cpu", devices=1, precision=precision)).available_flops == 123.0


def test_an_unknown_peak_is_said_once_and_only_where_flops_are_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fabric_lite.throughput.get_available_flops", lambda *_: None)
    monitor = ThroughputMonitor(Fabric(accelerator="cpu", devices=1))
    monitor.update(time=0.0, batches=0, samples=0)
    assert capsys.readouterr().err == ""
    for number in (1, 2):
        monitor.update(time=float(number), batches=number, samples=number, flops=1)
    assert capsys.readouterr().err.count("the peak of cpu in torch.float32 is not known") == 1
    monitor.update(time=3.0, batches=3, samples=3, flops=1)
    assert "device/mfu" not in monitor.compute()


def test_a_monitor_before_the_launch_is_refused() -> None:
    with pytest.raises(FabricRuntimeError, match="not started yet"):
        ThroughputMonitor(Fabric(accelerator="cpu", devices=2))


def measured_on_a_rank(strategy: Any) -> tuple[dict[str, float], list[Any]]:
    logger = KeepsMetrics()
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, loggers=logger)
    monitor = ThroughputMonitor(fabric, available_flops=8.0)
    slower = 1 + fabric.global_rank
    monitor.update(time=0.0, batches=0, samples=0, lengths=0, flops=0)
    monitor.update(time=2.0 * slower, batches=4, samples=8, lengths=16, flops=8)
    metrics = monitor.compute_and_log()
    fabric.close()
    return metrics, logger.seen


def test_over_two_ranks_the_global_rates_are_twice_each_devices_and_rank_0_logs(ranks: RankPool) -> None:
    for rank, (metrics, logged) in enumerate(ranks.run(measured_on_a_rank, "ddp", ranks=2)):
        seconds = 2.0 * (1 + rank)
        assert metrics["device/samples_per_sec"] == 8 / seconds
        assert metrics["device/mfu"] == 8 / seconds / 8.0
        for name in ("batches_per_sec", "samples_per_sec", "items_per_sec", "flops_per_sec"):
            assert metrics[name] == 2 * metrics[f"device/{name}"]
        assert logged == ([(0, metrics)] if rank == 0 else [])


def test_ranks_that_share_their_data_do_not_count_it_twice(ranks: RankPool) -> None:
    strategy = ModelParallelStrategy({}, data_parallel_size=1, tensor_parallel_size=2)
    for metrics, _ in ranks.run(measured_on_a_rank, strategy, ranks=2):
        assert metrics["samples_per_sec"] == metrics["device/samples_per_sec"]
        assert metrics["flops_per_sec"] == 2 * metrics["device/flops_per_sec"]


# --- operations of a model ----------------------------------------------------------------------------------------

FORWARD = 2 * 8 * 32 * 16 + 2 * 8 * 16 * 4
# Of both layers the gradients of the weights, of the second one that of its input too.
BACKWARD = FORWARD + 2 * 8 * 16 * 4


def make_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


def counted(loss_fn: Any = None) -> int:
    model, batch = make_layers(), torch.ones(8, 32)
    return measure_flops(model, lambda: model(batch), loss_fn)


@pytest.mark.parametrize("place", ["real", "meta", "fake"])
def test_operations_are_two_for_each_factor_of_the_products(place: str) -> None:
    with {"real": torch.device("cpu"), "meta": torch.device("meta"), "fake": FakeTensorMode()}[place]:
        assert counted() == FORWARD
        assert counted(torch.sum) == FORWARD + BACKWARD
        assert type(counted()) is int


def test_counting_leaves_gradients_as_they_were_even_after_an_error() -> None:
    model = make_layers()
    model(torch.ones(8, 32)).sum().backward()
    before = [parameter.grad for parameter in model.parameters()]
    values = [gradient.clone() for gradient in before if gradient is not None]
    measure_flops(model, lambda: model(torch.ones(8, 32)), torch.sum)
    with pytest.raises(RuntimeError, match="scalar"):
        measure_flops(model, lambda: model(torch.ones(8, 32)), lambda output: output)
    for parameter, gradient, value in zip(model.parameters(), before, values, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, value)


# --- peaks of devices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.5e12),
        ("NVIDIA H100 80GB HBM3", torch.float8_e4m3fn, 1979e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756.5e12),
        ("NVIDIA H100 NVL", torch.float16, 835.5e12),
        ("NVIDIA H200", torch.bfloat16, 989.5e12),
        ("NVIDIA H200 NVL", torch.bfloat16, 835.5e12),
        ("NVIDIA B200", torch.bfloat16, 2250e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100 80GB PCIe", torch.float64, 19.5e12),
        ("NVIDIA A10G", torch.bfloat16, 70e12),
        ("NVIDIA L4", torch.float16, 121e12),
        ("NVIDIA L40S", torch.bfloat16, 362.05e12),
        ("Tesla T4", torch.float16, 65e12),
        ("Tesla T4", torch.bfloat16, None),
        ("Tesla V100-SXM2-32GB", torch.float16, 125e12),
        ("Tesla V100-PCIE-16GB", torch.float32, 14e12),
        ("NVIDIA GeForce RTX 3090", torch.bfloat16, 71e12),
        ("NVIDIA GeForce RTX 4090", torch.float16, 165.2e12),
        ("AMD Instinct MI250X", torch.bfloat16, 191.5e12),
        ("AMD Instinct MI300X", torch.bfloat16, 1307.4e12),
        ("TPU v4", torch.bfloat16, 275e12),
        ("TPU v5 lite", torch.bfloat16, 197e12),
        ("TPU v5e", torch.bfloat16, 197e12),
        ("TPU v5p", torch.bfloat16, 459e12),
        ("TPU v5", torch.bfloat16, 459e12),
        ("NVIDIA A100-SXM4-80GB", torch.int64, None),
        # Near the names of the table, but other devices.
        ("NVIDIA GeForce RTX 3090 Ti", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA GH200 480GB", torch.bfloat16, None),
        ("NVIDIA A10", torch.bfloat16, None),
        ("NVIDIA L40", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),
    ],
)
def test_the_name_of_a_device_tells_its_dense_peak(name: str, dtype: torch.dtype, peak: float | None) -> None:
    found = peak_from_datasheet(name, dtype)
    assert found == (None if peak is None else pytest.approx(peak))


def test_float32_products_in_tf32_have_the_peak_of_tf32_where_there_is_one() -> None:
    assert peak_from_datasheet("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    assert peak_from_datasheet("NVIDIA A100-SXM4-80GB", torch.float32, tf32=True) == 156e12
    assert peak_from_datasheet("NVIDIA A100-SXM4-80GB", torch.bfloat16, tf32=True) == 312e12
    assert peak_from_datasheet("Tesla V100-SXM2-16GB", torch.float32, tf32=True) == 15.7e12


@pytest.mark.parametrize("allowed", [False, True])
def test_a_gpu_is_looked_up_by_its_name_and_by_whether_tf32_is_allowed(
    allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA A100-{device.index}")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        assert get_available_flops(torch.device("cuda", 1), torch.float32) == (156e12 if allowed else 19.5e12)
    finally:
        torch.set_float32_matmul_precision(before)


def test_other_devices_have_no_known_peak() -> None:
    assert get_available_flops(torch.device("meta"), torch.float32) is None


class Clock:
    """Whose products take the given seconds, one after the other."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = list(seconds)
        self.now = 0.0
        self.is_running = False

    def __call__(self) -> float:
        self.now += self.seconds.pop(0) if self.is_running else 0.0
        self.is_running = not self.is_running
        return self.now


def test_the_measured_peak_is_the_best_of_growing_products() -> None:
    # 4.2e6 operations in 2 ms at best, then 33.6e6 in 20 ms, which is long enough to end.
    clock = Clock(0.5, 0.002, 0.003, 0.003, 0.003, 0.02, 0.02, 0.02, 0.02, 0.02)
    assert peak_of_matmuls(torch.float32, clock) == pytest.approx(2 * 128**3 / 0.002)
    assert clock.seconds == []
    clock = Clock(*[0.002] * 5, 0.008, 0.01, 0.01, 0.01, 0.01)
    assert peak_of_matmuls(torch.float32, clock) == pytest.approx(2 * 256**3 / 0.008)


def test_neither_autocast_nor_a_device_around_changes_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    multiply = torch.mm

    def watched(*factors: torch.Tensor) -> torch.Tensor:
        product = multiply(*factors)
        seen.add((product.dtype, product.device.type))
        return product

    monkeypatch.setattr(torch, "mm", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        peak_of_matmuls(torch.float32, Clock(*[1.0] * 5))
    assert seen == {(torch.float32, "cpu")}


def test_a_cpu_is_measured_once_for_each_dtype_and_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[torch.dtype] = []
    monkeypatch.setattr(flops, "peak_of_matmuls", lambda dtype: measured.append(dtype) or 1e9)
    flops._measured_peak.cache_clear()
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            assert get_available_flops(torch.device("cpu"), dtype) == 1e9
    flops._measured_peak.cache_clear()
    assert measured == [torch.float32, torch.bfloat16] * 2


def test_a_dtype_without_products_has_no_peak() -> None:
    assert peak_of_matmuls(torch.bool) is None
