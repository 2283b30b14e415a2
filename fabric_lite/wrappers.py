"""Lightning Fabric's names for what was set up; see :mod:`fabric_lite.names`."""

from fabric_lite.adopt import is_wrapped
from fabric_lite.names.helpers import unwrap_objects as _unwrap_objects
from fabric_lite.names.kinds import FabricDataLoader as _FabricDataLoader
from fabric_lite.names.kinds import FabricModule as _FabricModule
from fabric_lite.names.kinds import FabricOptimizer as _FabricOptimizer

__all__ = ["_FabricDataLoader", "_FabricModule", "_FabricOptimizer", "_unwrap_objects", "is_wrapped"]
