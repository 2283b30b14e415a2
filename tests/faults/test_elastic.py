"""Ranks and nodes that are killed: all start again from the newest checkpoint, and the run ends as if nothing was."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launching import FABRIC_RUN, assert_nothing_left, fabric_run, kill, started, wait_until, write
from tests.distributed.test_launch_nodes import free_port
from tests.faults.conftest import Figures

SAMPLES, GLOBAL_BATCH, EPOCHS = 72, 12, 3
STEPS = EPOCHS * SAMPLES // GLOBAL_BATCH

SCRIPT = f"""
import json, os, pathlib, signal, sys, time
import torch
from fabric_lite import Checkpoints, Fabric

folder, faults = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
fabric = Fabric(accelerator="cpu", strategy=sys.argv[3])
fabric.launch()
fabric.seed_everything(1)
attempt, rank, world_size = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), fabric.global_rank, fabric.world_size
model = torch.nn.Sequential(*[layer for _ in range(4) for layer in (torch.nn.Linear(40, 40), torch.nn.Tanh())])
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
model, optimizer = fabric.setup(model, optimizer)
inputs = torch.randn({SAMPLES}, 40, generator=torch.Generator().manual_seed(2))
dataset = torch.utils.data.TensorDataset(torch.arange({SAMPLES}), inputs)
loader = torch.utils.data.DataLoader(dataset, batch_size={GLOBAL_BATCH} // world_size, shuffle=True)
loader = fabric.setup_dataloaders(loader)
checkpoints = Checkpoints(folder / "checkpoints", every=3)
state = {{"fabric": fabric, "model": model, "optimizer": optimizer, "loader": loader, "epoch": 0}}
checkpoints.resume(state)
if asked and "nodes" in faults:
    raise SystemExit(75)  # before anybody else listened: what this script's own handler has taken is for it to do
log = open(folder / f"log-{{attempt}}-{{rank}}", "a", buffering=1)
while state["epoch"] < {EPOCHS}:
    for ids, x in loader:
        step = fabric.steps
        log.write(json.dumps([step, world_size, ids.tolist()]) + "\\n")
        if [attempt, step, rank] in faults:
            os.kill(os.getpid(), signal.SIGKILL)
        if "nodes" in faults and world_size == 2 and step == 7 and not (folder / "alone").exists():
            # The test kills the node of rank 1; rank 0 notices by the collective.
            (folder / f"waits{{rank}}").touch()
            while rank == 1:
                time.sleep(0.01)
        if "nodes" in faults and world_size == 1 and not (folder / "waits1").exists():
            # The second node comes late to the first meeting, as on a busy machine; this one is asked to leave then.
            while not asked:
                time.sleep(0.01)
        elif "nodes" in faults and world_size == 1:
            (folder / "alone").touch()
            # The test starts a node; this one is asked to leave, and saves after this step.
            while step == 12 and not asked:
                time.sleep(0.01)
        fabric.backward((model(x) - x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        checkpoints.step(state)
    state["epoch"] += 1
if rank == 0:
    torch.save(model.state_dict(), folder / "weights.pt")
"""


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


def samples_of_steps(folder: Path) -> list[list[int]]:
    """The samples of each step of the run that has led to the final weights, in ascending order."""
    steps: dict[int, tuple[int, dict[str, list[int]]]] = {}
    for path in folder.glob("log-*"):
        _, attempt, rank = path.name.split("-")
        for line in path.read_text().splitlines():
            step, _, ids = json.loads(line)
            if step not in steps or steps[step][0] < int(attempt):
                steps[step] = (int(attempt), {})
            if steps[step][0] == int(attempt):
                steps[step][1][rank] = ids
    return [sorted(itertools.chain(*steps[step][1].values())) for step in sorted(steps)]


def plain_loop(steps: list[list[int]]) -> dict[str, torch.Tensor]:
    """The weights that one process gets from the same samples in each step, by torch alone."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(*[layer for _ in range(4) for layer in (torch.nn.Linear(40, 40), torch.nn.Tanh())])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    inputs = torch.randn(SAMPLES, 40, generator=torch.Generator().manual_seed(2))
    for ids in steps:
        x = inputs[ids]
        (model(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def run_to_the_end(folder: Path, script: Path, ranks: int, faults: list[Any], strategy: str = "ddp") -> tuple[str, str]:
    folder.mkdir()
    words = [script, folder, json.dumps(faults), strategy]
    done = fabric_run("--devices", ranks, "--max-restarts", len(faults), *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert_nothing_left(folder)
    return done.stdout, done.stderr


# gloo adds up the numbers of three and more ranks in an order that depends on a number's place in its bucket, and DDP
# orders its buckets anew after the first step of a process, unless it looks for unused parameters.
@pytest.mark.parametrize(
    ("ranks", "strategy", "tolerance"),
    [
        (2, "ddp", 0.0),
        pytest.param(3, "ddp_find_unused_parameters_true", 0.0, marks=pytest.mark.full),
        pytest.param(3, "ddp", 1e-5, marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("trials", [1, pytest.param(10, marks=pytest.mark.full)])
def test_a_killed_rank_costs_nothing_but_time(
    tmp_path: Path, figures: Figures, ranks: int, strategy: str, tolerance: float, trials: int
) -> None:
    script = write(tmp_path, SCRIPT)
    run_to_the_end(tmp_path / "undisturbed", script, ranks, [], strategy)
    expected, steps = weights_in(tmp_path / "undisturbed"), samples_of_steps(tmp_path / "undisturbed")
    assert len(steps) == STEPS
    choose, greatest = random.Random(ranks), 0.0
    for trial in range(trials):
        # Not before the first checkpoint, after every third step.
        fault = [0, choose.randrange(3, STEPS), choose.randrange(ranks)]
        stdout, stderr = run_to_the_end(tmp_path / str(trial), script, ranks, [fault], strategy)
        notice = f"fabric-run: restart 1 of 1: rank {fault[2]} failed: killed by SIGKILL"
        assert [line for line in stderr.splitlines() if line.startswith("fabric-run")] == [notice], stderr
        goes_on_at = fault[1] // 3 * 3
        assert f"resumed from step {goes_on_at}," in stdout + stderr, (fault, stdout, stderr)
        for rank in range(ranks):
            first, *_ = (tmp_path / str(trial) / f"log-1-{rank}").read_text().splitlines()
            assert json.loads(first)[0] == goes_on_at, fault
        assert samples_of_steps(tmp_path / str(trial)) == steps
        weights = weights_in(tmp_path / str(trial))
        greatest = max(greatest, *(float((weights[name] - expected[name]).abs().max()) for name in expected))
        assert greatest <= tolerance, fault
    values = {"trials": trials, "weights_differ_by_at_most": f"{greatest:.1e}", "repeated": 0, "skipped": 0}
    figures(f"a rank of {ranks} is killed, and all start again, {strategy}", **values)


@pytest.mark.parametrize("trials", [1, pytest.param(5, marks=pytest.mark.full)])
def test_a_killed_node_is_left_out_and_may_come_back(tmp_path: Path, figures: Figures, trials: int) -> None:
    script = write(tmp_path, SCRIPT)
    greatest = 0.0
    for trial in range(trials):
        folder = tmp_path / str(trial)
        folder.mkdir()
        endpoint = f"127.0.0.1:{free_port()}"
        meeting = ["--num-nodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "job"]
        command = [
            *FABRIC_RUN,
            "--accelerator",
            "cpu",
            "--max-restarts",
            3,
            *meeting,
            script,
            folder,
            '["nodes"]',
            "ddp",
        ]
        with started(*command, cwd=folder) as first:
            wait_until(lambda: listens(endpoint), "the first node holds the store")  # noqa: B023
            with started(*command, cwd=folder) as second:
                wait_until(lambda: (folder / "waits1").exists(), "both train")  # noqa: B023
                kill(second.pid)
                second.communicate(timeout=60)
            wait_until(lambda: (folder / "alone").exists(), "the first goes on alone")  # noqa: B023
            with started(*command, cwd=folder) as third:
                outputs = [process.communicate(timeout=60) for process in (first, third)]
        assert [first.returncode, third.returncode] == [0, 0], outputs
        assert_nothing_left(folder)
        steps = samples_of_steps(folder)
        assert len(steps) == STEPS
        for first_step in range(0, STEPS, STEPS // EPOCHS):
            epoch = itertools.chain(*steps[first_step : first_step + STEPS // EPOCHS])
            assert sorted(epoch) == list(range(SAMPLES))
        worlds = {json.loads(line)[1] for path in folder.glob("log-*") for line in path.read_text().splitlines()}
        assert worlds == {1, 2}
        weights, expected = weights_in(folder), plain_loop(steps)
        greatest = max(greatest, *(float((weights[name] - expected[name]).abs().max()) for name in expected))
        # Sums of another number of ranks are rounded otherwise.
        for name in expected:
            torch.testing.assert_close(weights[name], expected[name], rtol=1e-4, atol=1e-5)
    values = {"trials": trials, "repeated": 0, "skipped": 0, "weights_differ_by_at_most": f"{greatest:.1e}"}
    figures("a node of two is killed, and another comes", **values)


def listens(endpoint: str) -> bool:
    import socket

    host, port = endpoint.split(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0
