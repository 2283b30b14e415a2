"""Modules that are made on the meta device, and later given exactly the values of a plain construction.

While :func:`record` is active (``modes``) every tensor is made on the meta device, which takes no memory, and what
torch does with it is written to a log (``recording``, ``log``), random draws included (``randomness``). Later
:func:`values_of` says which values a module's tensors should have, and its ``fill`` makes them: the log is replayed on
the real device, one tensor at a time (``replay``), and each finished one is copied to where the module keeps it, or
keeps a shard of it (``values``).
"""

from __future__ import annotations

from fabric_lite.deferred.modes import record
from fabric_lite.deferred.recording import Recording
from fabric_lite.deferred.values import DeferredValues, values_of

__all__ = ["DeferredValues", "Recording", "record", "values_of"]
