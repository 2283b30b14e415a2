"""Waiting until all have come, and saying who has not."""

from __future__ import annotations

import threading

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from fabric_lite.errors import LaunchError
from fabric_lite.meeting import meet, names_of


def test_all_go_on_once_the_last_has_come() -> None:
    store, passed = HashStore(), []

    def come(number: int) -> None:
        meet(store, "rank", number, 3, 20)
        passed.append(number)

    threads = [threading.Thread(target=come, args=(number,)) for number in (2, 0)]
    for thread in threads:
        thread.start()
    assert passed == []
    come(1)
    for thread in threads:
        thread.join()
    assert sorted(passed) == [0, 1, 2]


def test_who_has_not_come_is_named() -> None:
    with pytest.raises(LaunchError, match=r"Ranks 0, 2 of 3 have not come within 0.1 s.\n.*there: rank 1 \(.+\)"):
        meet(HashStore(), "rank", 1, 3, 0.1)


def test_what_the_first_whose_time_is_over_has_said_holds_for_all() -> None:
    store = HashStore()
    with pytest.raises(LaunchError, match="Node 1 of 2 has not come"):
        meet(store, "node", 0, 2, 0.1)
    with pytest.raises(LaunchError, match="Node 1 of 2 has not come"):
        meet(store, "node", 1, 2, 20)


def test_a_second_of_one_number_is_of_another_job_unless_it_may_come_again() -> None:
    store = HashStore()
    meet(store, "rank", 0, 1, 1)
    with pytest.raises(LaunchError, match="Another rank 0 has come before this one: two jobs meet at one place"):
        meet(store, "rank", 0, 1, 1)
    meet(store, "rank", 0, 1, 1, may_come_again=True)


def test_of_many_the_first_are_named() -> None:
    assert names_of("rank", [3]) == "Rank 3"
    assert names_of("node", list(range(10))) == "Nodes 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
