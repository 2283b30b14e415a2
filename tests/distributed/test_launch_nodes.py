"""Two nodes, played by two ``fabric-run`` on one machine."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.distributed.launching import FABRIC_RUN, assert_nothing_left, kill, started, write

SCRIPT = """
    import os, sys, torch, torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    if sys.argv[1:] == ["always"] or sys.argv[1:] == ["once"] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if dist.get_rank() == 1:
            sys.exit(7)
        dist.barrier()
    # The job's name, as given or torchelastic's, behind the prefix by which a rank's own programs know it.
    assert os.environ["TORCHELASTIC_RUN_ID"] in ("fabric_run_job", "fabric_run_none")
    print(int(total), os.environ["GROUP_RANK"], os.environ["RANK"], os.environ["LOCAL_RANK"])
    dist.barrier()
    dist.destroy_process_group()
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


STOPPED = """
    import os, pathlib, signal, time
    if os.environ["RANK"] == "1":
        pathlib.Path("stopped").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    while not os.path.exists("stopped"):
        time.sleep(0.01)
    raise ValueError("boom")
"""


def run_two(
    tmp_path: Path, backend: str, *words: object, devices: int = 1, source: str = SCRIPT
) -> list[tuple[int, str, str]]:
    """Run the script on two nodes; return exit code, stdout and stderr of each."""
    port = free_port()
    script = write(tmp_path, source)
    both = [*FABRIC_RUN, "--accelerator", "cpu", "--num-nodes", 2, "--devices", devices]
    commands = []
    for node in (0, 1):
        meeting = ["--main-address", "127.0.0.1", "--main-port", port, "--node-rank", node]
        if backend == "c10d":
            meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job"]
        options = ["--max-restarts", 1, script, "once"] if "once" in words else [script, *words]
        commands.append([*both, *meeting, *options])
    with started(*commands[0], cwd=tmp_path) as first, started(*commands[1], cwd=tmp_path) as second:
        outputs = [process.communicate(timeout=60) for process in (first, second)]
    return [(process.returncode, *output) for process, output in zip((first, second), outputs, strict=True)]


def test_two_nodes_make_one_job(tmp_path: Path) -> None:
    results = run_two(tmp_path, "static", devices=2)
    assert [code for code, _, _ in results] == [0, 0], results
    lines = sorted(line for _, stdout, _ in results for line in stdout.splitlines())
    assert lines == ["4 0 0 0", "4 0 1 1", "4 1 2 0", "4 1 3 1"]
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("backend", ["static", "c10d"])
def test_all_nodes_restart_together(tmp_path: Path, backend: str) -> None:
    results = run_two(tmp_path, backend, "once")
    assert [code for code, _, _ in results] == [0, 0], results
    assert sorted(line for _, stdout, _ in results for line in stdout.splitlines()) == ["2 0 0 0", "2 1 1 0"]
    assert_nothing_left(tmp_path)


def test_failure_on_a_node_is_its_exit_code(tmp_path: Path) -> None:
    results = run_two(tmp_path, "static", "always")
    assert sorted(code for code, _, _ in results) == [1, 7], results
    (stderr,) = (stderr for code, _, stderr in results if code == 7)
    assert stderr.startswith("fabric-run: rank 1 failed: exit code 7\n")
    (other,) = (stderr for code, _, stderr in results if code == 1)
    assert other == "fabric-run: ended because on node 1 rank 1 failed: exit code 7\n"
    assert_nothing_left(tmp_path)


def test_a_failure_on_a_node_ends_ranks_of_others_that_do_not_notice(tmp_path: Path) -> None:
    (code, _, said), (other_code, _, other_said) = run_two(tmp_path, "static", source=STOPPED)
    assert (code, other_code) == (1, 1)
    assert said.startswith("fabric-run: rank 0 failed: ValueError: boom\n")
    assert other_said == "fabric-run: ended because on node 0 rank 0 failed: ValueError: boom\n"
    assert_nothing_left(tmp_path)


# A program of its own: torchelastic waits so long for the other nodes at the end, and 300 s is much for a test.
BRIEF_EXIT = """
    import sys
    from fabric_lite.launch import cli, elastic

    class Brief(elastic._Agent):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._exit_barrier_timeout = 0.5

    elastic._Agent = Brief
    sys.exit(cli.main(sys.argv[1:]))
"""
LONGER_ON_NODE_1 = """
    import os, socket, sys, time
    if os.environ["RANK"] == "1":
        host, port = sys.argv[1].split(":")
        while True:  # until node 0 has left, and then as long as several looks take
            with socket.socket() as client:
                if client.connect_ex((host, int(port))):
                    break
            time.sleep(0.05)
        time.sleep(1)
        print("done")
"""


def test_a_node_that_trains_longer_than_node_0_is_left_in_peace(tmp_path: Path) -> None:
    port = free_port()
    script, launcher = write(tmp_path, LONGER_ON_NODE_1), write(tmp_path, BRIEF_EXIT, "brief.py")
    meeting = ["--num-nodes", 2, "--main-address", "127.0.0.1", "--main-port", port, "--node-rank"]
    both = [
        [sys.executable, launcher, "--accelerator", "cpu", *meeting, node, script, f"127.0.0.1:{port}"]
        for node in (0, 1)
    ]
    with started(*both[0], cwd=tmp_path) as first, started(*both[1], cwd=tmp_path) as second:
        outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert outputs[1][0] == "done\n"
    assert_nothing_left(tmp_path)


def test_a_node_that_waits_for_another_after_a_failure_ends_by_ctrl_c(tmp_path: Path) -> None:
    source = """
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    print("ready", flush=True)
    while True:
        dist.all_reduce(torch.ones(1))
    """
    script = write(tmp_path, source)
    meeting = ["--num-nodes", 2, "--main-address", "127.0.0.1", "--main-port", free_port(), "--node-rank"]
    command = [*FABRIC_RUN, "--accelerator", "cpu", "--max-restarts", 1, *meeting]
    with started(*command, 0, script, cwd=tmp_path) as first, started(*command, 1, script, cwd=tmp_path) as second:
        assert [process.stdout and process.stdout.readline() for process in (first, second)] == ["ready\n"] * 2
        kill(second.pid)
        assert first.stderr is not None
        assert first.stderr.readline().startswith("fabric-run: restart 1 of 1: rank 0 failed")
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=30)
    assert first.returncode in (130, -signal.SIGINT)
    assert_nothing_left(tmp_path)
