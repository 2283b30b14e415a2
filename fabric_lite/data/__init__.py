"""The data of a run: sharding, counted order, resume, device moves."""

from fabric_lite.data.loader import (
    ExtendedLoader,
    check_loaders,
    extend_loader,
    is_extended_loader,
    owner_of_loader,
    release_loader,
)
from fabric_lite.data.move import move_to_device

__all__ = [
    "ExtendedLoader",
    "check_loaders",
    "extend_loader",
    "is_extended_loader",
    "move_to_device",
    "owner_of_loader",
    "release_loader",
]
