"""What ``fabric-run`` does with the signals by which schedulers ask a run to leave, and with a job that hangs."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.distributed.launching import (
    ENVIRONMENT,
    FABRIC_RUN,
    assert_nothing_left,
    fabric_run,
    processes_in,
    run,
    started,
    wait_until,
    write,
)
from tests.distributed.test_launch_nodes import free_port

LEAVE_WHEN_ASKED = """
    import os, pathlib, signal, sys, time
    asked = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    signal.signal(signal.SIGUSR1, lambda number, _: asked.append(number))
    rank = os.environ["RANK"]
    pathlib.Path("ready" + rank).touch()
    while not asked:
        time.sleep(0.01)
    if rank == "1":
        # Longer than what a failure would leave it.
        while not os.path.exists("saved0"):
            time.sleep(0.01)
        time.sleep(2)
    pathlib.Path("saved" + rank).write_text(signal.Signals(asked[0]).name)
    sys.exit(75)
"""


def ready(folder: Path, ranks: int = 2) -> None:
    wait_until(lambda: all((folder / f"ready{rank}").exists() for rank in range(ranks)), "ranks are ready")


def signaled(script: Path, number: signal.Signals, *options: object, ranks: int = 2) -> tuple[int, str]:
    """Run a script on several ranks and signal ``fabric-run`` when they are ready; its exit code, and what it says."""
    command = [*FABRIC_RUN, "--accelerator", "cpu", "--devices", ranks, *options, script]
    with started(*command, cwd=script.parent) as process:
        ready(script.parent, ranks)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_ranks_that_are_asked_to_leave_save_and_the_job_ends_with_75(tmp_path: Path, number: signal.Signals) -> None:
    code, stderr = signaled(write(tmp_path, LEAVE_WHEN_ASKED), number, "--max-restarts", 3)
    assert code == 75, stderr
    assert stderr == "fabric-run: stopped for preemption; the ranks have saved their work.\n"
    assert [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)] == [number.name] * 2
    assert_nothing_left(tmp_path)


def test_a_rank_that_fails_after_another_has_left_for_preemption_is_a_failure(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, sys, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        dist.all_reduce(torch.ones(1))
        if dist.get_rank() == 1:
            sys.exit(75)
        dist.all_reduce(torch.ones(1))
        """,
    )
    done = fabric_run("--devices", 2, script, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("fabric-run: rank 0 failed: RuntimeError: ")
    assert "  Before it, rank 1 had left for preemption.\n" in done.stderr


def test_a_script_may_use_sigusr1_for_itself(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, pathlib, signal
        signal.signal(signal.SIGUSR1, lambda *_: pathlib.Path("noted" + os.environ["RANK"]).touch())
        pathlib.Path("ready" + os.environ["RANK"]).touch()
        signal.pause()
        """,
    )
    assert signaled(script, signal.SIGUSR1) == (0, "")
    assert all((tmp_path / f"noted{rank}").exists() for rank in (0, 1))


def test_a_rank_that_the_system_kills_after_sigusr1_is_a_failure(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, pathlib, signal, time
        rank = os.environ["RANK"]
        signal.signal(signal.SIGUSR1, lambda *_: pathlib.Path("noted" + rank).touch())
        pathlib.Path("ready" + rank).touch()
        while rank == "0" or not os.path.exists("noted1"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    code, stderr = signaled(script, signal.SIGUSR1, "--max-restarts", 1)
    assert code == 128 + signal.SIGKILL, stderr
    assert stderr.startswith("fabric-run: restart 1 of 1: rank 1 failed: killed by SIGKILL\n")
    assert "\nfabric-run: rank 1 failed: killed by SIGKILL\n" in stderr
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("is_elastic", [False, True])
def test_a_rank_that_the_system_kills_while_it_saves_is_a_failure(tmp_path: Path, is_elastic: bool) -> None:
    script = write(
        tmp_path,
        """
        import os, pathlib, signal, sys, time
        asked = []
        signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
        rank = os.environ["RANK"]
        pathlib.Path("ready" + rank).write_text(str(os.getpid()))
        while not asked:
            time.sleep(0.01)
        if rank == "0":
            sys.exit(75)
        while rank == "2" or os.path.exists("/proc/" + pathlib.Path("ready0").read_text()):
            time.sleep(0.01)
        time.sleep(0.5)  # for fabric-run to see it too
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"] if is_elastic else []
    code, stderr = signaled(script, signal.SIGTERM, *meeting, ranks=3)
    assert code == 128 + signal.SIGKILL, stderr
    assert stderr.startswith("fabric-run: rank 1 failed: killed by SIGKILL\n")
    assert "  Before it, rank 0 had left for preemption.\n" in stderr
    assert_nothing_left(tmp_path)


def test_ranks_that_do_not_listen_die_of_sigusr1_which_is_no_failure_of_theirs(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, pathlib, signal
        pathlib.Path("ready" + os.environ["RANK"]).touch()
        signal.pause()
        """,
    )
    assert signaled(script, signal.SIGUSR1) == (128 + signal.SIGUSR1, "fabric-run: ended by SIGUSR1.\n")


def slurm(folder: Path) -> list[str]:
    """An environment of Slurm's, in which a program takes the place of scontrol, which writes down how it is called.

    Slurm itself is not installed where the tests run.
    """
    programs = folder / "programs"
    programs.mkdir()
    path = write(programs, f'#!/bin/sh\necho "$@" >> {folder}/requeued\n', "scontrol")
    path.chmod(0o755)
    return ["env", "SLURM_JOB_ID=123", f"PATH={programs}:{ENVIRONMENT['PATH']}"]


@pytest.mark.parametrize("nodes", [1, 2])
def test_requeue_gives_the_job_back_to_slurm_once(tmp_path: Path, nodes: int) -> None:
    script = write(tmp_path, LEAVE_WHEN_ASKED)
    command = [*slurm(tmp_path), *FABRIC_RUN, "--accelerator", "cpu", "--requeue"]
    if nodes == 1:
        with started(*command, "--devices", 2, script, cwd=tmp_path) as process:
            ready(tmp_path)
            process.send_signal(signal.SIGUSR1)
            outputs = [process.communicate(timeout=60)]
        codes = [process.returncode]
    else:
        meeting = ["--num-nodes", 2, "--main-address", "127.0.0.1", "--main-port", free_port(), "--node-rank"]
        both = [[*command, *meeting, node, script] for node in (0, 1)]
        with started(*both[0], cwd=tmp_path) as first, started(*both[1], cwd=tmp_path) as second:
            ready(tmp_path)
            for process in (first, second):
                process.send_signal(signal.SIGUSR1)
            outputs = [process.communicate(timeout=60) for process in (first, second)]
        codes = [first.returncode, second.returncode]
    assert codes == [75] * nodes, outputs
    assert (tmp_path / "requeued").read_text() == "requeue 123\n"
    assert ["requeueing Slurm job 123" in stderr for _, stderr in outputs] == [True, False][:nodes]
    assert all("stopped for preemption" in stderr for _, stderr in outputs)


@pytest.mark.parametrize("is_early", [True, False])
def test_a_signal_before_the_ranks_listen_requeues_too(tmp_path: Path, is_early: bool) -> None:
    script = write(tmp_path, "import pathlib, signal; pathlib.Path('ready0').touch(); signal.pause()")
    command = [*slurm(tmp_path), *FABRIC_RUN, "--accelerator", "cpu", "--requeue", script]
    with started(*command, cwd=tmp_path) as process:
        if is_early:
            wait_until(lambda: len(processes_in(tmp_path)) > 1, "the server has been started")
        else:
            ready(tmp_path, ranks=1)
        process.send_signal(signal.SIGUSR1)
        _, stderr = process.communicate(timeout=60)
    # On a busy machine the early signal may come after the start.
    assert process.returncode in ((75, 128 + signal.SIGUSR1) if is_early else (128 + signal.SIGUSR1,)), stderr
    assert (tmp_path / "requeued").read_text() == "requeue 123\n"


def test_a_signal_before_the_ranks_of_several_nodes_listen_requeues_too(tmp_path: Path) -> None:
    source = """
    import os, pathlib, signal
    pathlib.Path("ready" + os.environ["RANK"]).touch()
    signal.pause()
    """
    meeting = ["--num-nodes", 2, "--main-address", "127.0.0.1", "--main-port", free_port(), "--node-rank"]
    command = [*slurm(tmp_path), *FABRIC_RUN, "--accelerator", "cpu", "--devices", 2, "--requeue", "--max-restarts", 1]
    script = write(tmp_path, source)
    both = [[*command, *meeting, node, script] for node in (0, 1)]
    with started(*both[0], cwd=tmp_path) as first, started(*both[1], cwd=tmp_path) as second:
        ready(tmp_path, ranks=4)
        for process in (first, second):
            process.send_signal(signal.SIGUSR1)
        outputs = [process.communicate(timeout=60)[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [128 + signal.SIGUSR1] * 2, outputs
    assert [said.splitlines()[0] for said in outputs] == ["fabric-run: ended by SIGUSR1."] * 2
    assert ["restart" in said or "failed" in said for said in outputs] == [False, False], outputs
    assert (tmp_path / "requeued").read_text() == "requeue 123\n"
    assert_nothing_left(tmp_path)


def test_nothing_is_requeued_that_has_ended_well_or_has_failed(tmp_path: Path) -> None:
    environment = slurm(tmp_path)
    for code, how in ((0, "sys.exit(0)"), (3, "sys.exit(3)"), (138, "os.kill(os.getpid(), signal.SIGUSR1)")):
        script = write(tmp_path, f"import os, signal, sys; {how}")
        done = run([*environment, *FABRIC_RUN, "--accelerator", "cpu", "--requeue", script], cwd=tmp_path)
        assert done.returncode == code, done.stderr
    assert not (tmp_path / "requeued").exists()


def test_requeue_needs_slurm(tmp_path: Path) -> None:
    assert "SLURM_JOB_ID" not in os.environ
    done = fabric_run("--requeue", write(tmp_path, "print('never')"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "no job of Slurm's" in done.stderr
    assert "Try:" in done.stderr


def test_a_rank_that_finds_the_job_hanging_ends_it_stopped_ranks_included(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, pathlib, signal, threading, time
        from fabric_lite.run_config import hang_reporter
        pathlib.Path("ready" + os.environ["RANK"]).write_text(str(os.getpid()))
        def report():
            while not os.path.exists("stopped"):
                time.sleep(0.01)
            hang_reporter()(["fabric-run: rank 1 does not respond", "  rank 0 waits"])
        if os.environ["RANK"] == "0":
            threading.Thread(target=report, daemon=True).start()
        while True:
            signal.pause()
        """,
    )
    with started(*FABRIC_RUN, "--accelerator", "cpu", "--devices", 2, script, cwd=tmp_path) as process:
        ready(tmp_path)
        wait_until(lambda: (tmp_path / "ready1").read_text().isdigit(), "rank 1 has told its id")
        os.kill(int((tmp_path / "ready1").read_text()), signal.SIGSTOP)
        (tmp_path / "stopped").touch()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.splitlines()[:2] == ["fabric-run: rank 1 does not respond", "  rank 0 waits"]
    assert len(stderr.splitlines()) == 3
    assert_nothing_left(tmp_path)


def test_a_rank_that_is_stuck_in_a_collective_ends_by_a_signal_that_comes_again(tmp_path: Path) -> None:
    source = """
    import pathlib, signal
    import torch
    from fabric_lite import Fabric

    fabric = Fabric(accelerator="cpu")
    model = torch.nn.Linear(4, 4)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not fabric.should_stop
    pathlib.Path(f"ready{fabric.global_rank}").touch()
    if fabric.global_rank == 0:
        fabric.barrier()
    signal.pause()
    """
    script = write(tmp_path, source)
    common = ["env", "WORLD_SIZE=2", "LOCAL_WORLD_SIZE=2", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={free_port()}"]
    both = [[*common, f"RANK={rank}", f"LOCAL_RANK={rank}", sys.executable, script] for rank in (0, 1)]
    with started(*both[0], cwd=tmp_path) as stuck, started(*both[1], cwd=tmp_path):
        ready(tmp_path)

        def ends() -> bool:
            stuck.terminate()
            return stuck.poll() is not None

        wait_until(ends, "the rank ends", limit_seconds=20.0)
    assert stuck.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM)
