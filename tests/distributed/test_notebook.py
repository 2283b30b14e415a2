"""``launch(function)`` in a real notebook: forked processes, their output and their exceptions in the cell."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.filterwarnings("default")  # of the notebook's own machinery

CELLS = [
    """
    import torch
    from fabric_lite import Fabric

    factor = 3.0


    def train(fabric, steps):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(steps):
            loss = factor * model(torch.full((8, 4), 1.0 + fabric.global_rank)).square().mean()
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        fabric.print("rank 0 of", fabric.world_size)
        return [float(weight) for weight in model.weight.flatten()], fabric.world_size
    """,
    """
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_notebook")
    print(fabric.launch(train, 2))
    """,
    """
    print(fabric.launch(train, steps=2))
    """,
    """
    def fails(fabric):
        if fabric.global_rank == 1:
            raise ZeroDivisionError("on one rank")
        fabric.barrier()


    try:
        fabric.launch(fails)
    except Exception as error:
        print(type(error).__name__, "on one rank" in str(error), "on rank 1" in str(error.__cause__))
    """,
    """
    import multiprocessing, os
    print(len(multiprocessing.active_children()), torch.distributed.is_initialized())
    """,
]


def outputs(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stdout")


def test_a_notebook_trains_on_two_processes(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(textwrap.dedent(cell).strip()) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    _, first, second, failing, last = map(outputs, notebook.cells)
    assert first.count("rank 0 of 2") == 1
    results = [re.findall(r"\(\[.*\], 2\)", text) for text in (first, second)]
    assert len(results[0]) == 1
    assert results[0] == results[1]
    assert failing.split()[1:] == ["True", "True"]
    assert last == "0 False\n"
