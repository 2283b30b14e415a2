"""See :mod:`fabric_lite.names`."""

from fabric_lite.names.torch_collective import TorchCollective

__all__ = ["TorchCollective"]
