"""See :mod:`fabric_lite.names`."""

from fabric_lite.notices import rank_zero_info, rank_zero_only, rank_zero_warn

__all__ = ["rank_zero_info", "rank_zero_only", "rank_zero_warn"]
