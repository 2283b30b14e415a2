"""What the hang watch makes of what the ranks say, and of where a thread stands."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from fabric_lite import FabricTypeError, FabricValueError
from fabric_lite.call_site import names_of
from fabric_lite.watch import choose_hang_timeout, group_timeout_seconds
from fabric_lite.watch_position import Position, is_debugged, position_of
from fabric_lite.watch_report import RankStatus, absent_ranks, explain, explain_late


def at(
    line: int, waits_in: str | None = None, sequence: int = 7, *, left: bool = False, age: float = 30.0
) -> RankStatus:
    position = Position("/home/user/train.py", line, "train", f"line_{line}()", waits_in)
    return RankStatus(
        beat=9, age_seconds=age, arrived_seconds=age, sequence={"0": sequence}, position=position, has_left=left
    )


def first_line(*statuses: RankStatus, silent: dict[int, str] | None = None, missing: tuple[int, ...] = ()) -> str:
    return explain(dict(enumerate(statuses)), silent or {}, missing, 30.0)[0]


def test_a_rank_with_fewer_collectives_behind_it_did_not_arrive() -> None:
    statuses = [at(41, "all_reduce"), at(38, sequence=6), at(41, "all_reduce")]
    assert absent_ranks(dict(enumerate(statuses))) == [1]
    assert first_line(*statuses) == "rank 1 did not arrive: ranks 0, 2 wait in all_reduce (train.py:41) for 30 s"


def test_a_rank_that_is_still_computing_its_backward_did_not_arrive() -> None:
    statuses = [at(41, "backward"), at(41, "backward", sequence=6)]
    assert first_line(*statuses) == "rank 1 did not arrive: rank 0 waits in backward (train.py:41) for 30 s"


def test_a_rank_outside_of_any_collective_did_not_arrive_whatever_is_counted() -> None:
    assert absent_ranks({0: at(41, "barrier"), 1: at(50)}) == [1]


def test_a_count_that_only_two_ranks_share_is_compared_between_them_alone() -> None:
    sub = RankStatus(sequence={"0": 7, "pair": 3}, position=Position("/a/train.py", 4, "f", "", "all_reduce"))
    late = RankStatus(sequence={"0": 7, "pair": 2}, position=Position("/a/train.py", 3, "f"))
    assert absent_ranks({0: sub, 1: late, 2: at(9, "barrier")}) == [1]


def test_a_rank_that_says_nothing_is_named_before_all_others() -> None:
    statuses = [at(41, "all_reduce"), at(38, sequence=6)]
    line = first_line(*statuses, silent={1: "is stopped by a signal (process 12)"})
    cause = "rank 1 did not arrive and is stopped by a signal (process 12)"
    assert line == f"{cause}: rank 0 waits in all_reduce (train.py:41) for 30 s"


def test_a_rank_that_left_is_said_to_have_left() -> None:
    line = first_line(at(41, "all_reduce"), at(60, left=True))
    assert line == "rank 1 left the run at train.py:60: rank 0 waits in all_reduce (train.py:41) for 30 s"


def test_a_rank_that_never_spoke_did_not_start() -> None:
    assert (
        first_line(at(3, "barrier"), missing=(1,))
        == "rank 1 did not start: rank 0 waits in barrier (train.py:3) for 30 s"
    )


def test_of_ranks_in_different_calls_the_odd_one_is_named() -> None:
    line = first_line(at(41, "all_reduce"), at(44, "barrier"), at(41, "all_reduce"))
    assert (
        line == "rank 1 is in barrier (train.py:44), another call: ranks 0, 2 wait in all_reduce (train.py:41) for 30 s"
    )


def test_ranks_that_all_compute_are_said_not_to_move() -> None:
    assert first_line(at(7), at(8)) == "ranks 0, 1 did not move for 30 s, and none waits in a collective"


def test_ranks_that_all_wait_in_one_call_are_said_to_wait() -> None:
    assert first_line(at(7, "barrier"), at(7, "barrier")) == (
        "ranks 0, 1 wait in barrier (train.py:7), which does not end, for 30 s"
    )


def test_each_rank_has_its_line_and_ranks_at_one_place_share_one() -> None:
    report = explain({0: at(41, "all_reduce"), 1: at(38, sequence=6), 2: at(41, "all_reduce")}, {}, [], 30.0)
    assert report[1:] == [
        "  ranks 0, 2: /home/user/train.py:41, in train: line_41(); last collective entered 30.0 s ago",
        "  rank 1: /home/user/train.py:38, in train: line_38(); last collective entered 30.0 s ago",
    ]


def test_a_report_on_many_places_stays_short() -> None:
    report = explain({rank: at(rank) for rank in range(100)}, {}, [], 30.0)
    assert len(report) == 8
    assert report[-1] == "  ... and 94 more places"


def test_a_rank_that_came_late_is_named_with_the_line_it_stood_on() -> None:
    assert explain_late({1: at(38, sequence=6)}, {0: at(41, "all_reduce", age=16.0)}) == (
        "rank 1 kept rank 0 waiting in all_reduce (train.py:41) for 16 s; it stood at train.py:38"
    )


def test_the_command_line_wins_over_the_script_and_zero_is_none() -> None:
    assert choose_hang_timeout(None, None) == 600.0
    assert choose_hang_timeout(20, None) == 20.0
    assert choose_hang_timeout(20, 0.0) == 0.0
    assert group_timeout_seconds(0.0) is None
    assert group_timeout_seconds(600.0) == 1800.0
    assert group_timeout_seconds(3600.0) == 7200.0


@pytest.mark.parametrize(
    ("seconds", "kind"), [("20", FabricTypeError), (True, FabricTypeError), (-1, FabricValueError)]
)
def test_a_limit_that_is_no_time_is_refused(seconds: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="hang_timeout"):
        choose_hang_timeout(seconds, None)


@pytest.fixture
def waiting_thread() -> Iterator[int]:
    """A thread that stands in ``wait_here``."""
    is_there, may_end = threading.Event(), threading.Event()

    def wait_here() -> None:
        is_there.set()
        may_end.wait()

    thread = threading.Thread(target=wait_here)
    thread.start()
    is_there.wait()
    assert thread.ident is not None
    yield thread.ident
    may_end.set()
    thread.join()


def test_a_thread_stands_on_the_innermost_line_of_the_users(waiting_thread: int) -> None:
    position = position_of(waiting_thread, with_text=True)
    assert position is not None
    assert (position.file, position.function, position.waits_in) == (__file__, "wait_here", None)
    assert position.text in ("is_there.set()", "may_end.wait()")
    assert not is_debugged(waiting_thread)


def test_a_thread_that_has_ended_stands_nowhere() -> None:
    assert position_of(0) is None


def test_a_thread_below_a_debugger_is_debugged() -> None:
    import bdb

    seen: list[bool] = []
    bdb.Bdb().runcall(lambda: seen.append(is_debugged(threading.get_ident())))
    assert seen == [True]


def test_ranks_are_named_in_order_and_in_spans() -> None:
    assert [names_of(ranks) for ranks in ([1], (2, 0), {0, 1}, [7, *range(6)])] == [
        "rank 1",
        "ranks 0, 2",
        "ranks 0, 1",
        "ranks 0-5, 7",
    ]
