"""Fabrics that nobody closes, as in a notebook whose cell is run again and again, leave nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fabric_lite import Fabric
from fabric_lite.notices import says_that_it_waits
from fabric_lite.signals import requests
from fabric_lite.testing import RankPool

OPEN_FILES = "/proc/self/fd"


def trained(devices: int = 1) -> Fabric:
    """A Fabric that has set up, stepped, and been asked whether to stop."""
    fabric = Fabric(accelerator="cpu", devices=devices)
    model = nn.Linear(2, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    assert not fabric.should_stop
    return fabric


def held() -> tuple[set[str], int, list[Any]]:
    """Threads, the number of open files, and the handlers of the two signals that ask a run to stop."""
    gc.collect()
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    threads = {f"{thread.name} {thread.ident}" for thread in threading.enumerate()}
    return threads, len(os.listdir(OPEN_FILES)), handlers


@pytest.mark.skipif(not os.path.isdir(OPEN_FILES), reason="open files are counted in /proc")
def test_twenty_fabrics_that_are_dropped_hold_what_one_does_and_the_next_close_lets_go_of_that() -> None:
    gc.collect()  # Fabrics of earlier tests, which would be let go of in the middle
    trained().close()
    before = held()
    dropped = [weakref.ref(trained())]
    one = held()
    dropped += [weakref.ref(trained()) for _ in range(19)]
    assert held() == one
    assert [fabric() for fabric in dropped] == [None] * 20
    trained().close()
    assert held() == before


def test_a_signal_that_came_when_nobody_listened_is_not_the_next_fabrics_and_the_next_is() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: came.append(number))
    try:
        trained()
        gc.collect()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert came == [signal.SIGUSR1]
        fabric = Fabric(accelerator="cpu", devices=1)
        model = nn.Linear(2, 1)
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        stopped = []
        for step in range(3):
            optimizer.step()
            stopped.append(fabric.should_stop)
            if step == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
        fabric.close()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert stopped == [False, False, True]


def drop_on_several_ranks() -> tuple[bool, set[str], list[bool]]:
    """Whether dropped Fabrics still take signals; what is held beyond the next close; whether any is still there.

    A warm rank may hold less by then: the thread that says what waits ends some seconds after the last wait, which may
    be one of an earlier test.
    """
    gc.collect()
    trained(2).close()
    before = held()
    dropped = [weakref.ref(trained(2)) for _ in range(3)]
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("fabric_lite preemption"):
            thread.join(10.0)
    takes = requests.are_taken
    trained(2).close()
    threads, files, handlers = held()
    beyond = threads - before[0]
    if files > before[1]:
        beyond.add(f"{files - before[1]} open files")
    if handlers != before[2]:
        beyond.add(f"{handlers}, not {before[2]}")
    return takes, beyond, [fabric() is not None for fabric in dropped]


def wait_for_a_while() -> None:
    """Leave the thread that says what waits behind; it ends in half a second, as the next test goes on."""
    with says_that_it_waits("an earlier test", seconds=0.5):
        dist.barrier()


@pytest.mark.skipif(not os.path.isdir(OPEN_FILES), reason="open files are counted in /proc")
def test_on_several_ranks_they_take_no_signals_and_end_their_threads(ranks: RankPool) -> None:
    ranks.run(wait_for_a_while)
    assert ranks.run(drop_on_several_ranks) == [(False, set(), [False] * 3)] * 2
