"""Two hosts with a cable between them that is pulled, or slow: who is not there is said by name, in time."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

import pytest

from tests.clusters.namespaces import Hosts
from tests.distributed.launching import FABRIC_RUN, assert_nothing_left, started, wait_until, write

HANG_SECONDS = 4
LIMIT_SECONDS = 60.0
# From the last packet on: the limit, as much again to notice it, and for all to end. It is 8 to 11 s where nothing else
# runs, and was 48 s when the seconds in which the watch waits for an answer did not count.
CUT_SECONDS = 40.0
NEEDS_FILTER = pytest.mark.skipif(shutil.which("iptables") is None, reason="no iptables: apt-get install iptables")

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

# The gradients are a megabyte, which takes a second on the slow cable.
SLOW_LOOP = """
import sys, threading, time, torch
from pathlib import Path
from fabric_lite import Fabric
folder = Path(sys.argv[1])
fabric = Fabric(accelerator="cpu")
model = fabric.setup(torch.nn.Linear(512, 512))
slow_steps, start = 0, 0.0
while True:
    fabric.backward(model(torch.ones(2, 512)).sum())
    (folder / f"trains {fabric.global_rank}").touch()
    start = start or ((folder / "is slow").exists() and time.monotonic())
    slow_steps += bool(start)
    if slow_steps == 10 and fabric.global_rank == 1:
        (folder / "slow seconds").write_text(str(time.monotonic() - start))
        threading.Event().wait()
"""


def reports(outputs: list[tuple[str, str]]) -> list[list[str]]:
    """What fabric-run has said on each host."""
    return [re.findall("^fabric-run: .*(?:\\n  .*)*", errors, re.MULTILINE) for _, errors in outputs]


def line_of(script: Path, text: str) -> int:
    """The number of the only line with this text."""
    (number,) = [n for n, line in enumerate(script.read_text().splitlines(), 1) if text in line]
    return number


def on_both(hosts: Hosts, *words: object, backend: str = "static") -> list[list[str]]:
    both = [*FABRIC_RUN, "--accelerator", "cpu", "--num-nodes", 2, "--hang-timeout", HANG_SECONDS]
    ways = [["--main-address", hosts.address(0), "--node-rank", node] for node in (0, 1)]
    if backend == "c10d":
        ways = [["--rdzv-endpoint", f"{hosts.address(0)}:29500", "--rdzv-id", "job"]] * 2
    return [hosts.on_named(node, *both, *ways[node], *words) for node in (0, 1)]


def cut(hosts: Hosts, how: str) -> None:
    """Part the two; the first has the store."""
    if how == "pulled":
        hosts.pull_plug(1)
        return
    for chain in {"filtered": ("INPUT", "OUTPUT"), "deaf": ("INPUT",), "mute": ("OUTPUT",)}[how]:
        hosts.drop(1, chain)


@pytest.mark.parametrize("backend", ["static", pytest.param("c10d", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "how",
    [
        "pulled",
        pytest.param("filtered", marks=NEEDS_FILTER),
        pytest.param("deaf", marks=[NEEDS_FILTER, pytest.mark.full]),
        pytest.param("mute", marks=[NEEDS_FILTER, pytest.mark.full]),
    ],
)
def test_hosts_that_are_cut_off_say_both_who_is_not_reached(
    tmp_path: Path, hosts: Hosts, how: str, backend: str
) -> None:
    script = write(tmp_path, LOOP)
    with contextlib.ExitStack() as stack:
        commands = on_both(hosts, script, tmp_path, backend=backend)
        nodes = [stack.enter_context(started(*words, cwd=tmp_path)) for words in commands]
        wait_until(lambda: len(list(tmp_path.glob("trains *"))) == 2, "both train")
        cut(hosts, how)
        outputs = [node.communicate(timeout=CUT_SECONDS) for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1], outputs
    said = reports(outputs)
    if backend == "static":
        first = "fabric-run: rank 1 did not arrive and does not respond: rank 0 waits in backward (script.py:8)"
        assert said[0][0].startswith(first), said
        # The other host knows only that it reaches nobody, and where it has asked.
        assert said[1][0].startswith("fabric-run: rank 1 waits in backward (script.py:8), which does not end"), said
        assert f"cannot be asked: the store at {hosts.address(0)}:" in said[1][0]
    else:
        # Which host holds torchelastic's store is torchelastic's choice of those that have this address: the first.
        assert any("did not arrive" in line or "have lost the store" in line for line in said[0]), said
        assert any("have lost the store" in line and hosts.address(0) in line for line in said[1]), said
    assert_nothing_left(tmp_path)


def test_a_rank_that_stops_on_a_slow_cable_is_named_and_the_slow_cable_before_is_not(
    tmp_path: Path, hosts: Hosts
) -> None:
    """A step takes a quarter of the limit or more on the cable, and there are enough for several limits."""
    script = write(tmp_path, SLOW_LOOP)
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(started(*words, cwd=tmp_path)) for words in on_both(hosts, script, tmp_path)]
        wait_until(lambda: len(list(tmp_path.glob("trains *"))) == 2, "both train")
        for host in (0, 1):
            hosts.slow_down(host, "8mbit")
        (tmp_path / "is slow").touch()
        outputs = [node.communicate(timeout=2 * LIMIT_SECONDS) for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1], outputs
    assert (tmp_path / "slow seconds").exists(), outputs
    assert float((tmp_path / "slow seconds").read_text()) > 2 * HANG_SECONDS
    said = reports(outputs)
    (report,) = [lines[0] for lines in said if not lines[0].startswith("fabric-run: ended because on node")]
    waits, stops = (line_of(script, text) for text in ("fabric.backward(", "threading.Event()"))
    assert report.startswith(f"fabric-run: rank 1 did not arrive: rank 0 waits in backward (script.py:{waits})"), said
    assert re.search(rf"\n  rank 1: .*script\.py:{stops}, ", report), said
    assert_nothing_left(tmp_path)


@pytest.mark.full
def test_a_cable_too_slow_for_one_step_within_the_limit_is_told_by_where_all_wait(tmp_path: Path, hosts: Hosts) -> None:
    script = write(tmp_path, LOOP.replace("Linear(4, 4)", "Linear(512, 512)").replace("(2, 4)", "(2, 512)"))
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(started(*words, cwd=tmp_path)) for words in on_both(hosts, script, tmp_path)]
        wait_until(lambda: len(list(tmp_path.glob("trains *"))) == 2, "both train")
        for host in (0, 1):
            hosts.slow_down(host, "64kbit")
        outputs = [node.communicate(timeout=LIMIT_SECONDS) for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1], outputs
    # The words of a rank are as slow as its gradients, so that it may be taken for one that does not respond.
    who = "ranks 0, 1 wait|rank [01] (did not arrive( and does not respond)?: rank [01] )?waits"
    said = reports(outputs)
    assert any(re.match(rf"fabric-run: ({who}) in backward \(script.py:8\)", first) for first, *_ in said), said
    assert_nothing_left(tmp_path)


def test_check_shows_how_slow_a_cable_is(tmp_path: Path, hosts: Hosts) -> None:
    hosts.slow_down(0, "80mbit")
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(started(*words, cwd=tmp_path)) for words in on_both(hosts, "--check")]
        outputs = [node.communicate(timeout=LIMIT_SECONDS) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    (speed,) = re.findall(r"the slowest way for 4 MB is between rank 0 and 1: \d+ us, (\S+) GB/s", outputs[0][0])
    # Half of the way at 10 MB/s.
    assert float(speed) <= 0.02


@pytest.mark.parametrize("has_address", [False, True], ids=["alone", "and its address"])
@pytest.mark.parametrize("way", ["fabric-run", "RANK"])
def test_a_host_whose_own_name_means_loopback_is_reached(
    tmp_path: Path, hosts: Hosts, way: str, has_address: bool
) -> None:
    """As Debian writes it into /etc/hosts, where one list of all hosts may have been added."""
    hosts.name(0, "127.0.1.1 node0", *([f"{hosts.address(0)} node0"] if has_address else []))
    hosts.name(1, f"{hosts.address(0)} node0")
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
