"""The pool of warm ranks: it ends with its block, and a failure is told once."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

from fabric_lite.testing import RankError, RankPool


def test_the_ranks_end_with_the_block() -> None:
    with RankPool() as pool:
        (number,) = pool.run(os.getpid, ranks=1)
        assert pool.run(os.getpid, ranks=1) == [number], "the rank stays warm"
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_a_rank_that_died_between_two_calls_is_an_error_of_that_rank() -> None:
    with RankPool() as pool:
        (number,) = pool.run(os.getpid, ranks=1)
        os.kill(number, signal.SIGKILL)
        with pytest.raises(RankError, match="exit code -9") as error:
            pool.run(os.getpid, ranks=1)
        assert error.value.rank == 0
        assert pool.run(os.getpid, ranks=1) != [number]


ABANDONED = """
import multiprocessing, os, pickle, sys
from fabric_lite.testing import _serve
ours, theirs = multiprocessing.Pipe()
ours.send_bytes(pickle.dumps(({function}, (), {{}})))
ours.close()
_serve(0, 1, theirs, "", 10.0, sys.path)
"""


@pytest.mark.parametrize("function", ["os.getpid", "os.getpgid"])  # one gives a value, one an error
def test_a_rank_that_nobody_listens_to_any_more_ends_quietly(function: str) -> None:
    code = ABANDONED.format(function=function)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


KILLED = """
import os, signal, sys
from fabric_lite.testing import RankPool
pool = RankPool()
print(pool.run(os.getpid, ranks=1)[0], flush=True)
pool.run(signal.pause, ranks=1)
"""


def test_a_rank_that_works_for_ever_ends_with_a_pool_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        rank = int(process.stdout.readline())
        watched = os.pidfd_open(rank)
        process.kill()
        assert select.select([watched], [], [], 60)[0], "the rank lives on"
        os.close(watched)
