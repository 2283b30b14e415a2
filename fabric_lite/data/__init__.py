"""The data of a run: sharding, counted order, resume, device moves."""

from fabric_lite.data.loader import (
    ExtendedLoader,
    check_loaders,
    extend_loader,
    is_extended_loader,
    owner_of_loader,
    place_of,
    put_around,
    release_loader,
)
from fabric_lite.data.move import move_to_device
from fabric_lite.data.place import Place
from fabric_lite.data.window import Window

__all__ = [
    "ExtendedLoader",
    "Place",
    "Window",
    "check_loaders",
    "extend_loader",
    "is_extended_loader",
    "move_to_device",
    "owner_of_loader",
    "place_of",
    "put_around",
    "release_loader",
]
