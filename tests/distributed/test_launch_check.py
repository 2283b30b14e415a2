"""``fabric-run --check``: all ranks, the way between each two, and who has not come."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined] # documented, not in torch's __all__

from fabric_lite.check import _as_rank_0_finds, _rounds, _ways
from fabric_lite.errors import LaunchError
from fabric_lite.launch.cli import _is_rank, _read
from tests.distributed.launching import FABRIC_RUN, assert_nothing_left, fabric_run, run, started
from tests.distributed.test_launch_nodes import free_port


@pytest.mark.parametrize("world_size", [2, 3, 4, 16, 17, 20])
def test_each_rank_meets_each_once_and_one_at_a_time(world_size: int) -> None:
    rounds = list(_rounds(world_size))
    pairs = [pair for pairs in rounds for pair in pairs]
    assert sorted(pairs) == [(i, j) for i in range(world_size) for j in range(i + 1, world_size)]
    for pairs in rounds:
        assert len({rank for pair in pairs for rank in pair}) == 2 * len(pairs)
    assert (max(map(len, rounds)) == 1) == (world_size <= 16)


def test_what_rank_0_has_found_counts_on_every_rank() -> None:
    store, rounds = HashStore(), [[(0, 1)]]
    found = _as_rank_0_finds(store, "ways", 0, lambda: _ways(store, rounds), 1.0)
    for end in (0, 1):
        store.set(f"way {end} (0, 1)", "[0.5, 0.5]")  # too late
    assert found == [[0, 1, "said nothing more"]]
    assert _as_rank_0_finds(store, "ways", 1, lambda: _ways(store, rounds), 1.0) == found
    assert _ways(store, rounds) == [[0, 1, [0.5, 0.5]]]
    assert _as_rank_0_finds(store, "ways of another check", 1, list, 0.01) is None


def test_all_ranks_and_each_way_are_shown(tmp_path: Path) -> None:
    done = fabric_run("--check", "--devices", 3, cwd=tmp_path)
    assert done.returncode == 0, done
    first, head, *lines = done.stdout.splitlines()
    assert first.startswith("fabric-run --check: 3 ranks on 1 node, by torchelastic (fabric-run or torchrun)")
    assert head.split() == ["rank", "node", "host", "device", "process"]
    assert [line.split()[0] for line in lines[:3]] == ["0", "1", "2"]
    assert [line.split() for line in (lines[4], lines[8])] == [["rank", "1", "rank", "2"]] * 2
    assert [len(line.split()) for line in (lines[5], lines[6], lines[9], lines[10])] == [4, 3, 4, 3]
    assert lines[-1].startswith("fabric-run --check: all is well; the slowest way for 4 MB is between rank")
    assert_nothing_left(tmp_path)


def test_a_rank_that_does_not_come_is_named_by_all_that_do(tmp_path: Path) -> None:
    variables = [f"MASTER_PORT={free_port()}", "MASTER_ADDR=127.0.0.1", "WORLD_SIZE=3", "LOCAL_WORLD_SIZE=3"]
    check = [sys.executable, "-W", "ignore", "-m", "fabric_lite.check", "--limit", 10]
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(started("env", *variables, f"RANK={rank}", f"LOCAL_RANK={rank}", *check, cwd=tmp_path))
            for rank in (0, 2)
        ]
        outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    host = os.uname().nodename
    for _, said in outputs:
        assert "fabric-run --check: Rank 1 of 3 has not come within 10 s.\n" in said
        assert f"Given: there: rank 0 ({host}), rank 2 ({host})" in said


def test_a_node_that_does_not_come_is_named(tmp_path: Path) -> None:
    meeting = ["--num-nodes", 2, "--node-rank", 0, "--main-address", "127.0.0.1", "--main-port", free_port()]
    done = fabric_run("--check", "--hang-timeout", 1, *meeting, cwd=tmp_path)
    assert done.returncode == 1
    assert "fabric-run: Node 1 of 2 has not come within 1 s.\n" in done.stderr
    assert_nothing_left(tmp_path)


def test_node_0_that_does_not_come_is_named(tmp_path: Path) -> None:
    meeting = ["--num-nodes", 2, "--node-rank", 1, "--main-address", "127.0.0.1", "--main-port", free_port()]
    done = fabric_run("--check", "--hang-timeout", 1, *meeting, cwd=tmp_path)
    assert done.returncode == 1
    assert "fabric-run: Node 1 does not reach node 0.\n" in done.stderr
    assert_nothing_left(tmp_path)


def test_a_script_beside_check_is_an_error(tmp_path: Path) -> None:
    done = fabric_run("--check", "train.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "--check runs no script" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--strategy nonsense", "about one"),
        ("--precision 16-mixed", "about one"),
        ("--max-restarts 2", "about one"),
        ("--requeue", "about one"),
        ("--check-collectives", "about one"),
        ("-m", "about one"),
        ("--hang-timeout -5", "--hang-timeout must be a number of at least 0"),
        ("--hang-timeout 0", "--check waits for each rank for some time"),
        ("--devices none", "--devices is not a number"),
    ],
)
def test_an_option_that_means_nothing_is_an_error(words: str, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        _read(["--check", *words.split()])


def test_a_rank_to_check_reads_all_options(tmp_path: Path) -> None:
    done = run(["env", "RANK=0", "WORLD_SIZE=1", *FABRIC_RUN, "--check", "--strategy", "nonsense"], cwd=tmp_path)
    assert done.returncode == 2, done
    assert "--check and --strategy" in done.stderr


POD = {"RANK": "1", "WORLD_SIZE": "4", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "2"}


@pytest.mark.parametrize(
    ("environ", "is_rank"),
    [
        (POD, False),  # RANK numbers the pods
        ({**POD, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, True),  # of torchrun in the pod
        ({"RANK": "1", "WORLD_SIZE": "2"}, True),
        ({"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}, False),
        ({}, False),
    ],
)
def test_a_pod_is_a_node_to_check_and_no_rank(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], is_rank: bool
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert _is_rank(_read(["--check"])) == is_rank


def test_one_rank_has_nothing_to_connect(tmp_path: Path) -> None:
    done = fabric_run("--check", cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "fabric-run --check: one rank, nothing to connect")
