"""Utilities by their names in Lightning Fabric; see :mod:`fabric_lite.names`."""

from fabric_lite.attribute_dict import AttributeDict
from fabric_lite.data import move_to_device as move_data_to_device
from fabric_lite.names.helpers import is_shared_filesystem, suggested_max_num_workers
from fabric_lite.notices import rank_zero_info, rank_zero_only, rank_zero_warn
from fabric_lite.throughput import Throughput, ThroughputMonitor, measure_flops

__all__ = [
    "AttributeDict",
    "Throughput",
    "ThroughputMonitor",
    "is_shared_filesystem",
    "measure_flops",
    "move_data_to_device",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "suggested_max_num_workers",
]
