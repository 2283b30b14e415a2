"""See :mod:`fabric_lite.names`."""

from fabric_lite.seed import reset_seed, seed_everything

__all__ = ["reset_seed", "seed_everything"]
