"""What ``fabric-bench --simulate`` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from fabric_lite.bench.simulation_table import Cluster, simulated_table
from fabric_lite.errors import FabricValueError

SCRIPT = """
import sys
import torch
from torch import nn
from fabric_lite import Fabric

fabric = Fabric()
fabric.launch()
model = nn.Linear(64, 64)
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters()))
for _ in range(9):
    loss = model(torch.ones(2, 64)).sum()
    if "--fail" in sys.argv:
        raise ValueError("my own bug")
    print(f"{loss:.3f}", model.weight.detach().numpy().mean())
    fabric.backward(loss)
    optimizer.step()
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return str(path)


def test_rows_are_named_in_words_and_say_what_is_not_simulated(script: str) -> None:
    strategies = ["script", "fsdp_cpu_offload"]
    text, found_any = simulated_table([script], Cluster(8, 1, "h100-80gb"), strategies, ["script"])
    assert found_any
    assert "1 node, h100-80gb, in the script's own precision: simulated" in text
    assert "  MiB into collectives  " in text
    [fits] = [line for line in text.splitlines() if " fits: " in line]
    assert fits.startswith("the script's own strategy fits: ")
    assert fits.endswith(" MiB of 76,294 MiB (80 GB).")
    assert "fsdp_cpu_offload: offload is not simulated: " in text
    assert "the script's own strategy a step: 1 all_reduce" in text
    assert "fsdp_cpu_offload a step: 1 all_gather, 1 reduce_scatter" in text
    assert text.count("Note: the script reads numbers of tensors, first at own.py:15") == 1


def test_a_cause_is_said_once_with_its_line_and_what_to_try(script: str) -> None:
    progress: list[str] = []
    text, found_any = simulated_table(
        [script, "--fail"], Cluster(8), ["ddp", "fsdp"], ["script"], progress=progress.append
    )
    assert not found_any
    assert progress == ["ddp", "fsdp"]
    *_, cause, remedy = text.splitlines()
    assert cause == "ddp, fsdp could not be simulated: ValueError: my own bug, at own.py:14"
    assert remedy.startswith(f"  Try: `python {script} --fail`")


@pytest.mark.parametrize(("strategy", "precision"), [("nonsense", "script"), ("ddp", "nonsense")])
def test_names_are_checked_before_anything_is_simulated(strategy: str, precision: str) -> None:
    progress: list[str] = []
    with pytest.raises(FabricValueError, match="does not exist"):
        simulated_table(["script.py"], Cluster(8), ["ddp", strategy], ["script", precision], progress=progress.append)
    assert progress == []
