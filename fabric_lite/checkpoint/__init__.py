"""Checkpoints: a name has either the old one or the new one, and any strategy and world size loads any other's.

Writing                                                 Reading
  saving.py           state -> plain values               loading.py           checks -> objects, all or none
  plain.py            what may be in it, and refusals     restore*.py          one object's state: checked, applied
  layout.py           who has what of sharded tensors     placing.py, keys.py  laid out as here; keys without prefixes
  file_writing.py     one file; gathering.py brings       formats.py           what is at a path, and its reader:
                      shards to rank 0 block by block       archive_reading, folder_reading, safetensors, dcp_reading
  folder_writing.py   a folder: every rank its shards     stored*.py           tensors that are still in their files
  archive_writing.py  torch.save's zip
  part_writing.py     safetensors and all raw data      Both
  contents.py         tensors numbered and named          archive.py, manifest.py  what describes a file, a folder
                                                          boxes.py             parts of tensors: shared, whole or not
  packing.py          views and shared storages           plain_json.py            plain values as JSON, exactly
  commit.py           temporary name, fsync, in place     together.py              what fails on one rank fails on all
  remote.py           the same in a store of fsspec       memory.py            how much there is, or was not
  asynchronous.py     beside the training loop            seal.py              a checksum around a file's records
  staging.py          the copy that is written so         way_back.py          what a load overwrites, till it ends

``fabric-ckpt`` is cli.py over inspection.py and conversion.py; flat.py is its whole checkpoint in a safetensors file.
"""

from fabric_lite.attribute_dict import AttributeDict
from fabric_lite.checkpoint.archive import CheckpointNotFoundError
from fabric_lite.checkpoint.asynchronous import SaveHandle, finish, finish_at_exit
from fabric_lite.checkpoint.loading import load, load_raw
from fabric_lite.checkpoint.saving import save

__all__ = [
    "AttributeDict",
    "CheckpointNotFoundError",
    "SaveHandle",
    "finish",
    "finish_at_exit",
    "load",
    "load_raw",
    "save",
]
