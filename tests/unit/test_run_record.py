"""What a run was is kept beside its checkpoints, once for each start, and sent to its loggers."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fabric_lite
from fabric_lite import Checkpoints, DDPStrategy, Fabric
from fabric_lite.loggers import CSVLogger
from fabric_lite.run_record import write_record
from tests.backends import BACKENDS

SCRIPT = """
    import json, sys, torch
    from fabric_lite import Fabric
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed", callbacks=object())
    fabric.seed_everything(7, deterministic=True)
    print(json.dumps(fabric.run_record()))
"""


def record_of_script(folder: Path, *words: str) -> dict[str, Any]:
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run([sys.executable, "script.py", *words], cwd=folder, capture_output=True, text=True, check=True)
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def test_it_says_what_was_run_how_and_on_what(tmp_path: Path) -> None:
    record = record_of_script(tmp_path, "--rate", "a b")
    assert record["command"].endswith("script.py --rate 'a b'")
    assert record["arguments"] == {
        "accelerator": "cpu",
        "strategy": "auto",
        "devices": 1,
        "num_nodes": 1,
        "check_collectives": False,
        "precision": "bf16-mixed",
        "callbacks": "builtins.object",
    }
    assert (record["seed"], record["deterministic"], record["world_size"]) == (7, True, 1)
    assert record["strategy"].startswith("SingleDeviceStrategy(")
    assert record["versions"] == {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "fabric_lite": fabric_lite.__version__,
    }
    assert record["hardware"]["cores"] > 0
    assert record["hardware"]["memory_bytes"] > 1e8
    assert record["hardware"]["accelerator"] == "cpu"
    assert record["git"] is None


def test_the_revision_is_that_of_the_scripts_own_code(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *own, "-C", tmp_path, *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "model.py").write_text("a = 1\n")
    record_of_script(tmp_path)
    git("add", ".")
    git("commit", "-qm", "first")
    revision = git("rev-parse", "HEAD")
    assert record_of_script(tmp_path)["git"] == {"revision": revision, "has_changes": False}
    (tmp_path / "model.py").write_text("a = 2\n")
    assert record_of_script(tmp_path)["git"] == {"revision": revision, "has_changes": True}


def test_a_strategy_that_is_an_object_is_written_out() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, strategy=DDPStrategy(bucket_cap_mb=3))
    assert "bucket_cap_mb=3" in fabric.run_record()["arguments"]["strategy"]
    assert json.dumps(fabric.run_record())


def test_each_start_of_a_run_is_a_record_beside_its_checkpoints(tmp_path: Path) -> None:
    for start in range(2):
        fabric = Fabric(accelerator="cpu", devices=1)
        fabric.seed_everything(start)
        model = nn.Linear(1, 1)
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        state = {"fabric": fabric, "model": model, "optimizer": optimizer}
        checkpoints = Checkpoints(tmp_path)
        checkpoints.resume(state)
        for _ in range(2):
            optimizer.step()
            checkpoints.save(state)
        fabric.close()
    records = json.loads((tmp_path / "run.json").read_text())
    assert [record["seed"] for record in records] == [0, 1]
    assert Checkpoints(tmp_path).latest() == tmp_path / "step-0000004"


@pytest.mark.parametrize("content", ["", "{}", "[", "null"])
def test_a_file_that_holds_something_else_is_written_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    write_record(tmp_path, {"seed": 1})
    assert json.loads((tmp_path / "run.json").read_text()) == [{"seed": 1}]


def test_loggers_get_it_once_before_the_first_values(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, loggers=CSVLogger(tmp_path))
    fabric.log_hyperparams({"lr": 0.1})
    fabric.log("loss", 1.0)
    fabric.log("loss", 2.0)
    fabric.close()
    params = BACKENDS[0].params(tmp_path, fabric.logger)
    assert params["lr"] == 0.1
    assert params["run/versions/torch"] == torch.__version__
