"""The table of ``fabric-bench`` at a terminal."""

from __future__ import annotations

import dataclasses

import pytest

from fabric_lite.bench.results import Memory
from fabric_lite.bench.shown import Interval, figure
from fabric_lite.bench.table import table
from tests.unit.bench_rows import ran, results_of, several

TWO_ROWS = """\
train.py --steps 9
2026-01-02, A processor, 2 cores, Python 3.11.2, torch 2.9.0, 2 steps a round after 1 to warm up, one run at a time

Speed, share of a step
                                  samples/s  tokens/s   p50   p95  data  forward  backward  exposed  optimizer
                                     ± 95 %              ms    ms     %        %         %        %          %
--------------------------------  ---------  --------  ----  ----  ----  -------  --------  -------  ---------
single_device, 32-true, 1 device   400 ±8.0     4,000  10.0  12.0  10.0     30.0      40.0        -       20.0
ddp, 32-true, 2 devices         *  800 ±8.0     8,000  10.0  12.0  10.0     30.0      40.0     10.0       20.0

Cost, correctness
                                  RSS  tensors   calls  traffic  start  scaling  of ddp     loss  gradient  check
                                  MiB      MiB  a step      MiB      s        %       %    diff.     diff.
--------------------------------  ---  -------  ------  -------  -----  -------  ------  -------  --------  -----
single_device, 32-true, 1 device  300     12.0       -        -   1.50        -       -  2.0e-07   3.0e-06     ok
ddp, 32-true, 2 devices         * 300     12.0       2     3.00   1.50     90.0     100  2.0e-07   3.0e-06     ok

* best
exposed: waiting for collectives; it is part of the other shares

ddp is best.
"""


def test_the_table_is_exact() -> None:
    shown = [ran("single_device", 1), ran("ddp", 2, is_best=True)]
    assert table(results_of(shown), shown, ["ddp is best."]) == TWO_ROWS


def test_nothing_is_wider_than_the_terminal_in_two_tables() -> None:
    shown = several()
    shown[1] = dataclasses.replace(shown[1], name="fsdp_cpu_offload, bf16-mixed, 16 devices, batch 128")
    lines = table(results_of(shown), shown, []).splitlines()
    assert max(map(len, lines)) <= 120
    assert sum(line.startswith("---") for line in lines) == 2


def test_one_table_where_it_fits() -> None:
    shown = several()
    lines = table(results_of(shown), shown, [], width=300).splitlines()
    assert "Speed, share of a step, cost, correctness" in lines


def test_what_is_wrong_is_marked_beside_the_speed_and_explained() -> None:
    shown = several()
    text = table(results_of(shown), shown, [])
    assert "ddp_bf16, 32-true, 2 devices! " in text
    assert "fsdp, 32-true, 2 devices    ? " in text
    assert "ddp_bf16, 32-true, 2 devices: WRONG: the loss is a sum\n" in text
    assert "fsdp, 32-true, 2 devices: not comparable: the script draws random numbers\n" in text
    assert "* best, ! WRONG, ? not comparable\n" in text


def test_a_failed_row_says_its_cause_once_and_whole() -> None:
    shown = several()
    text = table(results_of(shown), shown, [], width=80)
    assert " ".join(text.split()).count("failed: OutOfMemoryError on rank 1: tried to allocate 2.50 GiB") == 1


def test_a_cause_that_several_rows_share_is_said_once() -> None:
    shown = [*several(), dataclasses.replace(several()[-1], name="hsdp, bf16-mixed, 2 devices")]
    words = " ".join(table(results_of(shown), shown, []).split())
    assert words.count("OutOfMemoryError") == 1
    assert "hsdp, bf16-mixed, 2 devices failed: as hsdp, 32-true, 2 devices" in words


def test_columns_without_any_value_are_left_out() -> None:
    shown = [ran("single_device", 1, comparison=None)]
    text = table(results_of(shown), shown, [])
    assert not {"exposed", "save", "calls", "scaling", "ddp", "check", "steps/s", "reserved"} & set(text.split())


def test_memory_of_an_accelerator_has_columns_and_a_unit_that_suits_it() -> None:
    one = ran("ddp", 2)
    memory = Memory(resident=2**30, device_allocated=20 * 2**30, device_reserved=24 * 2**30)
    shown = [dataclasses.replace(one, row=dataclasses.replace(one.row, memory=memory))]
    text = table(results_of(shown), shown, [])
    assert "RSS  allocated  reserved" in text
    assert "1.00       20.0      24.0" in text
    assert "GiB        GiB       GiB" in text


def test_steps_are_counted_where_samples_are_not_known() -> None:
    one = ran("ddp", 2)
    shown = [one, dataclasses.replace(one, throughput=Interval(100.0, 99.0, 101.0), throughput_unit="steps/s")]
    text = table(results_of(shown), shown, [])
    assert "samples/s   steps/s" in text
    assert "100 ±1.0" in text
    assert text.count(" 8,000 ") == 2  # tokens: 80 a step, 100 steps a second, in either unit


def test_words_of_a_script_can_not_steer_the_terminal() -> None:
    shown = [dataclasses.replace(several()[-1], name="a\x1b[2Jb")]
    shown[0] = dataclasses.replace(shown[0], row=dataclasses.replace(shown[0].row, failure="c\x1b]0;d\x07"))
    text = table(results_of(shown, ("e\x1b[31m.py",)), shown, ["f\x1b[0m"])
    assert all(line.isprintable() for line in text.splitlines())
    assert r"a\x1b[2Jb" in text


def test_rows_that_all_failed_say_why() -> None:
    shown = several()[-1:]
    text = table(results_of(shown), shown, ["Nothing ran."])
    assert text.split("\n\n", 1)[1] == (
        "------------------------\n"
        "hsdp, 32-true, 2 devices  failed: OutOfMemoryError on rank 1: tried to allocate 2.50 GiB\n"
        "\n"
        "Nothing ran.\n"
    )


def test_no_rows_leave_the_verdict() -> None:
    assert table(results_of([]), [], ["Nothing ran."]).split("\n\n", 1)[1] == "Nothing ran.\n"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (0.0001234, "1.2e-04"),
        (0.09996, "0.100"),
        (9.999, "10.0"),
        (123.4, "123"),
        (123456, "123,000"),
        (-1.5, "-1.50"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_a_figure_has_three_digits(value: float, words: str) -> None:
    assert figure(value) == words


def test_an_interval_shows_its_farther_end() -> None:
    assert str(Interval(100.0, 99.0, 103.5)) == "100 ±3.5"
