"""ZeRO by DeepSpeed: an engine that owns the step, under the same loop as every other strategy.

DeepSpeed itself is an extra, and imported when a model is set up. What of it is private is touched in ``partitions``
and ``engine`` alone.
"""

from fabric_lite.strategies.deepspeed.strategy import DeepSpeedStrategy

__all__ = ["DeepSpeedStrategy"]
