"""Imports go down the layers only; the public names are there; nothing heavy is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fabric_lite

PACKAGE = Path(fabric_lite.__file__).parent
LAYERS = [
    {"errors", "accelerator_names", "trees", "attribute_dict", "process_end", "whole_file", "progress_bar", "machine"},
    {"policy", "precision_layers", "precision_float8_layer"},
    {"precision_float8", "precision_low_bits", "precision_transformer_engine"},
    {"precision", "topology", "run_config", "deferred", "parameters", "activation_checkpointing"},
    {"call_site", "movement", "side_store", "device", "meeting", "listening"},
    {"collective_check"},
    {"adopt", "mesh", "collectives", "init", "seed", "hooks", "clearing", "loss_scaling", "clipping"},
    {"extension", "optim", "notices", "signals", "watch_position"},
    {"guards", "hooked", "buffers", "checked_calls", "agreement", "steps", "watch_report"},
    {"preemption", "watch"},
    {"route"},
    {"strategies", "checkpoint", "data", "launch", "loggers"},
    {"run", "registry"},
    {"run_record"},
    {"identity", "setting_up"},
    {"communication", "checkpointing", "stepping", "reporting"},
    {"fabric", "kept"},
    {"checkpoints", "flops"},
    {"throughput", "profiling", "callbacks"},
    {"testing", "bench", "trainer", "names", "check", "ray"},
    {"accelerators", "plugins", "utilities", "wrappers"},
    {"__main__"},
]


def layer_of(module: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if module in names)


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fabric_lite":
            parts = node.module.split(".")
            names = [alias.name for alias in node.names]
            found |= {parts[1]} if len(parts) > 1 else {fabric_lite._HOMES.get(name, name) for name in names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("fabric_lite.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_lower_layers(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for other in imported_modules(path) - {room}:
        assert layer_of(other) < layer_of(room), f"{room} imports {other}"


def test_no_module_asks_for_the_type_of_a_strategy() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                names = ast.unparse(node.args[1])
                allowed = path.name == "__init__.py" and path.parent.name == "strategies"  # parsing the argument
                assert "Strategy" not in names or allowed, f"{path}:{node.lineno}"


def test_every_public_name_is_there_and_documented() -> None:
    for name in fabric_lite.__all__:
        assert getattr(fabric_lite, name).__doc__, name
    assert set(dir(fabric_lite)) == set(fabric_lite.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fabric_lite.nonsense


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import fabric_lite", ["torch"]),
        ("import fabric_lite.launch.cli", ["torch", "numpy"]),
        ("import fabric_lite.ray", ["torch", "ray"]),
        ("from fabric_lite import Fabric", ["torch._dynamo", "sympy"]),
        ("from fabric_lite import Fabric; Fabric(accelerator='cpu', devices=1)", ["torch._dynamo", "sympy"]),
    ],
)
def test_importing_loads_nothing_heavy(statement: str, absent: list[str]) -> None:
    code = f"import sys; {statement}; print([m for m in {absent} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
