"""See :mod:`fabric_lite.names`."""

from fabric_lite.names.lazy_loading import NotYetLoadedTensor as _NotYetLoadedTensor
from fabric_lite.names.lazy_loading import lazy_load as _lazy_load

__all__ = ["_NotYetLoadedTensor", "_lazy_load"]
