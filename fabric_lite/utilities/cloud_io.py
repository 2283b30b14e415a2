"""See :mod:`fabric_lite.names`."""

from fabric_lite.names.helpers import get_filesystem

__all__ = ["get_filesystem"]
