"""Ranks on a real Ray cluster, which lives in a network namespace of its own that has only loopback.

One cluster for all tests, with two cores and two GPUs that exist in its books alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import pickle
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_lite import EXIT_PREEMPTED, Fabric, FabricImportError, FabricTypeError, FabricValueError, LaunchError
from fabric_lite.accelerators import Accelerator
from fabric_lite.launch.function_answers import RankTraceback
from fabric_lite.ray import launch
from fabric_lite.ray.__main__ import main
from fabric_lite.ray.actor import Whereabouts, device_index
from fabric_lite.ray.cluster import check_resources
from fabric_lite.ray.job import numbered
from tests.clusters import ray_programs
from tests.test_readme import ROOT, blocks

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(
    not HAS_RAY or os.geteuid() != 0 or shutil.which("ip") is None,
    reason="needs Ray (pip install 'fabric-lite[ray]'), root and iproute2's ip for a network namespace",
)
slow = pytest.mark.timeout(900)
ADDRESS = "127.0.0.1:6399"
PAGE = (ROOT / "docs/starting/ray.md").read_text(encoding="utf-8")
# ray start gives up after 30 seconds, whatever the machine is busy with.
START_ATTEMPTS = 4


@dataclasses.dataclass
class Cluster:
    """The namespace, the variables of what runs in it, and a driver that is connected."""

    namespace: str
    environment: dict[str, str]
    driver: subprocess.Popen[bytes]

    def launch(self, program: str, *args: Any, signalled: tuple[Path, int] | None = None, **options: Any) -> Any:
        """``launch(ray_programs.program, *args, **options)`` in the driver: what came of it."""
        assert self.driver.stdin is not None
        assert self.driver.stdout is not None
        told = None if signalled is None else (str(signalled[0]), signalled[1])
        pickle.dump((program, args, options, told), self.driver.stdin)
        self.driver.stdin.flush()
        return pickle.load(self.driver.stdout)

    def start(self, folder: Path, *command: str, **variables: str) -> subprocess.Popen[str]:
        """``python COMMAND`` in the namespace."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, sys.executable, *command],
            env=self.environment | variables,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """The same, to its end."""
        with self.start(folder, *command, **variables) as process:
            said, errors = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, said, errors)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    namespace = f"fabric-lite-ray-{os.getpid()}"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
        # Else a token that some other cluster has left at home would be asked for, by the nodes but not by the drivers.
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with contextlib.ExitStack() as stack:
        # Not pytest's folder, in whose name the paths of Ray's sockets are too long.
        folder = Path(tempfile.mkdtemp(prefix="ray"))
        stack.callback(shutil.rmtree, folder)
        if subprocess.run(["ip", "netns", "add", namespace], capture_output=True).returncode != 0:
            pytest.skip("this machine lets nobody make network namespaces")
        stack.callback(subprocess.run, ["ip", "netns", "del", namespace], check=True)
        stack.callback(end_all, namespace)
        subprocess.run(["ip", "-n", namespace, "link", "set", "lo", "up"], check=True)
        start(namespace, environment, folder)
        errors = stack.enter_context((folder / "driver.err").open("wb"))
        driver = subprocess.Popen(
            ["ip", "netns", "exec", namespace, sys.executable, "-m", "tests.clusters.ray_driver", ADDRESS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            cwd=ROOT,
        )
        stack.enter_context(driver)
        yield Cluster(namespace, environment, driver)


def start(namespace: str, environment: dict[str, str], folder: Path) -> None:
    """Start the cluster's one node."""
    options = {
        "--port": ADDRESS.split(":")[1],
        "--num-cpus": "2",
        "--num-gpus": "2",
        "--temp-dir": str(folder / "ray"),
        "--include-dashboard": "false",
    }
    for _ in range(START_ATTEMPTS):
        done = start_node(namespace, environment, "127.0.0.1", "--head", *sum(options.items(), ()))
        if done.returncode == 0:
            return
        end_all(namespace)
    raise RuntimeError(f"ray start failed:\n{done.stdout}\n{done.stderr}")


def start_node(
    namespace: str, environment: dict[str, str], address: str, *options: str
) -> subprocess.CompletedProcess[str]:
    """Start a node at one of loopback's addresses, with one seat, by which ranks can be kept apart."""
    program = ["ip", "netns", "exec", namespace, sys.executable, "-m", "ray.scripts.scripts", "start"]
    own = ["--node-ip-address", address, "--resources", '{"seat": 1}', "--object-store-memory", "100000000"]
    return subprocess.run(
        [*program, "--disable-usage-stats", *own, *options],
        env=environment,
        capture_output=True,
        text=True,
    )


def end_all(namespace: str) -> None:
    """End every process of the namespace."""
    while pids := pids_in(namespace):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for_end(pids)


def pids_in(namespace: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid in found.split() if is_alive(int(pid))]


def is_alive(pid: int) -> bool:
    """Whether it runs; a process that nobody has waited for has ended too."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_for_end(pids: list[int], seconds: float = 60.0) -> None:
    """Wait until these processes have ended."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([descriptor], [], [], seconds)[0], f"process {pid} lives on"
        finally:
            os.close(descriptor)


@needs_ray
@slow
def test_a_function_on_two_actors_trains_bit_for_bit_as_fabric_launch_does(cluster: Cluster) -> None:
    expected = Fabric(accelerator="cpu", devices=2, strategy="ddp").launch(ray_programs.train)

    answer = cluster.launch("train", ranks=2, fabric={"strategy": "ddp"})

    assert answer["value"]["steps"] == expected["steps"] == ray_programs.STEPS
    assert answer["value"]["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        assert torch.equal(answer["value"]["weights"][name], value), name
    assert answer["groups"] == {"REMOVED"}


@needs_ray
@slow
def test_a_killed_rank_starts_all_again_from_the_checkpoint_and_changes_no_bit(
    cluster: Cluster, tmp_path: Path
) -> None:
    undisturbed = cluster.launch("train", str(tmp_path / "a"), ranks=2, fabric={"strategy": "ddp"})["value"]

    answer = cluster.launch("train", str(tmp_path / "b"), 1, ranks=2, fabric={"strategy": "ddp"}, max_restarts=1)

    assert undisturbed["begun_at"] == 0
    assert answer["value"]["begun_at"] == 4
    for name, value in undisturbed["weights"].items():
        assert torch.equal(answer["value"]["weights"][name], value), name
    assert "fabric_lite.ray: restart 1 of 1: rank 1 on node 127.0.0.1 died" in answer["printed"]


@needs_ray
@slow
def test_a_rank_that_dies_without_a_restart_left_is_an_error_with_rank_and_node(
    cluster: Cluster, tmp_path: Path
) -> None:
    answer = cluster.launch("train", str(tmp_path), 0, ranks=2, fabric={"strategy": "ddp"})

    assert isinstance(answer["error"], LaunchError)
    assert str(answer["error"]).startswith("Rank 0 on node 127.0.0.1 died.\n  Given: Worker unexpectedly exits")
    assert "common causes" not in str(answer["error"])
    assert answer["groups"] == {"REMOVED"}


@needs_ray
@slow
def test_ranks_are_numbered_know_their_gpus_and_end(cluster: Cluster) -> None:
    found = cluster.launch("places", ranks=2)["value"]

    assert [place["rank"] for place in found] == [place["local_rank"] for place in found] == [0, 1]
    for place in found:
        assert place["world_size"] == 2
        assert place["node_rank"] == 0
        assert place["main_address"] == "127.0.0.1"
        assert place["devices"] == "0,1"
        assert place["visible"] is None  # so that LOCAL_RANK and the indices number the node's GPUs
        assert place["only_accelerator"] is None
        assert place["is_main_thread"]
        assert place["folder"] == str(ROOT)
    wait_for_end([place["pid"] for place in found])


@needs_ray
@slow
def test_ranks_that_were_given_no_gpu_leave_those_of_the_node_alone(cluster: Cluster) -> None:
    [place] = cluster.launch("places", ranks=1, resources_per_rank={"CPU": 1}, fabric={"strategy": "ddp"})["value"]

    assert place["devices"] == "1"
    assert (place["only_accelerator"], place["device"]) == ("cpu", "cpu")


@needs_ray
@slow
@pytest.mark.parametrize("accelerator", ["CPU", Accelerator("cpu")], ids=str)
def test_ranks_that_run_on_the_cpu_take_no_gpu_however_it_is_written(cluster: Cluster, accelerator: Any) -> None:
    [place] = cluster.launch("places", ranks=1, fabric={"accelerator": accelerator})["value"]

    assert (place["only_accelerator"], place["device"]) == ("cpu", "cpu")


@needs_ray
@slow
def test_a_gpu_that_is_asked_for_and_not_given_is_an_error_with_both(cluster: Cluster, tmp_path: Path) -> None:
    answer = cluster.launch("places", ranks=1, resources_per_rank={"CPU": 1}, fabric={"accelerator": "gpu"})
    (tmp_path / "script.py").write_text("import fabric_lite\nfabric_lite.Fabric(accelerator='gpu')\n")
    options = ["--address", ADDRESS, "--ranks", "1", "--gpus-per-rank", "0"]
    done = cluster.run(tmp_path, "-m", "fabric_lite.ray", *options, "script.py")

    assert isinstance(answer["error"], FabricValueError)
    assert "accelerator='gpu', resources_per_rank={'CPU': 1}" in str(answer["error"])
    assert done.returncode == 1
    assert "accelerator='gpu', and resources for 'cpu' alone" in done.stderr
    assert "command line" not in done.stderr


@needs_ray
@slow
def test_an_exception_reaches_the_caller_with_type_and_traceback_after_the_restarts(cluster: Cluster) -> None:
    answer = cluster.launch("fail", ranks=2, max_restarts=1)

    assert type(answer["error"]) is ray_programs.OutOfIdeas
    assert str(answer["error"]) == "not even one"
    assert "on rank 1" in answer["trace"]
    assert 'raise OutOfIdeas("not even one")' in answer["trace"]
    assert RankTraceback.__name__ in answer["trace"]
    assert answer["printed"].count("restart 1 of 1: rank 1 on node 127.0.0.1 failed: ") == 1


@needs_ray
@slow
def test_a_rank_that_exits_is_an_error_with_its_code(cluster: Cluster) -> None:
    answer = cluster.launch("leave_with", 5, ranks=2)

    assert isinstance(answer["error"], LaunchError)
    assert "Rank 1 exited with code 5." in str(answer["error"])


@pytest.mark.skipif(not HAS_RAY, reason="needs Ray (pip install 'fabric-lite[ray]')")
@pytest.mark.timeout(60)  # Ray itself tries for more than five minutes
@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize("is_variable", [False, True])
def test_an_address_where_nobody_listens_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, scheme: str, is_variable: bool
) -> None:
    monkeypatch.setenv("RAY_CLIENT_MODE", "0")  # which Ray sets when it is imported
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"{scheme}127.0.0.1:{taken.getsockname()[1]}"
        if is_variable:
            monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(LaunchError, match=rf"no Ray cluster at this address.*\n.*{address}.*refused"):
            launch(ray_programs.places, ranks=1, address=None if is_variable else address)


@needs_ray
@slow
def test_too_few_resources_are_an_error_with_both_numbers(cluster: Cluster) -> None:
    answer = cluster.launch("places", ranks=3, resources_per_rank={"CPU": 1}, wait_seconds=1)

    assert isinstance(answer["error"], LaunchError)
    assert "no places for 3 ranks for 1 seconds" in str(answer["error"])
    assert "CPU: 3 needed, 2 in the cluster" in str(answer["error"])
    assert answer["groups"] == {"REMOVED"}


@needs_ray
@slow
def test_ctrl_c_in_the_driver_ends_all_ranks_and_gives_their_places_back(cluster: Cluster, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")

    answer = cluster.launch(
        "wait_for_ever", str(tmp_path / "fifo"), signalled=(tmp_path / "fifo", signal.SIGINT), ranks=2, max_restarts=3
    )

    assert isinstance(answer["error"], KeyboardInterrupt)
    assert answer["groups"] == {"REMOVED"}
    assert len(answer["pids"]) == 2
    wait_for_end(answer["pids"])


@needs_ray
@slow
def test_sigterm_to_the_driver_lets_the_ranks_save_and_leave(cluster: Cluster, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")

    answer = cluster.launch(
        "train_until_asked",
        str(tmp_path),
        str(tmp_path / "fifo"),
        signalled=(tmp_path / "fifo", signal.SIGTERM),
        ranks=2,
        max_restarts=3,
    )

    assert isinstance(answer["error"], SystemExit)
    assert answer["error"].code == EXIT_PREEMPTED
    assert len(list((tmp_path / "run").glob("step-*"))) == 1
    assert "restart" not in answer["printed"]
    wait_for_end(answer["pids"])


@needs_ray
@slow
def test_what_a_rank_fails_of_while_it_saves_is_raised_and_nothing_starts_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")

    answer = cluster.launch(
        "train_until_asked",
        str(tmp_path),
        str(tmp_path / "fifo"),
        1,
        signalled=(tmp_path / "fifo", signal.SIGTERM),
        ranks=2,
        max_restarts=3,
    )

    assert isinstance(answer["error"], OSError), answer
    assert "No space left on device" in str(answer["error"])
    assert "restart" not in answer["printed"]


UNPREPARED = """
import threading
from fabric_lite import Fabric
fabric = Fabric()
fabric.launch()
fabric.barrier()
if fabric.global_rank == 0:
    open("fifo", "w").close()
threading.Event().wait()
"""


@needs_ray
@slow
def test_ranks_that_sigterm_ends_are_named_before_it_ends_the_driver(cluster: Cluster, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "script.py").write_text(UNPREPARED)
    options = ["--address", ADDRESS, "--ranks", "2", "--max-restarts", "3"]
    with cluster.start(tmp_path, "-m", "fabric_lite.ray", *options, "script.py") as driver:
        (tmp_path / "fifo").read_text()
        driver.terminate()
        _, errors = driver.communicate()

    assert driver.returncode not in (0, 1)
    assert "fabric_lite.ray: ended by SIGTERM: rank " in errors
    assert "on node 127.0.0.1 died: " in errors
    assert "restart" not in errors


SEND_SIGNALS = """
import signal, subprocess, sys
import ray
from fabric_lite.ray.signals import send_signal

ray.init(address=sys.argv[1])
here = ray.get_runtime_context().get_node_id()
with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
    send_signal({"a" * len(here): [process.pid], here: [process.pid]}, signal.SIGTERM)
assert process.returncode == -signal.SIGTERM, process.returncode
send_signal({}, signal.SIGTERM)
"""


@needs_ray
@slow
def test_a_node_that_is_gone_keeps_no_signal_from_the_others(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SEND_SIGNALS)
    done = cluster.run(tmp_path, "script.py", ADDRESS)
    assert done.returncode == 0, done.stderr


@needs_ray
@slow
def test_a_node_that_is_lost_is_replaced_by_another_and_changes_no_bit(cluster: Cluster, tmp_path: Path) -> None:
    options = {"ranks": 2, "fabric": {"strategy": "ddp"}, "resources_per_rank": {"seat": 1}}
    for address in ("127.0.0.2", "127.0.0.3"):
        nothing_else = ("--num-cpus", "0", "--num-gpus", "0")
        done = start_node(cluster.namespace, cluster.environment, address, "--address", ADDRESS, *nothing_else)
        assert done.returncode == 0, done.stderr

    found = cluster.launch("places", **options)["value"]
    undisturbed = cluster.launch("train", str(tmp_path / "a"), **options)["value"]
    answer = cluster.launch(
        "train", str(tmp_path / "b"), -2, "127.0.0.1", **options, max_restarts=1, wait_seconds=120.0
    )

    assert [(place["rank"], place["local_rank"], place["node_rank"]) for place in found] == [(0, 0, 0), (1, 0, 1)]
    assert {place["main_address"] for place in found} < {"127.0.0.1", "127.0.0.2", "127.0.0.3"}
    assert answer["value"]["begun_at"] == 4, answer
    for name, value in undisturbed["weights"].items():
        assert torch.equal(answer["value"]["weights"][name], value), name
    assert answer["printed"].count("restart 1 of 1") == 1


UNDER_RAY_TRAIN = """
from pathlib import Path
import torch
from fabric_lite import Fabric
from tests.clusters import ray_programs

fabric = Fabric(strategy="ddp")
fabric.launch()
found = ray_programs.train(fabric) | {"world_size": fabric.world_size}
fabric.close()
found["group_is_left"] = torch.distributed.is_initialized()
if fabric.global_rank == 0:
    torch.save(found, Path(__file__).parent / "found.pt")
"""


@needs_ray
@slow
@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs Ray Train (pip install 'ray[train]')")
def test_a_fabric_inside_ray_train_takes_the_group_that_is_there_and_leaves_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    _, driver = blocks(PAGE, "py")
    (tmp_path / "driver.py").write_text(driver)
    (tmp_path / "train.py").write_text(UNDER_RAY_TRAIN)
    # Ray Train keeps its own results at home.
    done = cluster.run(tmp_path, "driver.py", RAY_ADDRESS=ADDRESS, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr

    expected = Fabric(accelerator="cpu", devices=2, strategy="ddp").launch(ray_programs.train)
    found = torch.load(tmp_path / "found.pt")
    assert found["world_size"] == 2
    assert found["group_is_left"]
    for name, value in expected["weights"].items():
        assert torch.equal(found["weights"][name], value), name


SCRIPT = """
import atexit, os, sys
import torch
from fabric_lite import Checkpoints, Fabric
from pathlib import Path

class Batch:
    pass

fabric = Fabric(devices=1)
fabric.launch()
atexit.register(Path(f"end-{fabric.global_rank}").touch)
assert sys.modules[Batch.__module__].Batch is Batch
model = fabric.setup(torch.nn.Linear(2, 1))
Checkpoints("runs").save({"model": model, "fabric": fabric})
kind = type(fabric.strategy).__name__
said = f"{__name__} {sys.argv} {fabric.world_size} {kind} {fabric.precision.name}"
Path(f"rank-{fabric.global_rank}").write_text(said)
if "fail" in sys.argv and fabric.global_rank == 1:
    raise ValueError("no such luck")
if "exit" in sys.argv and fabric.global_rank == 1:
    sys.exit(4)
fabric.barrier()
"""


@needs_ray
@slow
def test_an_unedited_script_runs_as_main_on_every_rank(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    options = ["--address", ADDRESS, "--ranks", "2", "--strategy", "ddp", "--precision", "bf16-mixed"]

    done = cluster.run(tmp_path, "-m", "fabric_lite.ray", *options, "script.py", "--lr", "1")

    assert done.returncode == 0, done.stderr
    for rank in range(2):
        said = (tmp_path / f"rank-{rank}").read_text()
        assert said == "__main__ ['script.py', '--lr', '1'] 2 DDPStrategy bf16-mixed"
        assert (tmp_path / f"end-{rank}").exists()
    [record] = [json.loads(path.read_text()) for path in (tmp_path / "runs").rglob("run.json")]
    assert "script.py" in json.dumps(record)


@needs_ray
@slow
def test_a_script_that_fails_is_reported_with_rank_node_and_traceback(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = ["-m", "fabric_lite.ray", "--address", ADDRESS, "--ranks", "2", "script.py"]

    failed = cluster.run(tmp_path, *command, "fail")
    shutil.rmtree(tmp_path / "runs")
    left = cluster.run(tmp_path, *command, "exit")

    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == (
        "fabric_lite.ray: rank 1 on node 127.0.0.1 failed: ValueError: no such luck"
    )
    assert 'raise ValueError("no such luck")' in failed.stderr
    assert "fabric_lite/launch" not in failed.stderr
    assert left.returncode == 4
    assert left.stderr.splitlines()[-1] == "fabric_lite.ray: rank 1 on node 127.0.0.1 failed: exit code 4"


OWN_CLASSES = """
import dataclasses, functools, sys
from fabric_lite.ray import launch

class Unlucky(Exception):
    def __init__(self, number):
        super().__init__(number)
        self.number = number

@dataclasses.dataclass
class Found:
    rank: int
    options: dict

def find(fabric, *, number, **options):
    if number is not None:
        raise Unlucky(number)
    return Found(fabric.global_rank, options)

if __name__ == "__main__":
    options = {"ranks": 1, "resources_per_rank": {"CPU": 1}, "address": sys.argv[1]}
    found = launch(functools.partial(find, number=None, more=lambda: 3), **options)
    assert type(found) is Found and found.rank == 0 and found.options["more"]() == 3
    try:
        launch(functools.partial(find, number=13), **options)
    except Unlucky as error:
        assert error.number == 13
        assert error.__context__ is None and 'rank 0' in str(error.__cause__)
        print("caught")
"""


@needs_ray
@slow
def test_classes_of_the_drivers_own_script_come_back_as_themselves(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(OWN_CLASSES)

    done = cluster.run(tmp_path, "script.py", ADDRESS)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "caught"


@needs_ray
@slow
def test_the_file_of_the_guide_runs(cluster: Cluster, tmp_path: Path) -> None:
    source, _ = blocks(PAGE, "py")
    (tmp_path / "on_ray.py").write_text(source)

    done = cluster.run(tmp_path, "on_ray.py", RAY_ADDRESS=ADDRESS)

    assert done.returncode == 0, done.stderr
    assert blocks(PAGE, "text")[0].strip() in done.stdout


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_one_error_names_the_extra() -> None:
    with pytest.raises(FabricImportError, match=r"pip install 'fabric-lite\[ray\]'"):
        launch(ray_programs.fail, ranks=2)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ranks": 0}, FabricValueError, "ranks must be at least 1"),
        ({"ranks": 2.0}, FabricTypeError, "ranks is a count"),
        ({"ranks": 2, "max_restarts": -1}, FabricValueError, "max_restarts must be at least 0"),
        ({"ranks": 2, "fabric": {"devices": 2}}, FabricValueError, r"fabric=\{'devices': 2\}"),
        ({"ranks": 2, "wait_seconds": -1.0}, FabricValueError, "wait_seconds"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_refused_before_ray_is_asked(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        launch(ray_programs.fail, **options)


@pytest.mark.parametrize("accelerator", ["gpu", " CUDA ", Accelerator("cuda")], ids=str)
def test_an_accelerator_that_needs_a_gpu_is_held_against_the_resources(accelerator: Any) -> None:
    check_resources({"CPU": 1, "GPU": 1}, accelerator)
    check_resources({"CPU": 1}, "cpu")
    with pytest.raises(FabricValueError, match=r"accelerator=.*, resources_per_rank=\{'CPU': 1, 'GPU': 0\}"):
        check_resources({"CPU": 1, "GPU": 0}, accelerator)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "2", "--strat", "ddp"], "Try: python -m fabric_lite.ray --help"),
        (["--ranks", "2"], "Try: python -m fabric_lite.ray --ranks 2 script.py"),
        (["--ranks", "2", "nothing.py"], "options of python -m fabric_lite.ray stand before it"),
        (["--ranks", "2", "--address", "127.0.0.1:1", "--accelerator", "cpus", "-m", "this"], "invalid choice: 'cpus'"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused_before_ray_is_asked(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert words in capfd.readouterr().err


def test_ranks_are_numbered_node_by_node_in_the_order_of_their_devices() -> None:
    at = [
        Whereabouts("b", "", 1, 1),
        Whereabouts("a", "", 2, 3),
        Whereabouts("b", "", 3, 0),
        Whereabouts("a", "", 4, 0),
    ]
    assert numbered(at) == [2, 0, 3, 1]


@pytest.mark.parametrize(
    ("given", "visible", "index"),
    [([], "0,1", None), ([1], None, 1), (["3"], "2,3", 1), (["GPU-b"], "GPU-a, GPU-b", 1), ([0], "", 0)],
)
def test_the_index_of_a_gpu_counts_those_that_the_node_shows(
    given: list[Any], visible: str | None, index: int | None
) -> None:
    assert device_index(given, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == index
