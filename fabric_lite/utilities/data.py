"""See :mod:`fabric_lite.names`."""

from fabric_lite.attribute_dict import AttributeDict
from fabric_lite.names.helpers import suggested_max_num_workers

__all__ = ["AttributeDict", "suggested_max_num_workers"]
