"""See :mod:`fabric_lite.names`."""

from fabric_lite.names.kinds import ClusterEnvironment

__all__ = ["ClusterEnvironment"]
