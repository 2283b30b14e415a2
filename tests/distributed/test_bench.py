"""A script is run under every combination, measured, and held against one process that gets the batches of all."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fabric_lite import bench
from fabric_lite.bench import Row, cli
from fabric_lite.bench.cli import main
from fabric_lite.errors import FabricValueError, LaunchError

SCRIPT = str(Path(__file__).with_name("bench_script.py"))
ODD_SCRIPT = str(Path(__file__).with_name("bench_odd_script.py"))

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def rows_of(*arguments: str, script: str = SCRIPT, **options: Any) -> list[Row]:
    given = {"devices": [2], "strategies": ["ddp"], "precisions": ["32-true"], "rounds": 1, "steps": 3, "warmup": 1}
    return list(bench.run(script, *arguments, **(given | options)).rows)


def test_every_combination_is_measured_in_every_round_and_the_baseline_twice() -> None:
    rows = rows_of(devices=[1, 2], strategies=["ddp", "fsdp"], precisions=["32-true", "bf16-mixed"], rounds=2)
    assert [row.failure for row in rows] == [None] * 9
    assert len({row.combination for row in rows}) == 8
    assert [row.is_repeat for row in rows] == [False] * 8 + [True]
    assert rows[-1].combination == rows[0].combination
    for row in rows:
        assert [len(seconds) for seconds in row.step_seconds] == [3, 3]
        assert row.samples_per_step == 16 * row.combination.devices
        assert row.tokens_per_step is None  # the inputs are numbers
        assert sum(row.phases.values()) > 0
        assert row.memory is not None
        assert row.memory.resident > 50 << 20
        assert row.startup_seconds is not None
        assert (row.exposed_communication is None) == (row.combination.devices == 1)
        assert row.is_repeat == (row.comparison is None)
        assert row.is_repeat or (row.comparison is not None and row.comparison.verdict == "same"), row.comparison


MISTAKES = [
    "no sync",
    "sum",
    "mean twice",
    "skipped clip",
    "rounded gradients",
    "lost gradient",
    "own gradients",
    "decay",
    "kept gradients",
    "learning rate",
]
# By less than rounding does. Gradients rounded to bfloat16 are what this precision computes; and those that are kept
# are scaled to one norm by the script's clipping, where they are 8 % off: a right char_gpt under fsdp is 5 %.
HIDDEN_BY_ROUNDING = ["rounded gradients", "kept gradients"]


@pytest.mark.parametrize(
    "mistake", [*MISTAKES[:3], *(pytest.param(one, marks=pytest.mark.full) for one in MISTAKES[3:])]
)
def test_wrong_mathematics_is_found(mistake: str) -> None:
    [row, _] = rows_of(mistake, steps=2, warmup=0)
    assert row.failure is None
    assert row.comparison is not None
    assert row.comparison.verdict == "differs", row.comparison
    assert row.comparison.reason


@pytest.mark.full
@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_mathematics_is_found_in_bf16_where_it_is_more_than_rounding(mistake: str) -> None:
    [row, _] = rows_of(mistake, precisions=["bf16-mixed"], steps=2, warmup=0)
    assert row.comparison is not None
    assert row.comparison.verdict == ("same" if mistake in HIDDEN_BY_ROUNDING else "differs"), row.comparison


@pytest.mark.full
def test_a_second_step_on_the_same_gradients_is_refused() -> None:
    row, _ = rows_of("double step", steps=2, warmup=0)
    assert row.failure is not None
    assert "was not called since the last step" in row.failure


@pytest.mark.parametrize(
    ("script", "verdict", "reason"),
    [
        ("dropout", "same", ""),  # it is turned off
        ("unseeded", "same", ""),  # all begin with the weights of the first run
        ("functional dropout", "not comparable", "draw random numbers"),
        ("batch norm", "not comparable", "batch normalization"),
    ],
)
def test_what_can_be_compared(script: str, verdict: str, reason: str) -> None:
    [row, _] = rows_of(script, steps=2, warmup=0)
    assert row.comparison is not None
    assert row.comparison.verdict == verdict, row.comparison
    assert reason in row.comparison.reason


@pytest.mark.parametrize(
    ("script", "options", "failure"),
    [
        ("raises", {}, "failed: ValueError: a bad batch, at bench_script.py:"),
        ("short", {}, "the script ended after 4 steps of the 7 that are needed"),
        ("none", {"strategies": ["nonsense"]}, "This strategy does not exist"),
    ],
)
def test_a_run_that_fails_is_a_row_with_its_cause(script: str, options: dict[str, Any], failure: str) -> None:
    row, _ = rows_of(script, **options)
    assert row.failure is not None
    assert failure in row.failure
    assert "\n" not in row.failure


ODD = [
    "checkpoints",
    "evaluates",
    "several models",
    "another fabric",
    "few batches",
    "own data",
    "batch sampler",
    "accumulates",
    "catches exits",
]


@pytest.mark.parametrize("what", [*ODD[:3], *(pytest.param(one, marks=pytest.mark.full) for one in ODD[3:])])
def test_what_is_out_of_the_ordinary_is_measured_all_the_same(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for row in rows_of(what, script=ODD_SCRIPT, strategies=["ddp", "fsdp"], rounds=2, steps=6):
        assert row.failure is None
        assert row.samples_per_step == 32  # those of batches that are trained on
        assert row.is_repeat or (row.comparison is not None and row.comparison.verdict == "same"), row.comparison
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("what", "phase", "least_seconds"),
    [("slow to start", "data", 0.04 / 3), ("waits for saves", "save", 0.01)],
)
def test_the_start_of_an_epoch_is_waiting_for_data_and_waiting_for_a_save_is_saving(
    what: str, phase: str, least_seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row, _ = rows_of(what, script=ODD_SCRIPT, devices=[1], steps=6, check_steps=0)
    assert row.failure is None
    assert row.phases[phase] > least_seconds
    [steps] = row.step_seconds
    assert sum(row.phases.values()) == pytest.approx(sum(steps) / len(steps))


def test_steps_that_the_loss_scaler_skips_are_not_compared() -> None:
    [row, _] = rows_of("none", precisions=["16-mixed"])
    assert row.failure is None
    assert row.comparison is not None
    assert row.comparison.verdict != "differs", row.comparison


def test_batches_that_are_no_tensors_go_through() -> None:
    [row, _] = rows_of("numpy batches", script=ODD_SCRIPT)
    assert row.failure is None
    assert row.samples_per_step is None


def test_a_batch_size_that_cannot_be_set_is_said() -> None:
    row, _ = rows_of("batch sampler", script=ODD_SCRIPT, batch_sizes=[4])
    assert row.failure is not None
    assert "The batch size of this loader cannot be set from outside" in row.failure


def test_the_scripts_own_strategy_is_left_to_it() -> None:
    [row, _] = rows_of(strategies=["script"], precisions=["script"])
    assert row.failure is None
    assert row.combination.command(["train.py"]) == "fabric-run --devices 2 train.py"


def test_checkpoints_of_the_script_go_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [row, _] = rows_of("saves")
    assert row.failure is None
    assert row.phases["save"] > 0
    assert os.listdir(tmp_path) == []


def test_the_batch_size_is_changed_from_outside() -> None:
    rows = rows_of(batch_sizes=[4, 64], check_steps=0)
    assert [row.samples_per_step for row in rows] == [8, 128, 8]


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(LaunchError, match="does not exist"):
        bench.run("nowhere.py")
    with pytest.raises(FabricValueError, match="steps is at least 2"):
        rows_of(steps=1)
    with pytest.raises(FabricValueError, match="baseline is none of the combinations"):
        rows_of(baseline="fsdp")


def test_the_command_prints_a_table_writes_its_files_and_compares_with_stored_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--rounds", "4", "--steps", "3", "--warmup", "1", "--devices", "1", "--precision", "32-true"]
    assert main([*short, "--strategy", "ddp", SCRIPT]) == 0
    printed = capfd.readouterr()
    assert "ddp, 32-true, 1 device" in printed.out
    assert f"Run it: fabric-run --devices 1 --strategy ddp --precision 32-true {SCRIPT}" in printed.out
    assert "of 9 runs done" in printed.err
    assert sorted(os.listdir(tmp_path)) == ["fabric_bench.html", "fabric_bench.json"]
    stored = json.loads((tmp_path / "fabric_bench.json").read_text())
    for row in stored["rows"]:
        row["step_seconds"] = [[seconds / 1000 for seconds in steps] for steps in row["step_seconds"]]
    (tmp_path / "fast.json").write_text(json.dumps(stored))
    bar = ["--fail-below", "0.9", "--against", "fast.json", "--output", "now.csv", "--check-steps", "0"]
    assert main([*short, "--strategy", "ddp", *bar, SCRIPT]) == 1
    assert "Fails: ddp, 32-true, 1 device" in capfd.readouterr().out
    assert (tmp_path / "now.csv").read_text().count("\n") == 3


def test_a_strategy_that_is_misspelled_costs_nobody_the_results_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fabric_bench.json").write_text("of before")
    misspelled = ["--devices", "1", "--precision", "32-true", "--strategy", "fdsp", SCRIPT]
    assert main(misspelled) == 1
    assert "written" not in capfd.readouterr().out
    assert (tmp_path / "fabric_bench.json").read_text() == "of before"
    assert main(["--output", "named.json", *misspelled]) == 1
    assert json.loads((tmp_path / "named.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "There is no script to run"),
        (["nowhere.py"], "The script does not exist"),
        (["--fail-below", "0.9", SCRIPT], "A bar needs a stored result"),
        ([str(Path(__file__).parent)], "The script is a folder"),
        (["--fail-below", "nan", "--against", "nowhere.json", SCRIPT], "A bar is a number above 0"),
        (["--output", "figures.txt", SCRIPT], "files of this kind"),
        (["--output", "nowhere/figures.json", SCRIPT], "could not be written there"),
        (["--output", "/dev/null/figures.json", SCRIPT], "could not be written there"),
        (["--against", "nowhere.json", "--fail-below", "1", SCRIPT], "could not be read as results"),
        (["--steps", "1", SCRIPT], "steps is at least 2"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("option", "text"), [("--devices", "a"), ("--devices", "2,0"), ("--strategy", "")])
def test_a_list_of_nothing_or_of_no_numbers_is_refused(
    option: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([option, text, SCRIPT])
    said = capsys.readouterr().err
    assert "is no list of numbers of at least 1" in said or "names nothing" in said


def test_a_file_that_cannot_be_written_keeps_no_other_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    results = bench.run(SCRIPT, devices=[1], strategies=["ddp"], precisions=["32-true"], rounds=1, steps=2, warmup=0)

    def run(*_: Any, **__: Any) -> Any:
        (tmp_path / "gone").rmdir()
        return dataclasses.replace(results, is_complete=False, stopped_by="an interrupt")

    (tmp_path / "gone").mkdir()
    monkeypatch.setattr(cli, "run", run)
    assert main(["--output", "gone/one.json", "--output", "two.json", SCRIPT]) == 2
    printed = capfd.readouterr()
    assert "written: two.json" in printed.out
    assert "stopped early by an interrupt" in printed.err
    assert "The results could not be written" in printed.err


def test_a_second_interrupt_does_not_disturb_what_the_first_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*_: Any, **__: Any) -> Any:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", run)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert main([SCRIPT]) == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert "stopped before the end of the first round" in capfd.readouterr().err


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['fabric-bench', '--help']; from fabric_lite.bench.cli import main\n"
    code += "try: main()\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: fabric-bench [OPTIONS] SCRIPT [ARGS...]")
    assert done.stdout.endswith("False\n")


def test_the_batch_size_that_is_found_is_the_largest_that_the_data_has_or_a_faster_one(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["--find-batch-size", "--devices", "2", "--batch-size", "128", SCRIPT]) == 0
    printed = capfd.readouterr().out
    sizes = [line.split()[0] for line in printed.splitlines()[1:-1]]
    # 4096 samples on two ranks are 7 batches of 292.
    assert sizes[:2] == ["128", "256"]
    assert "512  the data has no 7 batches of this size" in printed
    assert "Largest that was seen to fit: 2" in printed


def test_a_script_that_does_not_run_has_no_batch_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--find-batch-size", SCRIPT, "raises"]) == 2
    assert "does not run with the batch size to begin with" in capsys.readouterr().err
