"""Starting ranks from inside a program: its script again, or one function."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fabric_lite import run_config
from fabric_lite.errors import FabricTypeError, LaunchError
from fabric_lite.launch.function_answers import RankTraceback
from fabric_lite.launch.in_script import _script_arguments, check_function, run_function
from fabric_lite.run_config import RunConfig
from tests.distributed.launching import assert_nothing_left, kill, processes_in, run, started, wait_until, write

SUPERVISED = """
    import json, os, sys
    from fabric_lite.launch.in_script import supervise_script
    from fabric_lite.run_config import RunConfig, current
    if __name__ == "__main__":
        if "RANK" not in os.environ:
            try:
                supervise_script(RunConfig(accelerator="cpu", devices="2"))
            finally:
                print("never")
        print(json.dumps([os.environ["RANK"], os.environ["WORLD_SIZE"], sys.argv[1:], current().devices]), flush=True)
        if os.path.exists("printed"):  # a pipe: rank 1, which fails, ends the job only after rank 0 has printed
            open("printed", "w" if os.environ["RANK"] == "0" else "r").close()
        if "wait" in sys.argv:
            import pathlib, signal
            pathlib.Path("ready" + os.environ["RANK"]).touch()
            signal.pause()
        sys.exit(4 * int(os.environ["RANK"]))
"""


@pytest.mark.parametrize("way", [["script.py"], ["-u", "script.py"], ["-X", "utf8", "-m", "script"], ["-um", "script"]])
def test_script_is_run_again_in_every_rank(tmp_path: Path, way: list[str]) -> None:
    write(tmp_path, SUPERVISED)
    os.mkfifo(tmp_path / "printed")
    done = run([sys.executable, *way, "a", "--devices", "9", "-m"], cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    lines = sorted(json.loads(line) for line in done.stdout.splitlines())
    assert lines == [[str(rank), "2", ["a", "--devices", "9", "-m"], "2"] for rank in (0, 1)]
    assert_nothing_left(tmp_path)


def test_killed_program_takes_its_ranks_along(tmp_path: Path) -> None:
    script = write(tmp_path, SUPERVISED)
    with started(sys.executable, script, "wait", cwd=tmp_path) as process:
        wait_until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)), "ranks are ready")
        kill(process.pid)
        process.communicate(timeout=30)
    assert_nothing_left(tmp_path)


def test_without_a_script_launch_names_the_function_form(tmp_path: Path) -> None:
    code = "from fabric_lite.launch import in_script; in_script.supervise_script(in_script.RunConfig())"
    done = run([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == 1
    assert "fabric.launch(function)" in done.stderr


def test_script_from_a_pipe_is_no_script_to_run_again(tmp_path: Path) -> None:
    code = "from fabric_lite.launch import in_script; in_script.supervise_script(in_script.RunConfig())"
    done = run(["sh", "-c", f'echo "{code}" | "{sys.executable}" -'], cwd=tmp_path)
    assert done.returncode == 1
    assert "LaunchError" in done.stderr
    assert "fabric.launch(function)" in done.stderr


def test_script_arguments_are_found_behind_pythons_own() -> None:
    for command in ("s.py a -m", "-u s.py a -m", "-X dev -W error s.py a -m", "-m s a -m", "-Im s a -m", "-ms a -m"):
        assert _script_arguments(["python", *command.split()]) == ("a", "-m"), command


def sum_of_ranks(value: int, *, to: str) -> tuple[torch.Tensor, str | None, str]:
    dist.init_process_group("gloo")
    total = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(total)
    dist.destroy_process_group()
    config = run_config.current()
    return total, None if config is None else config.devices, to


class Picky(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one}{two}")


def fail_on_rank_1(how: str) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("from rank 1")
        if how == "picky":
            raise Picky(1, 2)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "real-time":
            os.kill(os.getpid(), signal.SIGRTMIN)
        if how == "silent":
            os._exit(4)
        if how == "leave":
            sys.exit(0)
        if how == "leave silently":
            os._exit(0)
        sys.exit(3)
    dist.barrier()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_function_runs_on_every_rank_and_rank_0s_value_comes_back(method: Any) -> None:
    total, devices, to = run_function(
        sum_of_ranks, (3,), {"to": "you"}, ranks=2, start_method=method, config=RunConfig(devices="2")
    )
    assert (total.tolist(), devices, to) == ([7], "2", "you")


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("raise", ValueError, "from rank 1"),
        ("picky", LaunchError, "Rank 1 failed: .*Picky: 12"),
        ("kill", LaunchError, "Rank 1 was killed by SIGKILL"),
        ("real-time", LaunchError, "Rank 1 was killed by SIGRTMIN"),
        ("exit", LaunchError, "Rank 1 exited with code 3(?s:.*)Given: SystemExit: 3"),
        ("silent", LaunchError, "Rank 1 exited with code 4"),
    ],
)
def test_first_failing_ranks_exception_is_raised_here(how: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        run_function(fail_on_rank_1, (how,), {}, ranks=2, start_method="fork", config=RunConfig())
    if how in ("raise", "picky"):
        assert isinstance(caught.value.__cause__, RankTraceback)
        assert "in fail_on_rank_1" in str(caught.value.__cause__)


@pytest.mark.parametrize("how", ["leave", "leave silently"])
def test_rank_that_leaves_with_0_is_named_beside_the_error_of_those_that_wait_for_it(how: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        run_function(fail_on_rank_1, (how,), {}, ranks=2, start_method="fork", config=RunConfig())
    assert "Before it, rank 1 had left without a failure." in f"{caught.value}{caught.value.__cause__}"


def leave_for_preemption() -> None:
    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(1)  # longer than what a failure would leave it
        print("rank 1 has saved", flush=True)
    sys.exit(75)


def test_ranks_that_leave_for_preemption_take_their_time_and_this_program_leaves_too(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_function(leave_for_preemption, (), {}, ranks=2, start_method="fork", config=RunConfig())
    assert caught.value.code == 75
    assert "rank 1 has saved" in capfd.readouterr().out


SIGNALED = """
    import os, pathlib, signal, sys, time
    import torch
    from fabric_lite import Fabric
    from fabric_lite.launch.in_script import run_function
    from fabric_lite.run_config import RunConfig

    def ready():
        pathlib.Path("ready" + os.environ["RANK"]).touch()

    def save():
        if os.environ["RANK"] == "1":
            time.sleep(1)  # longer than what a failure would leave it
        with open("saved" + os.environ["RANK"], "a") as file:
            file.write("once")

    def stop_when_asked():
        fabric = Fabric(accelerator="cpu")
        model = torch.nn.Linear(4, 4)
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        while not fabric.should_stop:
            ready()
            fabric.backward(model(torch.ones(4)).sum())
            optimizer.step()
        save()
        sys.exit(75)

    def stop_by_ctrl_c():
        try:
            ready()
            signal.pause()
        finally:
            save()

    def listen_to_nothing():
        ready()
        signal.pause()

    run_function(globals()[sys.argv[1]], (), {}, ranks=2, start_method="fork", config=RunConfig())
"""


@pytest.mark.parametrize(
    ("function", "number", "code"),
    [
        ("stop_when_asked", signal.SIGUSR1, 75),
        ("stop_by_ctrl_c", signal.SIGINT, -signal.SIGINT),
        ("listen_to_nothing", signal.SIGTERM, -signal.SIGTERM),
    ],
)
def test_a_signal_to_the_program_reaches_its_function_ranks_which_may_save(
    tmp_path: Path, function: str, number: int, code: int
) -> None:
    with started(sys.executable, write(tmp_path, SIGNALED), function, cwd=tmp_path) as process:
        wait_until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)), "ranks are ready")
        os.killpg(process.pid, number)  # as a terminal and some schedulers do
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    saved = [path.read_text() for path in sorted(tmp_path.glob("saved*"))]
    assert saved == ([] if function == "listen_to_nothing" else ["once", "once"])
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("number", "handler", "code", "words"),
    [
        (signal.SIGINT, "default_int_handler", -signal.SIGINT, "KeyboardInterrupt"),
        (signal.SIGTERM, "SIG_DFL", -signal.SIGTERM, ""),
        (signal.SIGTERM, "SIG_IGN", 1, "LaunchError: The ranks were killed, because a second signal came"),
    ],
)
def test_a_second_signal_kills_function_ranks_that_do_not_end_and_the_program_gets_it_too(
    tmp_path: Path, number: signal.Signals, handler: str, code: int, words: str
) -> None:
    source = f"""
    import os, pathlib, signal
    from fabric_lite.launch.in_script import run_function
    from fabric_lite.run_config import RunConfig
    def stay():
        rank = os.environ["RANK"]
        signal.signal({int(number)}, lambda *_: pathlib.Path("asked" + rank).touch())
        pathlib.Path("ready" + rank).touch()
        while True:
            signal.pause()
    signal.signal({int(number)}, signal.{handler})
    run_function(stay, (), dict(), ranks=2, start_method="fork", config=RunConfig())
    """
    with started(sys.executable, write(tmp_path, source), cwd=tmp_path) as process:
        wait_until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)), "ranks are ready")
        process.send_signal(number)
        wait_until(lambda: all((tmp_path / f"asked{rank}").exists() for rank in (0, 1)), "ranks are asked")
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert words in stderr
    assert "out of memory" not in stderr
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("number", "left_with", "code"),
    [(None, 75, 1), (signal.SIGUSR1, 75, -signal.SIGUSR1), (signal.SIGTERM, 0, -signal.SIGTERM)],
)
def test_a_function_rank_that_is_stuck_when_others_have_left_is_killed_after_the_grace(
    tmp_path: Path, number: signal.Signals | None, left_with: int, code: int
) -> None:
    source = f"""
    import os, pathlib, signal, sys, time
    from fabric_lite.launch import function_ranks
    from fabric_lite.launch.in_script import run_function
    from fabric_lite.run_config import RunConfig
    function_ranks.PREEMPTION_GRACE_SECONDS = function_ranks.SIGNAL_GRACE_SECONDS = 0.5
    def leave():
        rank = os.environ["RANK"]
        asked = [] if {number is not None} else [0]
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, _: asked.append(number))
        pathlib.Path("ready" + rank).touch()
        while rank == "1" or not asked:
            time.sleep(0.01)
        sys.exit({left_with})
    run_function(leave, (), dict(), ranks=2, start_method="fork", config=RunConfig())
    """
    with started(sys.executable, write(tmp_path, source), cwd=tmp_path) as process:
        wait_until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)), "ranks are ready")
        if number is not None:
            process.send_signal(number)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == code, stderr
    if number is None:
        assert "LaunchError: Another rank had left long before, so that rank 1 had to be killed.\n" in stderr
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("is_taken", [False, True])
def test_function_ranks_end_their_save_without_a_word_and_its_error_is_raised_here(
    tmp_path: Path, is_taken: bool
) -> None:
    source = """
    import pathlib, time
    from fabric_lite import Fabric
    def last_of_it():
        time.sleep(1.5)  # longer than a save may keep another one waiting without being mentioned
        pathlib.Path("saved").touch()
    def train(fabric):
        handle = fabric.save("a.ckpt", {"number": 1}, async_=True)
        if fabric.global_rank == 0:
            handle.then(last_of_it)
    Fabric(accelerator="cpu", devices=2, strategy="ddp_fork").launch(train)
    """
    if is_taken:
        (tmp_path / "a.ckpt").mkdir()
        (tmp_path / "a.ckpt" / "diary.txt").write_text("mine")
    done = run([sys.executable, write(tmp_path, source)], cwd=tmp_path)
    assert done.returncode == is_taken, done.stderr
    if is_taken:
        assert "CheckpointError: " in done.stderr
    else:
        assert (done.stderr, (tmp_path / "saved").exists()) == ("", True)
    assert_nothing_left(tmp_path)


def return_a_closure() -> object:
    return lambda: None


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_value_that_cannot_be_pickled_is_said_to_be_the_return_value(method: Any) -> None:
    with pytest.raises(LaunchError, match=r"return value cannot be pickled(?s:.*)type function(?s:.*)Try:"):
        run_function(return_a_closure, (), {}, ranks=2, start_method=method, config=RunConfig())


def fork_a_child_that_fails() -> int:
    child = os.fork()
    if child == 0:
        raise ValueError("of the child")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_forked_child_of_a_function_rank_ends_for_itself() -> None:
    code = run_function(fork_a_child_that_fails, (), {}, ranks=1, start_method="fork", config=RunConfig())
    assert code == 1


def test_fork_is_refused_once_cuda_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(LaunchError, match="cannot be forked once CUDA is in use"):
        run_function(sum_of_ranks, (3,), {"to": ""}, ranks=2, start_method="fork", config=RunConfig())


def test_killed_program_takes_its_function_ranks_along(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, pathlib, signal, time
        from fabric_lite.launch.in_script import run_function
        from fabric_lite.run_config import RunConfig
        def wait():
            pathlib.Path("ready" + os.environ["RANK"]).touch()
            signal.pause()
        run_function(wait, (), {}, ranks=2, start_method="fork", config=RunConfig())
        """,
    )
    with started(sys.executable, script, cwd=tmp_path) as process:
        wait_until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)), "ranks are ready")
        assert len(processes_in(tmp_path)) == 3
        kill(process.pid)
        process.communicate(timeout=30)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("function", [3, lambda: None, lambda **options: options])
def test_function_must_take_fabric(function: object) -> None:
    with pytest.raises(FabricTypeError, match="function"):
        check_function(function)
    check_function(lambda fabric: fabric)
    check_function(print)
