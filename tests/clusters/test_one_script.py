"""One script, unedited, however it is started on two ranks: the weights are those of a plain loop, to the last bit."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clusters.namespaces import Hosts
from tests.clusters.programs import TRAIN, trained
from tests.clusters.slurm import Slurm, free_ports
from tests.conftest import TABLE
from tests.distributed.launching import FABRIC_RUN, assert_nothing_left, run, started, write
from tests.test_readme import ROOT, blocks

LIMIT_SECONDS, RAY_SECONDS = 120.0, 270.0
MPI_VARIABLES = ["env", "OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"]
WAYS = (
    "python", "fabric-run", "torchrun", "two fabric-run", "srun on two nodes", "mpirun.openmpi", "mpirun.mpich",
    "Ray", "Ray Train", "two network namespaces",
)  # fmt: skip

Request = pytest.FixtureRequest


def by_python(script: Path, _: Request) -> list[str]:
    return output(run([sys.executable, script, "--devices", 2], cwd=script.parent, limit_seconds=LIMIT_SECONDS))


def by_fabric_run(script: Path, _: Request) -> list[str]:
    return output(run([*FABRIC_RUN, "--devices", 2, script], cwd=script.parent, limit_seconds=LIMIT_SECONDS))


def by_torchrun(script: Path, _: Request) -> list[str]:
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", 2]
    # By itself torchrun meets on the machine's name, which others may reach.
    here = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    return output(run([*torchrun, *here, script], cwd=script.parent, limit_seconds=LIMIT_SECONDS))


def by_two_agents(script: Path, _: Request) -> list[str]:
    meeting = ["--devices", 1, "--num-nodes", 2, "--main-address", "127.0.0.1", "--main-port", free_ports(1)[0]]
    return of_two(script, *([*FABRIC_RUN, *meeting, "--node-rank", node, script] for node in (0, 1)))


def by_srun(script: Path, request: Request) -> list[str]:
    slurm: Slurm = request.getfixturevalue("slurm")
    words = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, script]
    return output(slurm.run(*words, cwd=script.parent, timeout_seconds=LIMIT_SECONDS))


def by_open_mpi(script: Path, _: Request) -> list[str]:
    need("mpirun.openmpi", "openmpi-bin")
    start = [*MPI_VARIABLES, "mpirun.openmpi", "--oversubscribe", "-n", 2]
    return output(run([*start, sys.executable, script], cwd=script.parent, limit_seconds=LIMIT_SECONDS))


def by_mpich(script: Path, _: Request) -> list[str]:
    need("mpirun.mpich", "mpich")
    return output(
        run(["mpirun.mpich", "-n", 2, sys.executable, script], cwd=script.parent, limit_seconds=LIMIT_SECONDS)
    )


def by_ray(script: Path, request: Request) -> list[str]:
    return of_ray(script, request, "-m", "fabric_lite.ray", "--ranks", 2, script)


def by_ray_train(script: Path, request: Request) -> list[str]:
    if importlib.util.find_spec("pyarrow") is None:
        pytest.skip("Ray Train is not installed: pip install 'ray[train]'")
    _, driver = blocks((ROOT / "docs/starting/ray.md").read_text(encoding="utf-8"), "py")
    return of_ray(script, request, write(script.parent, driver, "driver.py"))


def of_ray(script: Path, request: Request, *driver: object) -> list[str]:
    """What the ranks say in their logs; of those a driver shows some lines late, and like ones once."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'fabric-lite[ray]'")
    hosts: Hosts = request.getfixturevalue("hosts")
    # Ray listens on the machine's first address: in the namespace there is none but loopback once the cable is out.
    hosts.pull_plug(0)
    # Not in the test's own folder: a socket's path has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        # Ray Train keeps its results at home; and Ray's own processes are not for our warnings to be errors in.
        variables = [f"RAY_TMPDIR={folder}", f"HOME={folder}", "RAY_USAGE_STATS_ENABLED=0", "PYTHONWARNINGS=ignore"]
        command = hosts.on(0, "env", *variables, "GLOO_SOCKET_IFNAME=lo", sys.executable, *driver)
        with started(*command, cwd=script.parent) as process:
            _, errors = process.communicate(timeout=RAY_SECONDS)
        assert process.returncode == 0, errors
        logs = Path(folder).glob("ray/session_latest/logs/worker-*.out")
        return [line for log in logs for line in log.read_text().splitlines() if line.startswith("rank")]


def by_namespaces(script: Path, request: Request) -> list[str]:
    hosts: Hosts = request.getfixturevalue("hosts")
    meeting = ["--devices", 1, "--num-nodes", 2, "--main-address", hosts.address(0)]
    return of_two(script, *(hosts.on(node, *FABRIC_RUN, *meeting, "--node-rank", node, script) for node in (0, 1)))


STARTS: dict[str, Callable[[Path, Request], list[str]]] = dict(
    zip(
        WAYS,
        (
            by_python,
            by_fabric_run,
            by_torchrun,
            by_two_agents,
            by_srun,
            by_open_mpi,
            by_mpich,
            by_ray,
            by_ray_train,
            by_namespaces,
        ),
        strict=True,
    )
)


def need(program: str, package: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} not found: apt-get install {package}")


def output(done: object) -> list[str]:
    assert done.returncode == 0, done  # type: ignore[attr-defined]
    return str(done.stdout).splitlines()  # type: ignore[attr-defined]


def of_two(script: Path, *commands: list[object]) -> list[str]:
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(started(*command, cwd=script.parent)) for command in commands]
        outputs = [process.communicate(timeout=LIMIT_SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return [line for said, _ in outputs for line in said.splitlines()]


@pytest.mark.parametrize("way", WAYS)
def test_one_script_ends_with_the_weights_of_a_plain_loop(
    tmp_path: Path, request: Request, record_property: Callable[[str, object], None], way: str
) -> None:
    expected = trained()
    record_property(TABLE, [f"a plain loop: {expected[:16]}...", way, "?"])
    script = write(tmp_path, TRAIN, "train.py")
    found = sorted(STARTS[way](script, request))
    assert found == [f"rank {rank} of 2: {expected}" for rank in (0, 1)]
    record_property(TABLE, [f"a plain loop: {expected[:16]}...", way, found[0].rpartition(" ")[2][:16] + "..."])
    assert_nothing_left(tmp_path)
