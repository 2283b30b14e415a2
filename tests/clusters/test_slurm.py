"""Jobs of a real Slurm on two nodes: who is where, what only looks like a rank, and runs that are interrupted."""

from __future__ import annotations

import random
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from fabric_lite.topology.variables import expand_hosts
from tests.clusters.programs import PLACE, SURVIVE, SURVIVE_STEPS, TRAIN, trained
from tests.clusters.slurm import Slurm
from tests.distributed.launching import FABRIC_RUN, assert_nothing_left, wait_until, write
from tests.test_docs import DOCS
from tests.test_readme import blocks

ALONE = "0 1 0 1 0 1 None None"
PYTHON = shlex.quote(sys.executable)


def places(said: str) -> list[list[str]]:
    """Of each rank: rank, world size, local rank, local world size, node rank, number of nodes; sorted by rank."""
    return sorted(line.split()[:6] for line in said.splitlines())


@pytest.mark.parametrize(
    "nodes", ["n[1-2,5]", "login,n[01-03]", "a[1-2]b[3,5]", "n[098-101]", "x[1,3-4]y[07-08],z", "single"]
)
def test_lists_of_nodes_are_expanded_as_slurm_does(slurm: Slurm, nodes: str) -> None:
    assert expand_hosts(nodes) == slurm.run("scontrol", "show", "hostnames", nodes).stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("srun -N2 --ntasks-per-node=1", ["0 2 0 1 0 2", "1 2 0 1 1 2"]),
        ("srun -N2 -n3 -m plane=2", ["0 3 0 2 0 2", "1 3 1 2 0 2", "2 3 0 1 1 2"]),
        ("srun -n2", ["0 2 0 2 0 1", "1 2 1 2 0 1"]),  # without SLURM_NTASKS_PER_NODE
        ("salloc -Q -N2 -n4 srun -N1 -n2", ["0 2 0 2 0 1", "1 2 1 2 0 1"]),  # a step smaller than its job
        ("salloc -Q -N2 -n2 srun", ["0 2 0 1 0 2", "1 2 0 1 1 2"]),  # in a job that is called "interactive"
    ],
)
def test_tasks_find_their_places(slurm: Slurm, tmp_path: Path, words: str, expected: list[str]) -> None:
    done = slurm.run(*words.split(), sys.executable, write(tmp_path, PLACE), cwd=tmp_path)
    assert places(done.stdout) == [line.split() for line in expected], done
    assert {line.split()[6] for line in done.stdout.splitlines()} == {"127.0.0.1"}
    assert len({line.split()[7] for line in done.stdout.splitlines()}) == 1


def test_a_step_that_runs_a_shell_script_is_one(slurm: Slurm, tmp_path: Path) -> None:
    shell = write(tmp_path, f"{PYTHON} {write(tmp_path, PLACE)}", "run.sh")
    done = slurm.run("srun", "-N2", "--ntasks-per-node=1", "bash", shell, cwd=tmp_path)
    assert places(done.stdout) == [["0", "2", "0", "1", "0", "2"], ["1", "2", "0", "1", "1", "2"]], done


@pytest.mark.parametrize("start", ["salloc -Q -N2 -n2 bash -c", "srun --pty bash -c", "srun --pty sh -c"])
def test_a_persons_shell_is_no_rank(slurm: Slurm, tmp_path: Path, start: str) -> None:
    inner = f"{start} {shlex.quote(f'{PYTHON} {write(tmp_path, PLACE)}')}"
    done = slurm.run("script", "--quiet", "--return", "--command", inner, "/dev/null", cwd=tmp_path)
    assert ALONE in done.stdout, done


def in_terminal(slurm: Slurm, folder: Path, command: str) -> str:
    """What a command says in a terminal."""
    done = slurm.run("script", "--quiet", "--return", "--command", command, "/dev/null", cwd=folder)
    return done.stdout


@pytest.mark.parametrize("nodes", ["-n2", "-N2 -n2"])
def test_a_persons_shell_that_is_one_of_several_tasks_is_told_to_use_srun(
    slurm: Slurm, tmp_path: Path, nodes: str
) -> None:
    script = write(tmp_path, PLACE)
    typed = f"{PYTHON} {script}; srun --overlap {PYTHON} {script}; srun --overlap bash -c '{PYTHON} {script}'"
    said = in_terminal(slurm, tmp_path, f"srun {nodes} --overlap --pty bash -ic {shlex.quote(typed)}")
    assert said.count("LaunchError: This process is of a terminal's shell") == 1, said
    assert "srun --overlap python script.py" in said
    # The steps that were started in it inherit SLURM_PTY_PORT.
    assert len(re.findall(r"^[01] 2 ", said, re.MULTILINE)) == 4, said


def test_a_script_that_is_one_of_several_tasks_is_a_rank_also_in_a_terminal(slurm: Slurm, tmp_path: Path) -> None:
    command = f"{PYTHON} {write(tmp_path, PLACE)}"
    for task in (command, f"bash -c {shlex.quote(f'{command}; true')}"):
        said = in_terminal(slurm, tmp_path, f"srun -n2 --pty {task}")
        assert "0 2 0 2 0 1 " in said, said


@pytest.mark.parametrize("options", ["-N2 -n2", "-N2", "-n2"])  # of -N2 alone Slurm tells no number of tasks
def test_the_batch_scripts_own_shell_is_told_to_use_srun(slurm: Slurm, tmp_path: Path, options: str) -> None:
    batch = write(tmp_path, f"#!/bin/sh\n{PYTHON} {write(tmp_path, PLACE)} 2>&1", "batch.sh")
    job = slurm.submit(batch, *options.split())
    assert slurm.finish(job) == "FAILED"
    said = (tmp_path / f"job-{job}.out").read_text()
    assert said.startswith("LaunchError: This process is the batch script's own shell"), said
    assert "srun python script.py" in said


def test_a_main_address_that_nobody_knows_is_named(slurm: Slurm, tmp_path: Path) -> None:
    words = ["env", "MASTER_ADDR=nobody.invalid", "srun", "-N2", "-n2", sys.executable, write(tmp_path, PLACE)]
    done = slurm.run(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("LaunchError: The host of rank 0, 'nobody.invalid', has no address") == 2, done.stderr


@pytest.mark.parametrize("mpirun", ["mpirun.openmpi --allow-run-as-root --map-by ppr:2:node", "mpirun.mpich -ppn 2"])
def test_mpirun_inside_a_job_starts_ranks_of_its_own(slurm: Slurm, tmp_path: Path, mpirun: str) -> None:
    """They have the SLURM_PROCID of mpirun's daemon on their node, of which there are two."""
    if slurm.run("which", mpirun.split()[0]).returncode:
        pytest.skip(f"{mpirun.split()[0]} not found")
    batch = write(tmp_path, f"#!/bin/sh\n{mpirun} -n 4 {PYTHON} {write(tmp_path, PLACE)}", "batch.sh")
    job = slurm.submit(batch, "-N2", "--ntasks-per-node=2")
    assert slurm.finish(job) == "COMPLETED"
    said = (tmp_path / f"job-{job}.out").read_text()
    assert places(said) == [[str(rank), "4", str(rank % 2), "2", str(rank // 2), "2"] for rank in range(4)], said
    assert len({line.split()[7] for line in said.splitlines()}) == 1


def test_what_the_script_wants_and_what_srun_has_started_are_both_shown(slurm: Slurm, tmp_path: Path) -> None:
    script = write(tmp_path, "from fabric_lite import Fabric\nFabric(accelerator='cpu', devices=4, num_nodes=2)")
    done = slurm.run("srun", "-N2", "--ntasks-per-node=1", sys.executable, script, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("devices=4 on 2 nodes, so 8 processes, and 2 started by Slurm (srun) on 2 nodes") == 2
    assert "srun --nodes=2 --ntasks-per-node=4" in done.stderr


def test_fabric_run_started_once_on_each_node_makes_one_job(slurm: Slurm, tmp_path: Path) -> None:
    words = ["srun", "-N2", "--ntasks-per-node=1", *FABRIC_RUN, "--devices", 1, write(tmp_path, TRAIN)]
    done = slurm.run(*words, cwd=tmp_path, timeout_seconds=120)
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} of 2: {trained()}" for rank in (0, 1)], done
    assert "fabric-run: from Slurm (srun): --num-nodes 2 --node-rank 1 --main-address 127.0.0.1" in done.stderr


def test_fabric_run_started_twice_on_a_node_is_an_error(slurm: Slurm, tmp_path: Path) -> None:
    done = slurm.run("srun", "-n2", *FABRIC_RUN, "--devices", 1, write(tmp_path, TRAIN), cwd=tmp_path)
    assert done.returncode == 2
    assert "Slurm (srun) has started fabric-run 2 times on this node" in done.stderr


def test_check_connects_the_tasks_of_a_step(slurm: Slurm, tmp_path: Path) -> None:
    done = slurm.run("srun", "-N2", "-n2", *FABRIC_RUN, "--check", cwd=tmp_path, timeout_seconds=120)
    assert done.returncode == 0, done
    assert done.stdout.startswith("fabric-run --check: 2 ranks on 2 nodes, by Slurm (srun), main address 127.0.0.1:")
    assert "all is well" in done.stdout


# What the guide tells to submit: asked to leave, the ranks save and exit with 75.
[BATCH] = blocks((DOCS / "starting" / "slurm.md").read_text(encoding="utf-8"), "sh")


def survive(slurm: Slurm, folder: Path, *options: object, seconds: float = 0.02) -> str:
    """Submit a run of two ranks on two nodes; return its job."""
    folder.mkdir()
    script = write(folder, SURVIVE, "survive.py")
    text = BATCH.replace("python train.py", f"{PYTHON} {script} {folder} {seconds}")
    batch = write(folder, text.replace("code=$?", 'code=$?; echo "exit code $code"'), "batch.sh")
    return slurm.submit(batch, *options)


def progress(folder: Path) -> int:
    path = folder / "progress"
    return int((path.read_text() if path.exists() else "") or "0")


def weights(folder: Path) -> list[torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


def assert_as_undisturbed(folder: Path, undisturbed: list[torch.Tensor]) -> None:
    assert all(torch.equal(mine, other) for mine, other in zip(weights(folder), undisturbed, strict=True))


def begun_at(slurm_output: str) -> list[int]:
    return [int(line.split()[-1]) for line in slurm_output.splitlines() if line.startswith("begins at step")]


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """The weights of a run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    job = survive(slurm, folder)
    assert slurm.finish(job) == "COMPLETED", (folder / f"job-{job}.out").read_text()
    return weights(folder)


def test_a_signal_to_the_job_lets_all_ranks_save_and_the_job_goes_on_exactly(
    slurm: Slurm, tmp_path: Path, undisturbed: list[torch.Tensor]
) -> None:
    folder = tmp_path / "run"
    job = survive(slurm, folder)
    wait_until(lambda: progress(folder) > 20, "it trains")
    slurm.run("scancel", "--signal=USR1", job)
    assert slurm.finish(job) == "COMPLETED"
    said = (folder / f"job-{job}.out").read_text()
    assert "exit code 75" in said, said
    first, then = begun_at(said)
    assert (first, 20 < then < SURVIVE_STEPS) == (0, True)
    assert_as_undisturbed(folder, undisturbed)
    assert_nothing_left(folder)


@pytest.mark.parametrize("trials", [1, pytest.param(20, marks=[pytest.mark.full, pytest.mark.timeout(3600)])])
def test_a_run_that_another_job_pushes_aside_ends_with_the_weights_of_the_undisturbed_one(
    slurm: Slurm, tmp_path: Path, undisturbed: list[torch.Tensor], trials: int
) -> None:
    moments = random.Random(trials)
    for trial in range(trials):
        folder, moment = tmp_path / str(trial), moments.randrange(10, SURVIVE_STEPS * 2 // 3)
        job = survive(slurm, folder, "--partition=low")
        wait_until(lambda: progress(folder) > moment, "it trains")  # noqa: B023
        other = slurm.submit(write(folder, "#!/bin/sh\ntrue", "other.sh"), "-N2", "--exclusive", "--partition=debug")
        assert slurm.finish(other) == "COMPLETED"
        assert slurm.finish(job) == "COMPLETED"
        said = (folder / f"job-{job}.out").read_text()
        first, then = begun_at(said)
        assert (first, moment < then < SURVIVE_STEPS) == (0, True), said
        assert_as_undisturbed(folder, undisturbed)
        assert_nothing_left(folder)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_job_that_is_warned_of_its_time_limit_saves_and_goes_on_exactly(
    slurm: Slurm, tmp_path: Path, undisturbed: list[torch.Tensor]
) -> None:
    """The limit is a minute, of which the steps alone take 60 s; Slurm warns up to half a minute early."""
    folder = tmp_path / "run"
    job = survive(slurm, folder, "--time=1", "--signal=USR1@10", seconds=0.2)
    assert slurm.finish(job, limit_seconds=700) == "COMPLETED"
    said = (folder / f"job-{job}.out").read_text()
    codes = re.findall(r"exit code (\d+)", said)
    assert codes[-1] == "0", said
    assert "75" in codes, said
    assert set(codes) <= {"75", "138", "0"}, said  # 138: before they listened
    assert_as_undisturbed(folder, undisturbed)
