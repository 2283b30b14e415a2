"""See :mod:`fabric_lite.names`."""

from fabric_lite.names.helpers import materialize_meta_tensors as _materialize_meta_tensors

__all__ = ["_materialize_meta_tensors"]
