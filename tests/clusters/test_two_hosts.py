"""Two hosts with a cable between them that is pulled, or slow: who is not there is said by name, in time."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from tests.clusters.namespaces import Hosts
from tests.distributed.launching import FABRIC_RUN, assert_nothing_left, started, wait_until, write

HANG_SECONDS = 4
# From the last word of a host on: the limit, as much again to notice it, and for all to end.
LIMIT_SECONDS = 60.0

LOOP = """
import sys, torch
from pathlib import Path
from fabric_lite import Fabric
fabric = Fabric(accelerator="cpu")
model = fabric.setup(torch.nn.Linear(4, 4))
for step in range(10 ** 9):
    fabric.backward(model(torch.ones(2, 4)).sum())
    if step == 20:
        (Path(sys.argv[1]) / f"trains {fabric.global_rank}").touch()
"""


def on_both(hosts: Hosts, *words: object, backend: str = "static") -> list[list[str]]:
    both = [*FABRIC_RUN, "--accelerator", "cpu", "--num-nodes", 2, "--hang-timeout", HANG_SECONDS]
    ways = [["--main-address", hosts.address(0), "--node-rank", node] for node in (0, 1)]
    if backend == "c10d":
        ways = [["--rdzv-endpoint", f"{hosts.address(0)}:29500", "--rdzv-id", "job"]] * 2
    return [hosts.on(node, *both, *ways[node], *words) for node in (0, 1)]


@pytest.mark.parametrize("backend", ["static", pytest.param("c10d", marks=pytest.mark.full)])
def test_a_pulled_cable_is_told_on_both_hosts_by_who_is_not_reached(tmp_path: Path, hosts: Hosts, backend: str) -> None:
    script = write(tmp_path, LOOP)
    with contextlib.ExitStack() as stack:
        commands = on_both(hosts, script, tmp_path, backend=backend)
        nodes = [stack.enter_context(started(*words, cwd=tmp_path)) for words in commands]
        wait_until(lambda: len(list(tmp_path.glob("trains *"))) == 2, "both train")
        hosts.pull_plug(1)
        outputs = [node.communicate(timeout=LIMIT_SECONDS) for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1], outputs
    said = [re.findall("^fabric-run: .*(?:\n  .*)*", errors, re.MULTILINE) for _, errors in outputs]
    if backend == "static":
        assert re.match("fabric-run: rank 1 did not arrive and does not respond", said[0][0]), said
        # The other host knows only that it reaches nobody, and where it has asked.
        assert said[1][0].startswith("fabric-run: rank 1 wait in backward (script.py:8), which does not end"), said
        assert f"cannot be asked: the store at {hosts.address(0)}:" in said[1][0]
    else:
        # Which host holds torchelastic's store is torchelastic's choice of those that have this address: the first.
        assert any("did not arrive" in line or "have lost the store" in line for line in said[0]), said
        assert any("have lost the store" in line and hosts.address(0) in line for line in said[1]), said
    assert_nothing_left(tmp_path)


def test_check_shows_how_slow_a_cable_is(tmp_path: Path, hosts: Hosts) -> None:
    hosts.slow_down(0, "80mbit")
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(started(*words, cwd=tmp_path)) for words in on_both(hosts, "--check")]
        outputs = [node.communicate(timeout=LIMIT_SECONDS) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    (speed,) = re.findall(r"the slowest way is between rank 0 and 1: \d+ us, (\S+) GB/s", outputs[0][0])
    # Half of the way at 10 MB/s.
    assert float(speed) <= 0.02


@pytest.mark.parametrize("way", ["fabric-run", "RANK"])
def test_a_host_whose_own_name_means_loopback_is_reached(tmp_path: Path, hosts: Hosts, way: str) -> None:
    """As Debian writes it into /etc/hosts."""
    hosts.name(0, "node0", "127.0.1.1")
    hosts.name(1, "node0", hosts.address(0))
    both: list[list[object]] = [
        [*FABRIC_RUN, "--accelerator=cpu", "--num-nodes=2", "--main-address=node0", "--node-rank", node]
        if way == "fabric-run"
        else ["env", "WORLD_SIZE=2", f"RANK={node}", "MASTER_ADDR=node0", "MASTER_PORT=29500", *FABRIC_RUN]
        for node in (0, 1)
    ]
    with contextlib.ExitStack() as stack:
        commands = [hosts.on(node, *both[node], "--check", "--hang-timeout", 10) for node in (0, 1)]
        nodes = [stack.enter_context(started(*words, cwd=tmp_path)) for words in commands]
        outputs = [node.communicate(timeout=LIMIT_SECONDS) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "all is well" in outputs[0][0]


def test_check_names_a_host_that_is_not_connected(tmp_path: Path, hosts: Hosts) -> None:
    hosts.pull_plug(1)
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(started(*words, cwd=tmp_path)) for words in on_both(hosts, "--check")]
        outputs = [node.communicate(timeout=LIMIT_SECONDS) for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1], outputs
    assert f"fabric-run: Node 1 of 2 has not come within {HANG_SECONDS} s." in outputs[0][1]
    assert "fabric-run: Node 1 does not reach node 0." in outputs[1][1]
