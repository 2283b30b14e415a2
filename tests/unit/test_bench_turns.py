"""Jobs take turns: threads play their ranks, through the real pipes."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest

from fabric_lite.bench.turns import _SPIN_SECONDS, Gate, Turns

FIRST = 2


def test_work_of_other_threads_counts_while_a_rank_waits_but_not_what_waking_takes(tmp_path: Path) -> None:
    ends = threading.Event()

    def compute() -> None:
        while not ends.is_set():
            sum(range(1000))

    def waited_with(name: str, **options: bool) -> float:
        (tmp_path / name).mkdir()
        turns = Turns([tmp_path / name], [1], first=0, last=0, steps=[1], seed=0)
        gate = Gate(tmp_path / name, 0, **options)
        opener = threading.Timer(2 * _SPIN_SECONDS, turns.read)
        opener.start()
        gate.wait(0)
        opener.join()
        turns.close()
        return gate.worked_seconds

    assert waited_with("alone") == 0
    worker = threading.Thread(target=compute)
    worker.start()
    try:
        assert waited_with("beside") > waited_with("forgiven", spins=True) > 0
    finally:
        ends.set()
        worker.join()


def run_jobs(folder: Path, ranks: list[int], *, last: int, steps: list[int], seed: int = 0) -> list[tuple[int, int]]:
    """The job and the step's number, in the order in which the ranks made those that are timed."""
    folders = [folder / str(job) for job in range(len(ranks))]
    for each in folders:
        each.mkdir()
    made: list[tuple[int, int]] = []

    def rank(job: int, number: int) -> None:
        gate = Gate(folders[job], number)
        for done in range(1, last + 1):
            if done > FIRST:
                made.append((job, done))
            gate.wait(done)

    turns = Turns(folders, ranks, first=FIRST, last=last, steps=steps, seed=seed)
    threads = [
        threading.Thread(target=rank, args=(job, number)) for job, count in enumerate(ranks) for number in range(count)
    ]
    for thread in threads:
        thread.start()
    while not turns.have_ended:
        turns.read()
    for thread in threads:
        thread.join()
    turns.close()
    return made


def test_each_job_makes_so_many_steps_and_the_order_is_drawn_anew_each_time(tmp_path: Path) -> None:
    made = run_jobs(tmp_path, [1, 1, 1], last=FIRST + 20, steps=[2] * 3)
    turns = [made[place : place + 2] for place in range(0, len(made), 2)]
    orders = []
    for number in range(10):
        steps = (FIRST + 2 * number + 1, FIRST + 2 * number + 2)
        of_all = turns[3 * number : 3 * number + 3]
        orders.append(tuple(job for [(job, _), _] in of_all))
        assert sorted(of_all) == [[(job, step) for step in steps] for job in range(3)]
    assert len(set(orders)) > 2


@pytest.mark.parametrize("steps", [1, 2, 3, 100])
def test_all_ranks_of_a_job_have_its_turn_and_all_steps_are_made(tmp_path: Path, steps: int) -> None:
    ranks, last = [1, 2, 4], FIRST + 5
    made = run_jobs(tmp_path, ranks, last=last, steps=[steps] * 3)
    expected = [
        (job, step) for job, count in enumerate(ranks) for step in range(FIRST + 1, last + 1) for _ in range(count)
    ]
    assert sorted(made) == expected
    # Nobody else makes a step within a turn.
    blocks = [(job, len(list(block))) for job, block in itertools.groupby(made, key=lambda one: one[0])]
    longest = {job: max(length for other, length in blocks if other == job) for job in range(len(ranks))}
    assert all(length <= 2 * min(steps, 5) * ranks[job] for job, length in longest.items())
    assert len(blocks) >= len(ranks)


def test_a_single_job_has_all_turns(tmp_path: Path) -> None:
    assert run_jobs(tmp_path, [1], last=FIRST + 3, steps=[1]) == [(0, 3), (0, 4), (0, 5)]


def test_turns_of_a_job_whose_steps_are_short_are_spread_among_those_of_the_others(tmp_path: Path) -> None:
    made = run_jobs(tmp_path, [1, 1], last=FIRST + 12, steps=[4, 1])
    assert sorted(made) == [(job, step) for job in (0, 1) for step in range(FIRST + 1, FIRST + 13)]
    turns = [(job, len(list(steps))) for job, steps in itertools.groupby(made, key=lambda one: one[0])]
    assert [steps for job, steps in turns if job == 0] == [4, 4, 4]
    before = [[job for job, _ in made[: made.index((0, first))]].count(1) for first in (3, 7, 11)]
    assert [count // 4 for count in before] == [0, 1, 2]  # one in each third of the other's


def test_another_round_has_another_order(tmp_path: Path) -> None:
    orders = set()
    for seed in range(4):
        (tmp_path / str(seed)).mkdir()
        orders.add(tuple(run_jobs(tmp_path / str(seed), [1] * 4, last=FIRST + 2, steps=[1] * 4, seed=seed)))
    assert len(orders) == 4
