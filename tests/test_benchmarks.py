"""The benchmarks that train and save on several ranks run, and measure what they say they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

DEVICES = ("1 device", "2 devices")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def figures(script: str, folder: Path, option: str = "--quick") -> dict[str, Any]:
    """What a script writes in its smallest setting."""
    path = folder / "figures.json"
    finished = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), option, "--json", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(path.read_text(encoding="utf-8"))


def test_sharded_steps_communicate_what_fully_shard_by_hand_does_and_hold_as_much(tmp_path: Path) -> None:
    measured = figures("sharded.py", tmp_path)
    [step] = measured["steps"]
    assert step["collectives"]["fully_shard"]["calls"] > step["collectives"]["DDP"]["calls"] > 0
    assert step["same_collectives_as_by_hand"]
    held = {row["candidate"]: row["held"] for row in measured["memory"]}
    assert held["fsdp"] == held["fully_shard"]
    assert held["fsdp"] < 0.6 * held["ddp"]  # half of it, and what does not divide evenly


def test_every_way_to_save_and_load_is_measured(tmp_path: Path) -> None:
    measured = figures("checkpoint.py", tmp_path)
    ways = [(row["what"], row["way"]) for row in measured["rows"]]
    assert {what for what, _ in ways} == {"one device", "2 ranks, fsdp", "one device, from 2 ranks"}
    for phase in ("load, cold", "load, warm"):
        assert all(row[phase]["seconds"] > 0 for row in measured["rows"])
    gathering, streaming = (
        next(row["save"]["extra_mib"] for row in measured["rows"] if row["way"] == way)
        for way in ("full state dict, torch.save", "fabric_lite, full file")
    )
    assert streaming < gathering  # a tensor of 4 MiB at a time, and all 24 MiB at once


def test_benchmarks_replayed_from_recordings_tell_the_truth(tmp_path: Path) -> None:
    replayed = figures("trust.py", tmp_path, "--replay-only")["replayed"]
    assert replayed["benchmarks"] == 100
    assert replayed["alike"] <= 5
    assert replayed["slower"] >= 95
    assert replayed["repeat"] <= 5
    assert replayed["winners"] == 16
    assert replayed["winners_good"] >= 15
    winners = {one["winner"] for one in replayed["each"] if "winner" in one}
    assert winners == {"ddp, 32-true, 1 device", "ddp, 32-true, 2 devices"}  # not the same one for all models


def test_benchmarks_of_known_speed_run(tmp_path: Path) -> None:
    planted, seeded = figures("trust.py", tmp_path)["quick"]["each"]
    assert planted["rounds"] == seeded["rounds"] == 2
    assert set(planted) == {"rounds", "noise", "repeat", "alike", "slower"}
    assert 0 < seeded["kept"] <= 1
    assert seeded["winner"] in {f"{strategy}, 32-true, {count}" for strategy in ("ddp", "fsdp") for count in DEVICES}
