"""A bar on a terminal says how far, how fast and what; elsewhere nothing."""

from __future__ import annotations

import io
import re
import types
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fabric_lite import Fabric
from fabric_lite.progress_bar import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    stream = Terminal()
    # Not sys.stderr itself, which pytest exchanges between a fixture and its test.
    monkeypatch.setattr("fabric_lite.progress_bar.sys", types.SimpleNamespace(stderr=stream))
    monkeypatch.setattr("fabric_lite.progress_bar._SECONDS_BETWEEN", 0.0)
    monkeypatch.setenv("COLUMNS", "200")
    return stream


def lines(terminal: Terminal) -> list[str]:
    return [line.removesuffix("\033[K") for line in terminal.getvalue().rstrip("\n").split("\r")[1:]]


def test_it_draws_how_far_it_is_and_what_it_is_told(terminal: Terminal) -> None:
    bar = ProgressBar([1, 2, 3, 4], "epoch 3")
    for number in bar:
        bar.show(loss=torch.tensor(number / 3, requires_grad=True), stage="warm")
    first, last = lines(terminal)[0], lines(terminal)[-1]
    assert re.fullmatch(
        r"epoch 3  1/4 \[#{5}\.{15}\]  [\d.e+]+ batches/s  0:00 of 0:00  loss 0\.3333  stage warm", first
    ), first
    assert last.startswith("epoch 3  4/4 [####################]")
    assert terminal.getvalue().endswith("\n")


def test_samples_are_those_of_all_ranks(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr("fabric_lite.progress_bar.time.monotonic", lambda: next(times))
    for _ in ProgressBar(DataLoader(TensorDataset(torch.ones(16)), batch_size=8), shares=4):
        pass
    assert lines(terminal)[-1] == "2/2 [####################]  32 samples/s  0:02 of 0:02"


def test_without_a_length_it_counts(terminal: Terminal) -> None:
    assert list(ProgressBar(iter("abc"))) == ["a", "b", "c"]
    assert lines(terminal)[-1].startswith("3 batches  ")


def test_it_takes_no_batch_beyond_its_limit(terminal: Terminal) -> None:
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(9):
            taken.append(number)
            yield number

    assert list(ProgressBar(numbers(), limit=2)) == [0, 1]
    assert taken == [0, 1]
    assert "2/2" in lines(terminal)[-1]
    assert len(ProgressBar([1, 2, 3], limit=2)) == 2
    assert len(ProgressBar([1], limit=2)) == 1


def test_an_exception_in_the_loop_leaves_a_whole_line(terminal: Terminal) -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in ProgressBar([1, 2, 3]):
            _ = 1 / 0
    assert terminal.getvalue().endswith("\n")


def test_a_line_is_no_wider_than_the_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    list(ProgressBar(range(3), "a long title of an epoch"))
    assert {len(line) for line in lines(terminal)} == {19}


def test_nothing_is_drawn_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(torch.ones(4)), batch_size=2))
    bar = fabric.progress(loader, "epoch")
    for (batch,) in bar:
        bar.show(loss=batch.sum())
    assert len(bar) == 2
    assert capsys.readouterr() == ("", "")


def test_nothing_is_drawn_when_not_asked_for(terminal: Terminal) -> None:
    assert list(ProgressBar([1, 2], is_shown=False)) == [1, 2]
    assert terminal.getvalue() == ""
