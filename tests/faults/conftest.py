"""What the fault tests share: figures for the table in ``docs/faults.md``, and going on where a run stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.record import merge

Figures = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--figures", type=Path, help="merge what is measured into this JSON file")
    group.addoption("--progress", type=Path, help="leave out the tests that this file says have passed, and add to it")
    group.addoption("--times", type=int, default=1, help="so many times the trials of the tests that kill at random")


@pytest.fixture
def times(request: pytest.FixtureRequest) -> int:
    """By how much to multiply a count of random trials."""
    return int(request.config.getoption("--times"))


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Iterator[Figures]:
    """``figures("bits flipped in a file", trials=500, found=500)``: one row of the table, once passed."""
    rows: dict[str, dict[str, Any]] = {}
    yield lambda name, **values: rows.update({name: values})
    path: Path | None = request.config.getoption("--figures")
    if path is not None and rows:
        merge(path, rows)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    passed = _passed(config)
    left_out = [item for item in items if item.nodeid in passed]
    if left_out:
        items[:] = [item for item in items if item.nodeid not in passed]
        config.hook.pytest_deselected(items=left_out)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # pytest gives this hook no config; the file was chosen on the command line, for the whole process.
    if _progress is None:
        return
    if report.when == "call" and report.passed:
        _called.add(report.nodeid)
    # Only then is the row of its figures written, and has nothing failed.
    if report.when == "teardown" and report.passed and report.nodeid in _called:
        with _progress.open("a") as file:
            file.write(report.nodeid + "\n")


_progress: Path | None = None
_called: set[str] = set()  # the tests whose call has passed


def pytest_configure(config: pytest.Config) -> None:
    global _progress
    _progress = config.getoption("--progress", None)


def _passed(config: pytest.Config) -> set[str]:
    path: Path | None = config.getoption("--progress", None)
    return set(path.read_text().splitlines()) if path is not None and path.exists() else set()
