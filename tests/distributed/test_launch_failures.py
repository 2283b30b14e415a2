"""What ``fabric-run`` says when a rank fails, and that nothing outlives it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.distributed.launching import (
    FABRIC_RUN,
    assert_nothing_left,
    fabric_run,
    kill,
    processes_in,
    run,
    started,
    wait_until,
    write,
)

WAITING_RANKS_WITH_WORKERS = """
    import os, pathlib, sys, torch
    class Numbers(torch.utils.data.Dataset):
        def __len__(self): return 1000
        def __getitem__(self, index): return index
    if __name__ == "__main__":
        loader = torch.utils.data.DataLoader(Numbers(), num_workers=2)
        batches = iter(loader)
        next(batches)
        pathlib.Path("ready" + os.environ["RANK"]).write_text(str(os.getpid()))
        import signal
        while True:
            signal.pause()
"""


def report_of(stderr: str) -> list[str]:
    """The lines of the report, which is the last thing on stderr."""
    lines = stderr.splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.startswith("fabric-run: rank"))
    return lines[first:]


@pytest.mark.parametrize(
    ("action", "code", "cause"),
    [
        ("sys.exit(3)", 3, "exit code 3"),
        ("raise ValueError('bad value')", 1, "ValueError: bad value"),
        ("os.kill(os.getpid(), 9)", 137, "killed by SIGKILL"),
        ("os._exit(5)", 5, "exit code 5"),
    ],
)
def test_first_failing_rank_is_the_report(tmp_path: Path, action: str, code: int, cause: str) -> None:
    script = write(
        tmp_path,
        f"""
        import os, sys, torch.distributed as dist
        def fail():
            {action}
        dist.init_process_group("gloo")
        dist.barrier()
        if dist.get_rank() == 1:
            fail()
        dist.barrier()
        """,
    )
    done = fabric_run("--devices", 2, script, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    report = report_of(done.stderr)
    assert report == done.stderr.splitlines(), "nothing else is on the terminal"
    assert report[0] == f"fabric-run: rank 1 failed: {cause}"
    assert len(report) <= 10
    if "raise" in action:
        assert report[1:3] == [f"  at {script}:4, in fail", f"    {action}"]
        log = Path(report[3].partition("is in ")[2].partition(",")[0])
        assert "ValueError: bad value" in log.read_text()
        assert "launch/rank.py" not in log.read_text()
        shutil.rmtree(log.parent)
    assert_nothing_left(tmp_path)


LEAVE_RANK_1_IN_A_COLLECTIVE = """
    import os, sys, torch, torch.distributed as dist
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    if dist.get_rank() == 1:
        {action}
    dist.all_reduce(torch.ones(1))
"""


@pytest.mark.parametrize(("action", "code"), [("sys.exit(3)", 3), ("sys.exit('no such file')", 1)])
def test_rank_that_exits_is_blamed_and_not_those_that_wait_for_it(tmp_path: Path, action: str, code: int) -> None:
    script = write(tmp_path, LEAVE_RANK_1_IN_A_COLLECTIVE.format(action=action))
    done = fabric_run("--devices", 2, script, cwd=tmp_path)
    report = report_of(done.stderr)
    assert done.returncode == code
    assert report[0] == f"fabric-run: rank 1 failed: {'exit code 3' if code == 3 else 'no such file'}"
    assert report[1:3] == [f"  at {script}:6, in <module>", f"    {action}"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("action", ["sys.exit(0)", "os._exit(0)"])
def test_rank_that_leaves_with_0_is_named_beside_the_error_of_those_that_wait_for_it(
    tmp_path: Path, action: str
) -> None:
    script = write(tmp_path, LEAVE_RANK_1_IN_A_COLLECTIVE.format(action=action))
    done = fabric_run("--devices", 2, script, cwd=tmp_path)
    assert done.returncode not in (0, 124), done.stderr
    report = report_of(done.stderr)
    assert report[0].startswith("fabric-run: rank 0 failed: RuntimeError: ")
    where = f", at {script}:6, in <module>" if action == "sys.exit(0)" else ""
    assert report[-2] == f"  Before it, rank 1 had left with exit code 0{where}."


def test_all_ranks_that_exit_with_words_print_them_once(tmp_path: Path) -> None:
    done = fabric_run("--devices", 2, write(tmp_path, "import sys; sys.exit('no such file')"))
    assert done.returncode == 1
    assert re.match(r"fabric-run: rank [01] failed: no such file\n", done.stderr)
    assert done.stderr.count("no such file") == 2, "the words, and the line that says them"


@pytest.mark.parametrize(
    ("action", "code"), [("raise KeyError('of the child')", 1), ("sys.exit(3)", 3), ("sys.exit('of the child')", 1)]
)
def test_forked_child_of_a_rank_ends_for_itself(tmp_path: Path, action: str, code: int) -> None:
    script = write(
        tmp_path,
        f"""
        import os, sys, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        dist.all_reduce(torch.ones(1))
        if dist.get_rank() == 0:
            child = os.fork()
            if child == 0:
                {action}
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        dist.all_reduce(torch.ones(1))
        dist.destroy_process_group()
        """,
    )
    done = fabric_run("--devices", 2, script, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{code}\n"), done.stderr
    assert "launch/rank.py" not in done.stderr
    assert_nothing_left(tmp_path)


def test_all_ranks_failing_alike_make_one_report(tmp_path: Path) -> None:
    script = write(tmp_path, "raise ValueError('x\\n' * 40)")
    done = fabric_run("--devices", 2, script)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(report_of(done.stderr)) == len(done.stderr.splitlines()) <= 10


def test_syntax_error_names_the_line(tmp_path: Path) -> None:
    done = fabric_run("--devices", 1, write(tmp_path, "x = 1\nx ="))
    assert done.returncode == 1
    assert "line 2" in done.stderr


def test_exception_inside_a_package_names_the_users_line(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "import torch\ndef train():\n    torch.ones(2).view(3)\n    torch.nn.Linear(2, 2)(torch.ones(3))\ntrain()",
    )
    done = fabric_run("--devices", 1, script)
    assert f"  at {script}:3, in train" in report_of(done.stderr)


def test_record_decorator_writes_its_error_file(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import atexit, os, pathlib
        from torch.distributed.elastic.multiprocessing.errors import record
        path = pathlib.Path(os.environ["TORCHELASTIC_ERROR_FILE"])
        atexit.register(lambda: print(path.read_text()))
        @record
        def main():
            raise ValueError("recorded")
        main()
        """,
    )
    done = fabric_run("--devices", 1, script)
    assert "ValueError: recorded" in done.stdout
    assert report_of(done.stderr)[0].endswith("failed: ValueError: recorded")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_the_ranks(tmp_path: Path, number: signal.Signals, code: int) -> None:
    script = write(tmp_path, WAITING_RANKS_WITH_WORKERS)
    with started(*FABRIC_RUN, "--accelerator", "cpu", "--devices", 2, script, cwd=tmp_path) as process:
        wait_until(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists(), "ranks are ready")
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == code, stderr
    assert stderr.count("Traceback") <= 1
    assert f"ended by {number.name}" in stderr
    assert_nothing_left(tmp_path)


def test_second_signal_kills(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, pathlib, signal
        def note(*_): pathlib.Path("noted" + os.environ["RANK"]).touch()
        signal.signal(signal.SIGTERM, note)
        pathlib.Path("ready" + os.environ["RANK"]).touch()
        while True:
            signal.pause()
        """,
    )
    with started(*FABRIC_RUN, "--accelerator", "cpu", "--devices", 2, script, cwd=tmp_path) as process:
        for name in ("ready", "noted"):
            wait_until(lambda: all((tmp_path / f"{name}{rank}").exists() for rank in (0, 1)), name)  # noqa: B023
            process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 143
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("action", "code", "words"),
    [
        ("raise KeyboardInterrupt", 130, "ended by SIGINT"),
        ("sys.exit(7)", 7, "ended by SIGINT"),
        # Such as that the disk is full: the work is not saved, and nobody else would say so.
        ("raise OSError('the save has failed')", 1, "failed: OSError: the save has failed"),
    ],
)
def test_after_ctrl_c_the_exit_code_is_the_signals_or_the_scripts_own_and_an_error_is_reported(
    tmp_path: Path, action: str, code: int, words: str
) -> None:
    script = write(
        tmp_path,
        f"""
        import os, pathlib, signal, sys
        def note(*_): {action}
        signal.signal(signal.SIGINT, note)
        pathlib.Path("ready" + os.environ["RANK"]).touch()
        while True:
            signal.pause()
        """,
    )
    with started(*FABRIC_RUN, "--accelerator", "cpu", "--devices", 2, script, cwd=tmp_path) as process:
        wait_until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)), "ranks are ready")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == code, stderr
    assert words in stderr
    if code == 1:
        log = Path(stderr.partition("is in ")[2].partition(",")[0])
        assert "the save has failed" in log.read_text()
        shutil.rmtree(log.parent)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("victim", ["fabric-run", "server", "rank"])
def test_killing_any_process_leaves_none(tmp_path: Path, victim: str) -> None:
    script = write(tmp_path, WAITING_RANKS_WITH_WORKERS)
    with started(*FABRIC_RUN, "--accelerator", "cpu", "--devices", 2, script, cwd=tmp_path) as process:
        wait_until(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists(), "ranks are ready")
        # A file is there a moment before its content.
        wait_until(lambda: (tmp_path / "ready1").read_text().isdigit(), "rank 1 has told its id")
        # fabric-run, server, keeper, 2 ranks, 4 workers
        assert len(processes_in(tmp_path)) == 9, processes_in(tmp_path)
        rank = int((tmp_path / "ready1").read_text())
        server = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
        kill({"fabric-run": process.pid, "server": server, "rank": rank}[victim])
        process.communicate(timeout=30)
    assert process.returncode == {"fabric-run": -9, "server": 1, "rank": 137}[victim]
    assert_nothing_left(tmp_path)


def test_interrupt_while_torch_is_being_imported_ends_at_once(tmp_path: Path) -> None:
    script = write(tmp_path, "print('never')")
    with started(*FABRIC_RUN, "--accelerator", "cpu", "--devices", 2, script, cwd=tmp_path) as process:
        wait_until(lambda: len(processes_in(tmp_path)) == 2, "the server has started")
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode in (130, -2), stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert_nothing_left(tmp_path)


def test_port_in_use_is_an_error_with_three_parts(tmp_path: Path) -> None:
    import socket

    script = write(tmp_path, "print('never')")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = fabric_run("--devices", 2, "--main-port", taken.getsockname()[1], script)
    assert done.returncode == 1
    assert "cannot listen" in done.stderr
    assert "Given:" in done.stderr
    assert "Try:" in done.stderr
    assert os.path.basename(sys.executable) not in done.stdout


@pytest.mark.parametrize("options", [(), ("--log-dir", "logs")])
def test_the_line_of_a_crash_is_that_of_the_last_attempt(tmp_path: Path, options: tuple[str, ...]) -> None:
    script = write(
        tmp_path,
        """
        import ctypes, os
        def crash():
            ctypes.string_at(0)
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            crash()
        os.kill(os.getpid(), 9)
        """,
    )
    done = fabric_run("--devices", 1, "--max-restarts", 1, *options, script, cwd=tmp_path)
    assert "fabric-run: restart 1 of 1: rank 0 failed: killed by SIGSEGV\n" in done.stderr
    assert report_of(done.stderr[done.stderr.index("fabric-run: rank") :])[0] == (
        "fabric-run: rank 0 failed: killed by SIGKILL"
    )
    assert "in crash" not in done.stderr.rpartition("fabric-run: rank 0 failed")[2]


def test_a_run_that_starts_again_and_succeeds_leaves_no_folder(tmp_path: Path) -> None:
    script = write(tmp_path, "import os, sys; sys.exit(1 - int(os.environ['TORCHELASTIC_RESTART_COUNT']))")
    command = ["env", f"TMPDIR={tmp_path}", *FABRIC_RUN, "--accelerator", "cpu", "--devices", 1, "--max-restarts", 1]
    done = run([*command, script])
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("fabric_run_*"))


@pytest.mark.parametrize("words", ["inf", "nan", "-1"])
def test_a_hang_timeout_is_a_number_of_seconds(tmp_path: Path, words: str) -> None:
    done = fabric_run("--devices", 1, f"--hang-timeout={words}", write(tmp_path, "print('never')"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "--hang-timeout must be a number of at least 0." in done.stderr
