"""The data of a run: sharding, counted order, resume, device moves."""

from fabric_lite.data.loader import ExtendedLoader, extend_loader, is_extended_loader, release_loader
from fabric_lite.data.move import move_to_device

__all__ = ["ExtendedLoader", "extend_loader", "is_extended_loader", "move_to_device", "release_loader"]
