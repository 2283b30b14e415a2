"""Checkpoints: a file is either the old one or the new one, and any strategy and world size loads any other's.

saving.py    state -> plain values -> one file        loading.py   one file -> checks -> objects, all or none
plain.py     what may be in a file, and the refusals  restore.py   one object's state: checked, laid out, applied
layout.py    sharded tensors made full, and back      archive.py   the file: torch.save's zip with a manifest in it
packing.py   views and shared storages                commit.py    temporary name, fsync, rename, sweeping
"""

from fabric_lite.attribute_dict import AttributeDict
from fabric_lite.checkpoint.archive import CheckpointNotFoundError
from fabric_lite.checkpoint.loading import load, load_raw
from fabric_lite.checkpoint.saving import save

__all__ = ["AttributeDict", "CheckpointNotFoundError", "load", "load_raw", "save"]
