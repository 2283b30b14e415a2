"""One pool of warm ranks per session, and guards against leaks."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from fabric_lite.testing import RankPool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """``ranks.run(function, *args, ranks=2)`` returns one value per rank."""
    pool = RankPool(timeout_seconds=90)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """A test leaves environment, threads and the default dtype as they were, and no process group."""
    environment, threads = dict(os.environ), set(threading.enumerate())
    yield
    changed = {key for key in {*environment, *os.environ} if environment.get(key) != os.environ.get(key)}
    # torch sets the second one itself when it first imports its compiler.
    assert not changed - {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}, f"environment changed: {changed}"
    left = [thread for thread in threading.enumerate() if thread not in threads and not thread.daemon]
    assert not left, f"threads left: {left}"
    assert torch.get_default_dtype() == torch.float32
    assert not torch.distributed.is_initialized(), "a process group was left"
