"""One pool of warm ranks per worker, and guards against leaks."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fabric_lite import notices
from fabric_lite.signals import requests
from fabric_lite.testing import RankPool

torch.set_num_threads(1)

# The name of a property of a test: [title of a table, row, what was found].
TABLE = "row of a table"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers, by files, for the suite as a whole; none for tests that are asked for by name or in full counts.

    One test alone starts faster without, and the full counts compare seconds, for which they need the machine.
    """
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.option.markexpr == "not full"
    return 2 if is_whole else 0


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show the tables whose rows are tests; what a worker captures is seen by nobody."""
    tables: dict[str, dict[str, str]] = {}
    for outcome in ("passed", "skipped", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", []):
                if name == TABLE:
                    title, row, found = value
                    tables.setdefault(title, {})[row] = found if outcome == "passed" else outcome
    for title, rows in tables.items():
        terminalreporter.section(title)
        for row, found in rows.items():
            terminalreporter.line(f"  {row:<28}{found}")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """``ranks.run(function, *args, ranks=2)`` returns one value per rank."""
    pool = RankPool(timeout_seconds=90)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """A test leaves environment, threads and the default dtype as they were, no process group, and takes no signals."""
    notices._said.clear()  # what is said once per process is said once per test
    environment, threads = dict(os.environ), set(threading.enumerate())
    yield
    changed = {key for key in {*environment, *os.environ} if environment.get(key) != os.environ.get(key)}
    # torch sets the second one itself when it first imports its compiler.
    assert not changed - {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}, f"environment changed: {changed}"
    left = [thread for thread in threading.enumerate() if thread not in threads and not thread.daemon]
    assert not left, f"threads left: {left}"
    assert torch.get_default_dtype() == torch.float32
    assert not torch.distributed.is_initialized(), "a process group was left"
    if requests.are_taken:  # by Fabrics that the test has dropped, or by one that something still holds
        gc.collect()
    assert not requests.are_taken, "a Fabric that was not closed still takes signals"
