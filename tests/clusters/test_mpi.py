"""Ranks that mpirun has started, Open MPI's and MPICH's, on one machine; inside Slurm, see test_slurm.py."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.clusters.programs import PLACE
from tests.distributed.launching import FABRIC_RUN, run, started, write

OPEN_MPI = "mpirun.openmpi --allow-run-as-root --oversubscribe"
MPICH = "mpirun.mpich"


def words_of(mpirun: str) -> list[str]:
    words = mpirun.split()
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} not found: apt-get install openmpi-bin mpich")
    return words


@pytest.mark.parametrize("mpirun", [OPEN_MPI, MPICH])
def test_ranks_find_their_places(tmp_path: Path, mpirun: str) -> None:
    """OMPI_COMM_WORLD_NODE_RANK is 1 for the second of these, and both are on node 0."""
    done = run([*words_of(mpirun), "-n", 2, sys.executable, write(tmp_path, PLACE)], cwd=tmp_path)
    lines = [line.split() for line in sorted(done.stdout.splitlines())]
    assert [line[:7] for line in lines] == [[r, "2", r, "2", "0", "1", "127.0.0.1"] for r in "01"], done
    assert lines[0][7] == lines[1][7]


@pytest.mark.parametrize("mpirun", [OPEN_MPI, MPICH])
def test_two_jobs_at_once_have_two_ports(tmp_path: Path, mpirun: str) -> None:
    script = write(tmp_path, PLACE + "sys.stdin.read()")  # both run until both have spoken
    with contextlib.ExitStack() as stack:
        command = [*words_of(mpirun), "-n", 1, sys.executable, "-u", script]
        jobs = [stack.enter_context(started(*command, cwd=tmp_path)) for _ in range(2)]
        ports = {job.stdout.readline().split()[7] for job in jobs if job.stdout}
    assert len(ports) == 2


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)])
@pytest.mark.parametrize(("outer", "inner"), [(OPEN_MPI, MPICH), (MPICH, OPEN_MPI)])
def test_one_mpirun_inside_anothers_is_an_error(tmp_path: Path, outer: str, inner: str, sizes: tuple[int, int]) -> None:
    nested = [*words_of(inner), "-n", sizes[1], sys.executable, write(tmp_path, PLACE)]
    done = run([*words_of(outer), "-n", sizes[0], *nested], cwd=tmp_path)
    assert done.returncode != 0
    assert "LaunchError: Two MPIs have started this process, one inside the other" in done.stderr, done
    assert done.stdout == ""


MPI4PY = """
from mpi4py import MPI
from fabric_lite import Fabric
fabric = Fabric(accelerator="cpu")
print(MPI.COMM_WORLD.Get_size(), fabric.world_size)
"""


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="needs mpi4py: pip install mpi4py")
def test_an_mpi4py_of_another_mpi_is_an_error_and_one_of_the_same_is_left_alone(tmp_path: Path) -> None:
    """It has one MPI. Under the mpirun of the other it takes every rank for a job of its own."""
    script = write(tmp_path, MPI4PY)
    words = [sys.executable, "-W", "default", script]  # mpi4py warns
    done = [run([*words_of(mpirun), "-n", 2, *words], cwd=tmp_path) for mpirun in (OPEN_MPI, MPICH)]
    (right,) = [each for each in done if each.returncode == 0]
    (wrong,) = [each for each in done if each.returncode != 0]
    assert right.stdout.split() == ["2", "2"] * 2, right
    assert re.search(r"LaunchError: .*\n  Given: 1 by mpi4py \(.+\), and 2 started by", wrong.stderr), wrong


def test_check_connects_the_ranks(tmp_path: Path) -> None:
    done = run([*words_of(MPICH), "-n", 2, *FABRIC_RUN, "--check"], cwd=tmp_path)
    assert done.returncode == 0, done
    assert done.stdout.startswith("fabric-run --check: 2 ranks on 1 node, by PMI (mpirun or mpiexec)")
    assert "all is well" in done.stdout


@pytest.mark.parametrize("mpirun", [OPEN_MPI, MPICH])
def test_fabric_run_started_twice_on_a_node_is_an_error(tmp_path: Path, mpirun: str) -> None:
    done = run([*words_of(mpirun), "-n", 2, *FABRIC_RUN, "--devices", 1, write(tmp_path, PLACE)], cwd=tmp_path)
    assert done.returncode == 2, done
    assert "has started fabric-run 2 times on this node" in done.stderr
