"""``fabric-run`` as a user sees it: argument passing, exit codes, prints, and being like ``python script.py``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.distributed.launching import ENVIRONMENT, FABRIC_RUN, assert_nothing_left, fabric_run, run, write


def test_everything_after_the_script_is_the_scripts(tmp_path: Path) -> None:
    script = write(tmp_path, "import os, sys; print(os.environ['WORLD_SIZE'], sys.argv)")
    done = fabric_run("--devices", 2, script, "--devices", "9", "--precision", "x", "-h")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"2 {[str(script), '--devices', '9', '--precision', 'x', '-h']}"] * 2


@pytest.mark.parametrize(("code", "said"), [(0, ["goodbye"]), (3, ["goodbye", "taken apart"])])
def test_a_rank_that_is_to_be_quick_runs_its_exit_handlers_and_no_more_unless_it_fails(
    tmp_path: Path, code: int, said: list[str]
) -> None:
    script = write(
        tmp_path,
        """
        import atexit, concurrent.futures, os, sys
        from fabric_lite import process_end

        executor = concurrent.futures.ThreadPoolExecutor()  # its worker ends by a handler of Python's own
        executor.submit(int).result()

        class Last:
            def __del__(self, write=os.write):
                write(1, b"taken apart\\n")

        last = Last()
        atexit.register(print, "goodbye")
        process_end.be_quick()
        sys.exit(int(sys.argv[1]))
        """,
    )
    done = fabric_run("--devices", 1, script, code)
    assert (done.returncode, done.stdout.splitlines()) == (code, said)


def test_ranks_have_torchruns_variables_and_gloos_interface(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import json, os, pathlib, sys
        names = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        pathlib.Path(sys.argv[1], "rank" + os.environ["RANK"]).write_text(json.dumps(names))
        """,
    )
    seen = {}
    for name, command in (
        ("torchrun", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]),
        ("fabric-run", [*FABRIC_RUN, "--accelerator", "cpu", "--devices", 2]),
    ):
        (tmp_path / name).mkdir()
        assert run([*command, script, tmp_path / name]).returncode == 0
        seen[name] = [json.loads((tmp_path / name / f"rank{rank}").read_text()) for rank in (0, 1)]
    theirs_alone = {"TORCHELASTIC_SIGNALS_TO_HANDLE"}
    of_the_run = {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID"}
    for ours, theirs in zip(seen["fabric-run"], seen["torchrun"], strict=True):
        assert ours.pop("GLOO_SOCKET_IFNAME") == "lo"  # one node talks to itself on loopback
        # What a program that the rank starts knows it by.
        assert re.fullmatch(r"fabric_run_\d+", ours["TORCHELASTIC_RUN_ID"])
        assert ours.keys() == theirs.keys() - theirs_alone
        assert {k: v for k, v in ours.items() if k not in of_the_run} == {
            k: v for k, v in theirs.items() if k not in of_the_run | theirs_alone
        }


def test_raw_ddp_script_gives_torchruns_numbers(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        torch.manual_seed(0)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if dist.get_rank() == 0:
            print([p.tolist() for p in model.parameters()])
        dist.destroy_process_group()
        """,
    )
    ours = fabric_run("--devices", 2, script)
    theirs = run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, script])
    assert ours.returncode == theirs.returncode == 0, ours.stderr + theirs.stderr
    assert ours.stdout == theirs.stdout
    assert ours.stdout.startswith("[[[")


def test_a_rank_is_like_python_script(tmp_path: Path) -> None:
    write(tmp_path, "value = 7", "neighbor.py")
    script = write(
        tmp_path,
        """
        import atexit, multiprocessing, pickle, sys, threading
        import neighbor
        class Point:
            def __init__(self, x): self.x = x
        def double(point): return Point(point.x * 2)
        if __name__ == "__main__":
            assert sys.modules["__main__"].__dict__ is globals()
            assert __spec__ is None and __file__.endswith("script.py")
            assert sys.orig_argv[1:] == sys.argv, sys.orig_argv
            assert threading.current_thread() is threading.main_thread()
            assert pickle.loads(pickle.dumps(Point(3))).x == 3
            for method in ("fork", "spawn"):
                with multiprocessing.get_context(method).Pool(1) as pool:
                    assert pool.map(double, [Point(neighbor.value)])[0].x == 14
            atexit.register(lambda: print("goodbye"))
            threading.Thread(target=lambda: print("thread")).start()
            print("no newline at the end", end="|")
            sys.exit(0)
        """,
    )
    done = fabric_run("--devices", 1, script)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.replace("|", "\n").split("\n")) == ["", "goodbye", "no newline at the end", "thread"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_run_in_ranks(tmp_path: Path, method: str) -> None:
    script = write(
        tmp_path,
        """
        import os, sys, torch
        class Numbers(torch.utils.data.Dataset):
            def __len__(self): return 4
            def __getitem__(self, index): return index
        if __name__ == "__main__":
            loader = torch.utils.data.DataLoader(Numbers(), num_workers=1, multiprocessing_context=sys.argv[1])
            print(sum(int(batch) for batch in loader))
        """,
    )
    done = fabric_run("--devices", 2, script, method, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "6\n6\n"), done.stderr
    assert_nothing_left(tmp_path)


def test_module_runs_like_python_m(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    write(package, "", "__init__.py")
    write(package, "import sys; print(__spec__.name, __package__, sys.argv)", "__main__.py")
    write(package, "import sys; print(__spec__.name, __package__, sys.argv)", "part.py")
    for name in ("package", "package.part"):
        ours = fabric_run("--devices", 1, "-m", name, "--flag", cwd=tmp_path)
        theirs = run([sys.executable, "-m", name, "--flag"], cwd=tmp_path)
        assert (ours.returncode, ours.stdout) == (0, theirs.stdout), ours.stderr
    done = fabric_run("--devices", 1, "-m", "package.absent", cwd=tmp_path)
    assert done.returncode == 1
    assert "package.absent" in done.stderr


def test_random_numbers_of_ranks_differ(tmp_path: Path) -> None:
    script = write(tmp_path, "import numpy, random; print(numpy.random.randint(1 << 30), random.random())")
    lines = fabric_run("--devices", 2, script).stdout.splitlines()
    assert len(set(lines)) == 2


def test_threads_are_cores_over_ranks_unless_set(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, torch
        from fabric_lite.run_config import current
        print(torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], current().threads_per_rank)
        """,
    )
    command = [*FABRIC_RUN, "--accelerator", "cpu", "--devices", "64", script]
    done = run([*command[:-2], "2", script])
    assert set(done.stdout.splitlines()) == {"1 1 None"}
    assert "thread" not in done.stderr
    done = run(["env", "-u", "OMP_NUM_THREADS", *command[:-2], "2", script])
    from fabric_lite.launch.environment import cores

    threads = max(1, cores() // 2)
    assert set(done.stdout.splitlines()) == {f"{threads} {threads} {threads}"}
    assert done.stderr.count("thread") == 1
    assert "OMP_NUM_THREADS" in ENVIRONMENT


def test_restarts_run_all_ranks_again(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        count = os.environ["TORCHELASTIC_RESTART_COUNT"]
        total = torch.ones(1)
        dist.all_reduce(total)
        print(count, os.environ["TORCHELASTIC_MAX_RESTARTS"], int(total))
        if count == "0" and dist.get_rank() == 1:
            os.kill(os.getpid(), 9)
        dist.barrier()
        dist.destroy_process_group()
        """,
    )
    done = fabric_run("--devices", 2, "--max-restarts", 2, script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("1 2 2") == 2
    assert "restart 1 of 2: rank 1 failed: killed by SIGKILL" in done.stderr
    assert_nothing_left(tmp_path)


def test_logs_hold_each_ranks_output(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, sys
        print("out", os.environ["RANK"]); print("err", os.environ["RANK"], file=sys.stderr)
        if os.environ["RANK"] == "1": raise ValueError("seen in the log")
        """,
    )
    done = fabric_run("--devices", 2, "--log-dir", tmp_path / "logs", script)
    assert done.returncode == 1
    assert "out 1" in done.stdout
    assert "err 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "logs" / "rank_1.out").read_text() == "out 1\n"
    log = (tmp_path / "logs" / "rank_1.err").read_text()
    assert "err 1" in log
    assert "Traceback" in log
    assert str(tmp_path / "logs" / "rank_1.err") in done.stderr


def test_store_and_gloo_listen_on_loopback_alone(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        dist.all_reduce(torch.ones(1))
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        own = {os.readlink(link) for link in links if os.path.lexists(link)}
        listening, store = [], []
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in open(table).readlines()[1:]:
                fields = line.split()
                address, port = fields[1].split(":")
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                    listening.append(address)
                if fields[3] == "0A" and int(port, 16) == int(os.environ["MASTER_PORT"]):
                    store.append(address)
        if dist.get_rank() == 0:
            print(set(listening), store, os.environ["GLOO_SOCKET_IFNAME"])
        dist.destroy_process_group()
        """,
    )
    done = fabric_run("--devices", 2, script)
    assert done.stdout == "{'0100007F'} ['0100007F'] lo\n", done.stderr


def test_help_and_supervisor_import_no_torch() -> None:
    probe = "import sys; from fabric_lite.launch import cli, supervisor; print('torch' in sys.modules)"
    assert run([sys.executable, "-c", probe]).stdout == "False\n"
    done = run([sys.executable, "-X", "importtime", "-m", "fabric_lite", "--help"])
    assert done.returncode == 0
    assert "--devices" in done.stdout
    assert " torch" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", "0"], "at least 1"),
        (["--devices", "-2"], "at least 1"),
        (["--devices", "0,0"], "names a device twice"),
        (["--devices", "two"], "not a number"),
        (["--accelerator", "abacus"], "abacus"),
        (["--num-nodes", "0"], "at least 1"),
        (["--max-restarts", "-1"], "at least 0"),
        (["--num-nodes", "2"], "--main-address"),
        (["--rdzv-backend", "c10d"], "--rdzv-endpoint"),
        (["--device", "2"], "unrecognized arguments: --device"),
        ([], "does not exist"),
    ],
)
def test_bad_command_lines_are_refused_before_anything_starts(tmp_path: Path, words: list[str], message: str) -> None:
    done = run([*FABRIC_RUN, *words, tmp_path / "absent.py"])
    assert done.returncode == 2
    assert message in done.stderr
    assert "Given:" in done.stderr
    assert "Try:" in done.stderr
