"""A lack of memory is told as such, and not as damage or as a lost rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_lite.checkpoint.archive_reading import errors_of
from fabric_lite.checkpoint.together import lost_ranks_explained

TOO_MUCH = 1 << 60


@pytest.mark.parametrize("allocate", [bytearray, lambda size: torch.empty(size, dtype=torch.uint8)])
@pytest.mark.parametrize("explained", [lambda: errors_of(Path("a.pt")), lambda: lost_ranks_explained("save()")])
def test_a_lack_of_memory_is_neither_damage_nor_a_lost_rank(
    explained: Callable[[], Any], allocate: Callable[[int], Any]
) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as plain:
        allocate(TOO_MUCH)
    with pytest.raises(plain.type) as raised, explained():
        allocate(TOO_MUCH)
    assert (type(raised.value), str(raised.value)) == (plain.type, str(plain.value))
