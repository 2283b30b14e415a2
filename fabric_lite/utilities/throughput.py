"""See :mod:`fabric_lite.names`."""

from fabric_lite.throughput import Throughput, ThroughputMonitor, measure_flops

__all__ = ["Throughput", "ThroughputMonitor", "measure_flops"]
