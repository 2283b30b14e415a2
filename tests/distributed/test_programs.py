"""Programs in the style of the public ones for Lightning Fabric run with their imports changed, and learn."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.launching import fabric_run, run

PROGRAMS = Path(__file__).parent.parent / "programs"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--devices", "2", "--strategy", "ddp"],
        ["--devices", "2", "--strategy", "fsdp", "--precision", "bf16-mixed"],
    ],
    ids=["one device", "ddp", "fsdp, bf16-mixed"],
)
def test_a_pretraining_loop_runs_and_resumes(tmp_path: Path, words: list[str]) -> None:
    command = [sys.executable, PROGRAMS / "gpt_pretraining.py", "--out_dir", tmp_path, *words]
    first = run(command, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    second = run([*command, "--resume", "--max_steps", "40"], cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    losses = [float(re.findall(r"final loss ([\d.]+) at", done.stdout)[0]) for done in (first, second)]
    assert losses[1] < losses[0] < 3.3  # of 32 tokens by chance: 3.47
    assert second.stdout.endswith("at 40\n")
    saved = torch.load(tmp_path / "lit_model.pth", weights_only=True)
    assert (saved["step_count"], saved["iter_num"]) == (40, 80)
    assert list(torch.load(tmp_path / "weights.pth", weights_only=True)["model"]) == ["lm_head.weight"]
    header, *rows = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 20
    assert {"step", "loss", "iter", "device/samples_per_sec", "device/mfu"} <= set(header.split(","))


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_reinforcement_learning_loop_learns(tmp_path: Path, ranks: int) -> None:
    done = fabric_run("--devices", ranks, PROGRAMS / "reinforcement_learning.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {kind: (float(a), float(b)) for kind, a, b in re.findall(r"(\w+): from ([\d.]+) to ([\d.]+)", done.stdout)}
    assert set(found) == ({"coupled"} if ranks == 1 else {"coupled", "decoupled"})
    assert all(end > begin + 0.15 for begin, end in found.values()), found


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_k_fold_loop_saves_and_restores(tmp_path: Path, ranks: int) -> None:
    done = fabric_run("--devices", ranks, PROGRAMS / "k_fold.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Working on fold") == 3
    assert float(re.findall(r"average of 3 folds ([\d.]+)", done.stdout)[0]) > 0.7
