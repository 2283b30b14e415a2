"""Each example runs in every way that its docstring names, and does what it says."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fabric_lite import EXIT_PREEMPTED
from fabric_lite.testing import RankPool

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py"))
SMALL = {
    "char_gpt.py": ["--steps", "2", "--batch-size", "32"],
    "custom_strategy.py": ["--epochs", "3"],
    "early_stopping.py": ["--epochs", "1"],
    "gan.py": ["--epochs", "1"],
    "image_classifier.py": ["--epochs", "1"],
    "resumable.py": ["--epochs", "1"],
    "tensor_parallel.py": ["--steps", "2"],
    "trainer.py": ["--epochs", "1"],
}
PYTHON: list[str] = []
FABRIC_RUN = ["-m", "fabric_lite", "--devices", "2"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]


def run(folder: Path, starter: list[str], script: str, *options: str) -> str:
    """Run an example in ``folder`` and return what it prints; a warning to the user fails it."""
    command = [sys.executable, *starter, str(EXAMPLES / script), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning"}
    finished = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def losses(output: str) -> list[str]:
    return re.findall(r"loss +([\d.]+)", output)


def weights(path: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model"]
    return loaded


def printed(folder: Path, script: str, *options: str) -> str:
    """On a warm rank, which has imported torch already: what an example prints in ``folder``."""
    arguments, place, output = sys.argv, os.getcwd(), io.StringIO()
    sys.argv = [script, *options]
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(output), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = arguments
        os.chdir(place)
    return output.getvalue()


def test_every_example_is_tested() -> None:
    assert {Path(script).name for script in SCRIPTS} == set(SMALL)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_tells_its_options(ranks: RankPool, tmp_path: Path, script: str) -> None:
    [shown] = ranks.run(printed, tmp_path, script, "--help", ranks=1)
    assert shown.startswith("usage:")
    assert SMALL[Path(script).name][0] in shown


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_in_the_docstring_name_the_example(script: str) -> None:
    docstring = (EXAMPLES / script).read_text(encoding="utf-8").split('"""')[1]
    commands = re.findall(r"^    (\S.*)$", docstring, re.MULTILINE)
    assert commands
    assert all(re.match(rf"(python|fabric-run|torchrun)\b.* examples/{script}\b", command) for command in commands)


# Not the GAN: with Fabric each rank draws noise of its own, from another seed.
@pytest.mark.parametrize("script", ["char_gpt.py", "image_classifier.py"])
def test_one_process_computes_what_plain_pytorch_computes(ranks: RankPool, tmp_path: Path, script: str) -> None:
    [plain], [with_fabric] = (
        ranks.run(printed, tmp_path, path, *SMALL[script], ranks=1) for path in (f"plain/{script}", script)
    )
    assert losses(plain)
    without_speed, expected = (re.sub(r"[\d,]+ tokens/s", "", output) for output in (with_fabric, plain))
    assert without_speed == expected


def test_torchrun_and_fabric_run_print_the_same(tmp_path: Path) -> None:
    by_fabric_run, by_torchrun = (
        run(tmp_path, starter, "gan.py", "--epochs", "1") for starter in (FABRIC_RUN, TORCHRUN)
    )
    assert "between ranks: 0.0\n" in by_fabric_run
    assert by_fabric_run == by_torchrun


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("char_gpt")


@pytest.fixture(scope="module")
def whole_run(folder: Path) -> str:
    """What char_gpt prints in a run of 30 steps that nothing interrupts."""
    return run(folder, FABRIC_RUN, "char_gpt.py", "--steps", "30", "--batch-size", "8", "--checkpoint", "whole.pt")


def test_char_gpt_learns_and_writes_a_sample(whole_run: str) -> None:
    assert re.search(r"^361,\d+ parameters, 1,024 tokens per step$", whole_run, re.MULTILINE)
    first, *_, last = map(float, losses(whole_run))
    assert last < first - 1.5  # 4.8 at the start, some 2.9 after 30 steps
    bits = re.search(r"held-out text: ([\d.]+) bits per character\n", whole_run)
    assert bits
    assert float(bits[1]) < 5
    assert len(whole_run[bits.end() :]) > 300


def test_char_gpt_goes_on_as_if_it_had_not_been_interrupted(folder: Path, whole_run: str) -> None:
    options = ["--batch-size", "8", "--resume", "--checkpoint", "interrupted.pt"]
    begun = run(folder, FABRIC_RUN, "char_gpt.py", *options, "--steps", "5")
    assert "resumed" not in begun  # there was nothing to resume
    resumed = run(folder, FABRIC_RUN, "char_gpt.py", *options, "--steps", "30")
    assert resumed.startswith("resumed at step 5\n")
    assert losses(resumed) == losses(whole_run)[1:]
    expected, found = weights(folder / "whole.pt"), weights(folder / "interrupted.pt")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_run_that_is_asked_to_leave_ends_like_one_that_nobody_stopped(tmp_path: Path) -> None:
    options = ["--epochs", "4"]
    *_, undisturbed = run(tmp_path, PYTHON, "resumable.py", *options, "--folder", "whole").splitlines()
    command = [sys.executable, "-u", str(EXAMPLES / "resumable.py"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "starting fresh\n"
        process.terminate()
        assert process.wait(60) == EXIT_PREEMPTED
        saved = re.match(r"saved resumable/step-(\d+); ", process.stdout.read())
    assert saved
    resumed, *_, total = run(tmp_path, PYTHON, "resumable.py", *options).splitlines()
    assert resumed.startswith(f"resumed from step {int(saved[1])}, epoch ")
    assert resumed.endswith("; 0 samples repeated, 0 skipped")
    assert total == undisturbed


def test_the_image_classifier_reads_97_percent_of_the_digits_on_two_ranks(tmp_path: Path) -> None:
    output = run(tmp_path, FABRIC_RUN, "image_classifier.py")
    [*_, (share, shown)] = re.findall(r"([\d.]+)% of (\d+) test images right", output)
    assert float(share) >= 97
    assert int(shown) == 359  # an odd number: each once, none repeated to fill a rank up


def test_the_gan_draws_the_ring_with_equal_weights_on_both_ranks(tmp_path: Path) -> None:
    output = run(tmp_path, FABRIC_RUN, "gan.py", "--epochs", "10")
    assert "largest difference of a weight between ranks: 0.0\n" in output
    [*_, near] = re.findall(r"on the ring (\d+)%", output)
    assert int(near) >= 70


def test_the_gan_runs_in_one_process(tmp_path: Path) -> None:
    assert "on the ring" in run(tmp_path, PYTHON, "gan.py", *SMALL["gan.py"])


@pytest.mark.parametrize("number_of_ranks", [1, 2])
def test_the_strategy_of_ones_own_ends_with_the_weights_of_ddp(
    ranks: RankPool, tmp_path: Path, number_of_ranks: int
) -> None:
    output, *_ = ranks.run(printed, tmp_path, "custom_strategy.py", *SMALL["custom_strategy.py"], ranks=number_of_ranks)
    ours, theirs = losses(output)
    assert ours == theirs
    assert output.endswith("largest difference of a weight: 0.0\n")


def test_the_strategy_of_ones_own_is_shorter_than_50_lines() -> None:
    source = (EXAMPLES / "custom_strategy.py").read_text(encoding="utf-8")
    strategy = source[source.index("@dataclasses.dataclass") : source.index("def train")]
    assert len(strategy.splitlines()) < 50


def test_the_gpt_whose_layers_are_cut_learns_on_four_ranks_and_goes_on_on_two(tmp_path: Path) -> None:
    four, two = (["-m", "fabric_lite", "--devices", ranks] for ranks in ("4", "2"))
    begun = run(tmp_path, four, "tensor_parallel.py", "--steps", "15")
    assert "data_parallel 2, tensor_parallel 2" in begun
    first, last = map(float, losses(begun))
    assert last < first - 1.5  # 4.9 at the start, some 3.2 after 15 steps
    resumed = run(tmp_path, two, "tensor_parallel.py", "--steps", "16", "--resume")
    assert "data_parallel 1, tensor_parallel 2" in resumed
    assert "resumed at step 15\n" in resumed
    assert float(losses(resumed)[-1]) < first - 1.5


def test_a_run_stops_by_itself_and_one_that_was_left_before_does_as_well_at_the_same_epoch(tmp_path: Path) -> None:
    whole = run(tmp_path, FABRIC_RUN, "early_stopping.py", "--folder", "whole")
    [stop] = re.findall(r"^no better for 2 epochs: stopped after epoch (\d+)$", whole, re.MULTILINE)
    assert 3 <= int(stop) < 50
    left = run(tmp_path, FABRIC_RUN, "early_stopping.py", "--folder", "parts", "--epochs", str(int(stop) - 1))
    rest = run(tmp_path, FABRIC_RUN, "early_stopping.py", "--folder", "parts")
    assert "no better" not in left
    measured = re.compile(r"^ +val_loss .*$", re.MULTILINE)
    assert measured.findall(left) + measured.findall(rest) == measured.findall(whole)
    assert rest.splitlines()[-2:] == [line.replace("whole/", "parts/") for line in whole.splitlines()[-2:]]
    [rows] = tmp_path.glob("parts/**/metrics.csv")
    steps = [row.split(",")[0] for row in rows.read_text().splitlines()[1:]]
    assert len(steps) == len(set(steps))


@pytest.mark.parametrize("starter", [PYTHON, FABRIC_RUN], ids=["python", "fabric-run"])
def test_the_trainer_reads_95_percent_of_the_digits(tmp_path: Path, starter: list[str]) -> None:
    output = run(tmp_path, starter, "trainer.py")
    [share] = re.findall(r"val_accuracy ([\d.]+)$", output, re.MULTILINE)
    assert float(share) > 0.95
