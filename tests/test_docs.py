"""Every Python block of the documentation runs, alone and on two ranks; what it names is there."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from fabric_lite.launch.cli import _read
from fabric_lite.testing import RankPool
from tests.faults import record
from tests.test_readme import DIFF, ROOT, blocks, commands, run_block

DOCS = ROOT / "docs"
OURS = ("python", "fabric-run", "fabric-bench", "fabric-ckpt")
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.parent.name != "decisions")


class Block(NamedTuple):
    page: str
    number: int
    source: str

    def __str__(self) -> str:
        return f"{self.page} {self.number}"


PYTHON_BLOCKS = [
    Block(str(page.relative_to(DOCS)), number, source)
    for page in PAGES
    for number, source in enumerate(blocks(page.read_text(encoding="utf-8"), "python"), start=1)
]


@pytest.mark.parametrize("number_of_ranks", [1, 2])
@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=str)
def test_a_python_block_runs_alone_and_on_two_ranks(
    ranks: RankPool, tmp_path: Path, block: Block, number_of_ranks: int
) -> None:
    assert len(ranks.run(run_block, block.source, str(tmp_path), ranks=number_of_ranks)) == number_of_ranks


def test_the_first_page_has_the_readmes_diff() -> None:
    assert blocks((DOCS / "index.md").read_text(encoding="utf-8"), "diff") == [DIFF]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_command_is_one_of_ours_or_starts_one(page: Path) -> None:
    for command in commands(page.read_text(encoding="utf-8")):
        assert shlex.split(command)[0] in (*OURS, "torchrun", "srun", "sbatch", "mpirun"), command


def test_every_option_of_fabric_run_in_the_pages_exists() -> None:
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    lines = [line for text in pages for line in commands(text) if line.startswith("fabric-run")]
    for line in lines:
        words = shlex.split(line)[1:]
        own = list(itertools.takewhile(lambda word: not word.endswith(".py"), words))
        options = _read([*own, *(["script.py"] if "--check" not in own else [])])
        assert options.check == ("--check" in own), line
    assert len(lines) > 5


def test_the_page_of_faults_is_made_of_the_recorded_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(record.FIGURES, tmp_path)
    monkeypatch.setattr(record, "FIGURES", tmp_path / record.FIGURES.name)
    record.write_table()
    assert (tmp_path / "faults.md").read_text() == (DOCS / "faults.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_block_names_its_language(page: Path) -> None:
    fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert all(fences[::2]), "it would be colored as Python"
    assert not any(fences[1::2])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_table_has_a_heading(page: Path) -> None:
    assert not re.search(r"^\|[| ]*\|\n\|[-:| ]+\|$", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE))
    assert listed == {str(page.relative_to(DOCS)) for page in PAGES} | {"decisions/README.md"}


def test_every_public_class_and_function_is_in_the_reference() -> None:
    reference = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").iterdir())
    import fabric_lite
    import fabric_lite.bench
    import fabric_lite.callbacks
    import fabric_lite.loggers
    import fabric_lite.strategies
    import fabric_lite.trainer
    import fabric_lite.utilities

    errors = {name for name in fabric_lite.__all__ if name.endswith("Error")}
    names = {f"fabric_lite.{name}" for name in set(fabric_lite.__all__) - errors - {"EXIT_PREEMPTED"}}
    names |= {f"fabric_lite.callbacks.{name}" for name in fabric_lite.callbacks.__all__ if not name.endswith("Error")}
    names |= {f"fabric_lite.loggers.{name}" for name in fabric_lite.loggers.__all__ if name != "rank_zero_experiment"}
    strategies = {
        f"fabric_lite.strategies.{name}" for name in fabric_lite.strategies.__all__ if name.endswith("Strategy")
    }
    names |= {name for name in strategies if name.replace(".strategies", "") not in names}
    names |= {f"fabric_lite.bench.{name}" for name in fabric_lite.bench.__all__}
    names |= {f"fabric_lite.utilities.{name}" for name in set(fabric_lite.utilities.__all__) - set(fabric_lite.__all__)}
    names |= {f"fabric_lite.trainer.{name}" for name in ("Trainer", "LightningModule", "Callback")}
    names |= {"fabric_lite.strategies.STRATEGY_REGISTRY", "fabric_lite.errors"}
    names |= {"fabric_lite.plugins.BitsandbytesPrecision", "fabric_lite.accelerators.Accelerator"}
    assert names - set(re.findall(r"^::: (\S+)$", reference, re.MULTILINE)) == set()
