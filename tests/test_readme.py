"""The README's Python blocks run, alone and on two ranks; its diff is a script on both sides; its commands exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from fabric_lite.launch.cli import parse_arguments
from fabric_lite.testing import RankPool
from tests.test_examples import printed

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def heading(block: str) -> str:
    """The README's heading above a block."""
    return re.findall(r"^## (.+)$", README[: README.index(block)], re.MULTILINE)[-1]


def commands(text: str) -> list[str]:
    whole = [block.replace("\\\n", "") for block in blocks(text, "bash")]  # lines that go on in the next one
    lines = [line.split("  #")[0].strip() for block in whole for line in block.splitlines()]
    return [part.strip() for line in lines if line for part in line.split("&&")]


PYTHON_BLOCKS = blocks(README, "python")
[DIFF] = blocks(README, "diff")
WITHOUT_FABRIC = "".join(line[1:] for line in DIFF.splitlines(keepends=True) if not line.startswith("+"))
WITH_FABRIC = "".join(line[1:] or "\n" for line in DIFF.splitlines(keepends=True) if not line.startswith("-"))
# The examples are also run to their ends, under torchrun too, in test_examples.py.
STARTED = [command for command in commands(README) if re.match(r"(python|fabric-run) .*examples/\w+\.py", command)]


def run_block(source: str, folder: str) -> None:
    """On a rank: run a block of Python in ``folder``; a warning to the user fails it."""
    before = os.getcwd()
    os.chdir(folder)
    variables: dict[str, Any] = {"__name__": "__main__"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            exec(compile(source, "README.md", "exec"), variables)
    finally:
        os.chdir(before)
    if "fabric" in variables:
        variables["fabric"].close()  # as the end of a script does; this rank lives on


@pytest.mark.parametrize("number_of_ranks", [1, 2])
@pytest.mark.parametrize("source", PYTHON_BLOCKS, ids=heading)
def test_a_python_block_runs_alone_and_on_two_ranks(
    ranks: RankPool, tmp_path: Path, source: str, number_of_ranks: int
) -> None:
    assert len(ranks.run(run_block, source, str(tmp_path), ranks=number_of_ranks)) == number_of_ranks


@pytest.mark.parametrize("source", [WITHOUT_FABRIC, WITH_FABRIC], ids=["without", "with"])
def test_the_diff_is_a_script_that_runs_without_its_added_lines_and_with_them(
    ranks: RankPool, tmp_path: Path, source: str
) -> None:
    ranks.run(run_block, source, str(tmp_path), ranks=1)


def test_the_diff_runs_on_two_ranks(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(run_block, WITH_FABRIC, str(tmp_path), ranks=2)


def test_about_five_lines_are_added() -> None:
    added = [line for line in DIFF.splitlines() if line.startswith("+") and line != "+"]
    assert len(added) == 6
    assert [line for line in DIFF.splitlines() if line.startswith("-")] == ["-    loss.backward()"]


def test_the_first_commands_are_the_two_that_a_newcomer_needs() -> None:
    assert [block.strip() for block in blocks(README, "bash")[:2]] == [
        "pip install -c constraints.txt -e '.[examples]' && fabric-run --devices 2 examples/char_gpt.py",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_command_names_files_that_exist(page: str) -> None:
    for command in commands((ROOT / page).read_text(encoding="utf-8")):
        for word in shlex.split(command):
            if word.endswith((".py", ".txt")) and not word.startswith("-"):
                assert (ROOT / word).is_file(), command


def test_every_link_leads_to_a_file() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        # The figures of a release are added with it.
        assert target.startswith(("https://", "benchmarks/")) or (ROOT / target).is_file(), target


@pytest.mark.parametrize("command", sorted(set(STARTED)))
def test_a_command_starts_its_example_and_its_options_exist(ranks: RankPool, tmp_path: Path, command: str) -> None:
    program, *words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    options = words[words.index(script) + 1 :]
    if program == "fabric-run":
        plan = parse_arguments(words)
        assert (plan.script.target, list(plan.script.arguments)) == (script, options)
    [shown] = ranks.run(printed, tmp_path, Path(script).name, "--help", ranks=1)
    assert shown.startswith("usage:")
    assert {option for option in options if option.startswith("--")} <= set(re.findall(r"--[a-z-]+", shown))


def test_the_options_that_the_readme_names_exist() -> None:
    shown = "".join(
        subprocess.run(
            [sys.executable, *start, "--help"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
        for start in (["-m", "fabric_lite"], ["-c", "from fabric_lite.bench.cli import main; main()"])
    )
    named = set(re.findall(r"`(?:fabric-run )?(--[a-z-]+)", README))
    assert named
    assert named <= set(re.findall(r"--[a-z-]+", shown)), named
