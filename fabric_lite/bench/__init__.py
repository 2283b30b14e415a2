"""``fabric-bench``: runs the user's own script under every layout, and says which one is best.

    results = fabric_lite.bench.run("train.py", strategies=["ddp", "fsdp"], devices=[1, 2])

This package imports no torch before it has to: the ranks do.
"""

from fabric_lite.bench.benchmark import run
from fabric_lite.bench.results import Combination, Communication, Comparison, Memory, Results, Row

__all__ = ["Combination", "Communication", "Comparison", "Memory", "Results", "Row", "run"]
