"""See :mod:`fabric_lite.names`."""

from torch.distributed import ReduceOp

from fabric_lite.names.helpers import is_shared_filesystem

__all__ = ["ReduceOp", "is_shared_filesystem"]
