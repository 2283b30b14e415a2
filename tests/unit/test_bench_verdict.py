"""What the figures mean, in sentences; and whether a stored result is still reached."""

from __future__ import annotations

import dataclasses
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from fabric_lite.bench.limits import limit_of
from fabric_lite.bench.results import About, Combination, Comparison, Memory, Results, Row
from fabric_lite.bench.statistics import DEFAULT_ROUNDS
from fabric_lite.bench.verdict import fail_below, judge
from tests.noise import gaussian, rows_of

ABOUT = About("2025-01-01", "a processor", 2, None, "3.12", "2.9", "fabric-bench train.py")
SINGLE = Combination("single_device", "32-true", 1)
DDP, FSDP = Combination("ddp", "32-true", 2), Combination("fsdp", "32-true", 2)
WRONG = Comparison("differs", loss=0.3, gradient=0.5, parameters=0.4, tolerance=1e-4, reason="gradients are off")
PHASES = {"data": 0.01, "forward": 0.03, "backward": 0.05, "optimizer": 0.01, "save": 0.0, "other": 0.0}
# The rounds of each row: their standard deviation is 0.87 %.
ROUNDS = [math.exp(0.01 * part) for part in (-1.4, -0.9, -0.5, -0.2, 0.0, 0.2, 0.5, 0.9, 1.4)]


def row(combination: Combination, seconds: float, **fields: Any) -> Row:
    """Rounds of one step of about ``seconds``, and eight samples a device."""
    rounds = [[seconds * factor] for factor in ROUNDS]
    return Row(combination, **{"step_seconds": rounds, "samples_per_step": 8.0 * combination.devices, **fields})


def results_of(*rows: Row, repeat: bool = True, about: About = ABOUT) -> Results:
    """With the first row as the baseline, repeated with other noise."""
    first = rows[0]
    again = [dataclasses.replace(first, step_seconds=first.step_seconds[::-1], is_repeat=True)] if repeat else []
    return Results(["train.py", "--lr", "0.1"], [*rows, *again], first.combination.name, about, steps=1, warmup=1)


def test_the_winner_is_named_with_its_figures_and_its_command_line() -> None:
    verdict = judge(results_of(row(SINGLE, 0.1), row(DDP, 0.125), row(FSDP, 0.2)))
    assert verdict.winners == ["ddp, 32-true, 2 devices"]
    assert verdict.wrong == []
    # 16 samples in 0.125 s are 128 a second, 1.6 times the 80 of a single device, so 0.8 of two.
    assert verdict.sentences[0].startswith("ddp, 32-true, 2 devices is the fastest: 128.0 samples/s (95 %: ")
    assert "1.600 (99 %: " in verdict.sentences[0]
    assert "times the baseline, single_device, 32-true, 1 device" in verdict.sentences[0]
    assert verdict.sentences[1] == "It keeps 80% of the throughput of 2 single devices."
    assert verdict.command == "fabric-run --devices 2 --strategy ddp --precision 32-true train.py --lr 0.1"
    assert verdict.sentences[-1] == f"Run it: {verdict.command}"
    assert str(verdict).splitlines() == list(verdict.sentences)


def test_figures_of_a_fast_script_are_written_as_in_the_table() -> None:
    [said, *_] = judge(results_of(row(SINGLE, 0.0001))).sentences
    assert "the fastest: 80,000 samples/s (95 %: 79," in said
    assert "e+" not in said


def test_a_baseline_that_wins_is_not_compared_with_itself() -> None:
    verdict = judge(results_of(row(SINGLE, 0.01), row(DDP, 0.125)))
    assert verdict.winners == [SINGLE.name]
    assert verdict.sentences[0].endswith("it is the baseline.")


def test_two_that_are_alike_cannot_be_told_apart_and_the_noise_is_given() -> None:
    verdict = judge(results_of(row(DDP, 0.1), row(FSDP, 0.1005), row(SINGLE, 0.2)))
    assert verdict.winners == [DDP.name, FSDP.name]
    (said,) = [sentence for sentence in verdict.sentences if "cannot be told apart" in sentence]
    # The repeat has the baseline's noise of 0.87 % in reverse: twice that between the two.
    assert said.startswith(
        "ddp, 32-true, 2 devices and fsdp, 32-true, 2 devices cannot be told apart at this noise (1.7 % a round): "
    )
    assert any(
        sentence.startswith("Noise: the baseline and its repeat differ by 1.7 %") for sentence in verdict.sentences
    )


def test_one_round_tells_nothing_apart_and_the_noise_is_not_known() -> None:
    short = [dataclasses.replace(r, step_seconds=r.step_seconds[:1]) for r in (row(DDP, 0.1), row(FSDP, 0.5))]
    verdict = judge(results_of(*short))
    assert verdict.winners == [DDP.name, FSDP.name]
    assert verdict.sentences[0].startswith("ddp, 32-true, 2 devices is the fastest in the only round: ")
    assert verdict.sentences[1] == (
        "One round tells nothing apart: that it had 5 times the throughput of fsdp, 32-true, 2 devices may be noise. "
        "Try: --rounds 9, and a larger --budget if that has ended it."
    )
    assert "noise of this machine is not known" in str(verdict)
    assert "inf" not in str(verdict)


def test_of_one_round_there_is_one_sentence_however_many_others_there_are() -> None:
    halves = [dataclasses.replace(combination, precision="bf16-mixed") for combination in (DDP, FSDP)]
    rows = [row(one, seconds) for one, seconds in zip([DDP, FSDP, *halves], (0.1, 0.2, 0.3, 0.4), strict=True)]
    verdict = judge(results_of(*(dataclasses.replace(one, step_seconds=one.step_seconds[:1]) for one in rows)))
    assert verdict.winners == [one.combination.name for one in rows]
    (said,) = [sentence for sentence in verdict.sentences if "apart" in sentence]
    assert "that it had 2 to 4 times the throughput of the 3 others may be noise" in said


def test_what_is_fast_but_wrong_does_not_win_and_is_named() -> None:
    verdict = judge(results_of(row(SINGLE, 0.1), row(DDP, 0.05, comparison=WRONG), row(FSDP, 0.15)))
    assert verdict.winners == [FSDP.name]
    assert verdict.wrong == [DDP.name]
    assert (
        "Fast but wrong: ddp, 32-true, 2 devices has 3 times the throughput of fsdp, 32-true, 2 devices, but does not "
        "compute what one process would: gradients are off."
    ) in verdict.sentences


def test_what_is_slow_and_wrong_is_named_too() -> None:
    verdict = judge(
        results_of(row(SINGLE, 0.1), row(DDP, 5.0, comparison=dataclasses.replace(WRONG, reason="no seed")))
    )
    assert verdict.wrong == [DDP.name]
    assert any(s.startswith("Wrong: ddp, 32-true, 2 devices") and s.endswith(": no seed.") for s in verdict.sentences)


def test_a_winner_whose_mathematics_could_not_be_compared_is_said_to_be_so() -> None:
    unknown = Comparison("not comparable", reason="dropout draws other numbers on each rank.")
    verdict = judge(results_of(row(SINGLE, 0.1), row(DDP, 0.05, comparison=unknown)))
    assert verdict.winners == [DDP.name]
    assert "is not known: dropout draws other numbers on each rank." in str(verdict)


def test_all_wrong_is_no_winner() -> None:
    verdict = judge(results_of(row(DDP, 0.1, comparison=WRONG)))
    assert (verdict.winners, verdict.command, verdict.limit) == ([], None, None)
    assert verdict.sentences[0] == "No winner: 1 combination ran, and none computes what one process would."


def test_if_all_failed_the_first_cause_comes_first_and_once() -> None:
    out_of_memory = "RuntimeError: out of memory"
    failures = [(SINGLE, out_of_memory), (DDP, "ValueError: no"), (FSDP, out_of_memory)]
    verdict = judge(results_of(*(Row(combination, failure=failure) for combination, failure in failures), repeat=False))
    assert verdict.winners == []
    assert verdict.sentences == [
        "No combination ran.",
        "Failed: single_device, 32-true, 1 device; fsdp, 32-true, 2 devices. Cause: RuntimeError: out of memory",
        "Failed: ddp, 32-true, 2 devices. Cause: ValueError: no",
    ]


def test_what_failed_is_said_beside_a_winner() -> None:
    verdict = judge(results_of(Row(SINGLE, failure="killed"), row(DDP, 0.1), repeat=False))
    assert verdict.winners == [DDP.name]
    assert "Failed: single_device, 32-true, 1 device. Cause: killed" in verdict.sentences


def test_a_repeat_that_was_told_apart_is_a_warning() -> None:
    results = results_of(row(SINGLE, 0.1), row(DDP, 0.1))
    repeat = dataclasses.replace(results.rows[-1], step_seconds=row(SINGLE, 0.12).step_seconds)
    assert "Beware: single_device, 32-true, 1 device and its repeat were told apart" in str(
        judge(dataclasses.replace(results, rows=[*results.rows[:-1], repeat]))
    )
    assert "Beware" not in str(judge(results))


def test_steps_of_different_devices_without_samples_are_a_warning() -> None:
    rows = [row(SINGLE, 0.1, samples_per_step=None), row(DDP, 0.2, samples_per_step=None)]
    assert "10.00 steps/s" in str(judge(results_of(*rows)))
    assert "Beware: no batch shows how many samples it has" in str(judge(results_of(*rows)))
    assert "Beware" not in str(judge(results_of(rows[0])))


def test_a_batch_size_is_said_beside_the_command_line() -> None:
    verdict = judge(results_of(row(dataclasses.replace(DDP, batch_size=64), 0.1)))
    assert verdict.sentences[-1].endswith("train.py --lr 0.1  (with batch_size=64 in the script's loaders)")
    assert "64" not in shlex.split(verdict.command or "")


@pytest.mark.parametrize(
    ("phases", "exposed", "part", "share", "knob"),
    [
        ({"data": 0.06}, None, "data", 0.40, "num_workers"),
        ({}, 0.03, "communication", 0.30, "no_backward_sync"),
        ({"save": 0.01}, None, "save", 0.091, "async_=True"),
        ({"optimizer": 0.06}, None, "optimizer", 0.40, "fused=True"),
        ({"other": 0.10}, None, "other", 0.50, "log every 50 steps"),
        ({}, 0.01, "compute", 0.70, "bf16-mixed"),
        ({"data": 0.06, "optimizer": 0.07}, None, "optimizer", 0.333, "fused=True"),
    ],
)
def test_the_largest_cost_that_is_worth_a_change_limits_and_has_its_knob(
    phases: dict[str, float], exposed: float | None, part: str, share: float, knob: str
) -> None:
    winner = row(DDP, 0.1, phases={**PHASES, **phases}, exposed_communication=exposed)
    limit = judge(results_of(winner)).limit
    assert limit is not None
    assert (limit.part, limit.share) == (part, pytest.approx(share, abs=0.001))
    assert f"{limit.share:.0%} of a step" in limit.sentences[0]
    assert knob in limit.sentences[0]


def test_the_next_knob_knows_what_was_tried() -> None:
    sharded = row(FSDP, 0.1, phases=PHASES, exposed_communication=0.04)
    assert "--strategy ddp" in said_of_limit(sharded, [sharded])
    assert "larger batch" in said_of_limit(sharded, [sharded, row(DDP, 0.2)])
    offload = Combination("fsdp_cpu_offload", "32-true", 2)
    slow_optimizer = {**PHASES, "optimizer": 0.2}
    assert "--strategy fsdp," in said_of_limit(row(offload, 0.1, phases=slow_optimizer), [])
    assert "each rank updates its part" in said_of_limit(row(DDP, 0.1, phases=slow_optimizer), [])
    assert "each rank" not in said_of_limit(row(SINGLE, 0.1, phases=slow_optimizer), [])
    half = dataclasses.replace(DDP, precision="bf16-mixed")
    assert "bf16" not in said_of_limit(row(half, 0.1, phases=PHASES), []).split("Try:")[1]


def test_no_knob_is_named_that_was_turned_already() -> None:
    slow_optimizer = {**PHASES, "optimizer": 0.05}
    sharded = Combination("fsdp", "32-true", 2)
    assert "fsdp" not in said_of_limit(row(DDP, 0.1, phases=slow_optimizer), [row(sharded, 0.2)])
    half = dataclasses.replace(DDP, precision="bf16-mixed")
    assert "bf16" in said_of_limit(row(DDP, 0.1, phases=PHASES), [row(DDP, 0.1)])
    assert "bf16" not in said_of_limit(row(DDP, 0.1, phases=PHASES), [row(half, 0.2)]).split("Try:")[1]


def said_of_limit(winner: Row, rows: Sequence[Row]) -> str:
    limit = limit_of(winner, rows)
    assert limit is not None
    return limit.sentences[0]


def test_memory_that_is_far_from_the_limit_leaves_room_for_a_larger_batch() -> None:
    winner = row(DDP, 0.1, phases=PHASES, memory=Memory(resident=2**30))  # two ranks share the machine's memory
    assert "It uses 2 of 8 GiB of memory" in str(judge(results_of(winner), memory_limit=8 * 2**30))
    assert "larger batch" not in str(judge(results_of(winner), memory_limit=3 * 2**30))
    on_device = Memory(resident=2**30, device_allocated=2**30, device_reserved=3 * 2**30)
    winner = dataclasses.replace(winner, memory=on_device)
    assert "It uses 3 of 8 GiB of memory" in str(judge(results_of(winner), memory_limit=8 * 2**30))


def test_nothing_is_said_of_a_limit_that_was_not_measured() -> None:
    assert judge(results_of(row(DDP, 0.1))).limit is None


def test_a_stored_result_that_is_clearly_missed_fails() -> None:
    stored = results_of(row(SINGLE, 0.1), row(DDP, 0.1))
    sentences, fails = fail_below(results_of(row(SINGLE, 0.1), row(DDP, 0.12)), stored, 0.98)
    assert fails
    assert sentences[0].startswith("single_device, 32-true, 1 device has 1.000 (99 %: ")
    assert sentences[1].startswith("Fails: ddp, 32-true, 2 devices has 0.833 (99 %: ")
    assert sentences[1].endswith("all of that is below 0.98.")


def test_a_miss_within_the_noise_does_not_fail_and_says_so() -> None:
    sentences, fails = fail_below(results_of(row(DDP, 0.1 / 0.975)), results_of(row(DDP, 0.1)), 0.98)
    assert not fails
    assert sentences[0].endswith("it cannot be told whether that is below 0.98.")
    sentences, fails = fail_below(results_of(row(DDP, 0.1)), results_of(row(DDP, 0.1)), 0.9)
    assert not fails
    assert sentences[0].endswith("none of that is below 0.9.")


def test_a_combination_that_no_longer_runs_fails() -> None:
    stored = results_of(row(SINGLE, 0.1), row(DDP, 0.1))
    sentences, fails = fail_below(results_of(row(SINGLE, 0.1), Row(DDP, failure="killed")), stored, 0.5)
    assert fails
    assert "Fails: ddp, 32-true, 2 devices ran in the stored result, and now does not: killed" in sentences


def test_combinations_of_one_result_only_are_said_and_nothing_in_common_fails() -> None:
    sentences, fails = fail_below(results_of(row(SINGLE, 0.1)), results_of(row(DDP, 0.1)), 0.98)
    assert fails
    assert sentences == [
        "Fails: no combination of now is in the stored result, so nothing was checked.",
        "single_device, 32-true, 1 device has no figures in the stored result.",
        "ddp, 32-true, 2 devices was not run now.",
    ]


def test_other_hardware_is_said() -> None:
    other = dataclasses.replace(ABOUT, processor="another processor", cores=8)
    sentences, fails = fail_below(results_of(row(DDP, 0.1)), results_of(row(DDP, 0.1), about=other), 0.98)
    assert not fails
    assert sentences[0].startswith("The stored result is of another processor (another processor; now a processor)")
    assert sentences[1].startswith("The stored result is of another number of cores (8; now 2)")


def test_a_slow_down_of_5_percent_fails_and_the_same_again_does_not_in_95_of_100_replays() -> None:
    fails = {0.1: 0, 0.1 / 0.93: 0}
    for seed in range(100):
        stored = rows_of(gaussian(0.02), {DDP: 0.1}, seed=seed, rounds=DEFAULT_ROUNDS)
        for number, seconds in enumerate(fails, start=1):
            rows = rows_of(gaussian(0.02), {DDP: seconds}, seed=1000 * number + seed, rounds=DEFAULT_ROUNDS)
            now, before = (Results(["train.py"], r, DDP.name, ABOUT, steps=20, warmup=5) for r in (rows, stored))
            fails[seconds] += fail_below(now, before, 0.98)[1]
    assert fails[0.1] <= 5
    assert fails[0.1 / 0.93] >= 95


def test_the_verdict_and_its_statistics_load_no_torch() -> None:
    code = "import sys, fabric_lite.bench.verdict; print('torch' in sys.modules, 'scipy' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "False"]


def test_what_is_wrong_now_fails_and_what_is_known_of_then_is_said() -> None:
    now = results_of(row(DDP, 0.1, comparison=WRONG))
    sentences, fails = fail_below(now, results_of(row(DDP, 0.1)), 0.5)
    assert fails
    assert sentences[0].endswith("The stored result does not say whether it did.")
    sentences, _ = fail_below(now, results_of(row(DDP, 0.1, comparison=Comparison("same"))), 0.5)
    assert sentences[0].endswith("It did in the stored result.")


def test_results_that_were_taken_in_another_way_are_named() -> None:
    now, stored = results_of(row(DDP, 0.1)), results_of(row(DDP, 0.1))
    sentences, _ = fail_below(dataclasses.replace(now, in_turns=True), stored, 0.5)
    assert sentences[0].startswith("The stored result was taken one run at a time and this one in turns")


def test_a_wrong_baseline_is_named_and_efficiencies_are_not_taken_from_it() -> None:
    verdict = judge(results_of(row(SINGLE, 0.1, comparison=WRONG), row(DDP, 0.05)))
    assert "times the baseline, single_device, 32-true, 1 device, which is wrong." in verdict.sentences[0]
    assert not any("of the throughput of" in sentence for sentence in verdict.sentences)
