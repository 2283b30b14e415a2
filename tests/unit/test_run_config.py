"""What fabric-run tells the script, from the command line to the rank."""

from __future__ import annotations

import dataclasses
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fabric_lite import Checkpoints, Fabric, run_config
from fabric_lite.data import put_around
from fabric_lite.errors import LaunchError
from fabric_lite.launch.cli import parse_arguments
from fabric_lite.launch.environment import chosen_threads, cores
from fabric_lite.launch.failure import Failure, describe_exception, exit_status, report, summary
from fabric_lite.launch.plan import count_in, count_present, parse_devices
from fabric_lite.run_config import RunConfig

SCRIPT = str(Path(__file__))


def test_nothing_said_is_none() -> None:
    assert run_config.current() is None
    assert parse_arguments([SCRIPT]).run_config == RunConfig()


def test_installed_config_is_current_until_it_is_taken_back() -> None:
    config = RunConfig(devices="2")
    run_config.install(config)
    try:
        assert run_config.current() is config
    finally:
        run_config.install(None)
    assert run_config.current() is None


def test_config_is_plain_data() -> None:
    config = RunConfig("cpu", "ddp", "bf16-mixed", "0,2", 3, 4, True)
    assert RunConfig(**dataclasses.asdict(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.devices = "3"  # type: ignore[misc]


def test_options_before_the_script_are_ours_and_after_it_are_the_scripts() -> None:
    words = [
        "--strategy",
        "fsdp",
        "--precision=bf16-mixed",
        "--check-collectives",
        SCRIPT,
        "--strategy",
        "x",
        "-m",
        "--help",
    ]
    plan = parse_arguments(words)
    assert plan.run_config == RunConfig(strategy="fsdp", precision="bf16-mixed", check_collectives=True)
    assert plan.script.target == SCRIPT
    assert not plan.script.is_module
    assert plan.script.arguments == ("--strategy", "x", "-m", "--help")


def test_module_takes_the_place_of_the_script() -> None:
    plan = parse_arguments(["--devices", "-1", "-m", "package.part", "-m", "x"])
    assert plan.script.is_module
    assert (plan.script.target, plan.script.arguments) == ("package.part", ("-m", "x"))


@pytest.mark.parametrize(
    ("text", "devices", "count"),
    [("2", 2, 2), ("0,2", (0, 2), 2), ("3,", (3,), 1), ("auto", None, None), ("-1", None, None)],
)
def test_devices_are_counted(text: str, devices: object, count: int | None) -> None:
    assert parse_devices(text) == devices
    assert count_in(parse_devices(text), "cuda") == count
    assert count_in(None, "cpu") == count_in(None, "tpu") == 1
    assert count_in(None, "gpu") is None


@pytest.mark.parametrize("text", ["0", "-2", "two", "", "1.5", "0,0", "0,-1", "0,x", ","])
def test_bad_devices_are_refused(text: str) -> None:
    with pytest.raises(LaunchError, match="--devices"):
        parse_devices(text)


def test_all_devices_are_those_present() -> None:
    assert count_present("cuda", 8, None) == 8
    assert count_present("cuda", 8, "gpu") == 8
    assert count_present(None, 0, "auto") == 1
    for kind, count, asked in ((None, 0, "gpu"), (None, 0, "cuda"), ("xpu", 2, "cuda")):
        with pytest.raises(LaunchError, match="no accelerator of kind"):
            count_present(kind, count, asked)


def test_threads_are_cores_over_ranks() -> None:
    assert chosen_threads({}, 1) is None
    assert chosen_threads({}, 2) == max(1, cores() // 2)
    assert chosen_threads({}, 10_000) == 1
    assert chosen_threads({"OMP_NUM_THREADS": "3"}, 2) is None


def test_several_nodes_need_to_know_each_other() -> None:
    plan = parse_arguments(["--num-nodes", "2", "--node-rank", "1", "--main-address", "host", SCRIPT])
    assert plan.rendezvous is not None
    assert (plan.rendezvous.endpoint, plan.rendezvous.node_rank) == ("host:29500", 1)
    for words in (["--num-nodes", "2"], ["--num-nodes", "2", "--main-address", "host", "--node-rank", "2"]):
        with pytest.raises(LaunchError, match="Given"):
            parse_arguments([*words, SCRIPT])


def test_the_number_of_a_second_node_needs_the_number_of_nodes() -> None:
    assert parse_arguments(["--node-rank", "0", "--main-address", "host", SCRIPT]).rendezvous is None
    with pytest.raises(LaunchError, match="--node-rank 1 --num-nodes 1\n  Try: --num-nodes, the number of all"):
        parse_arguments(["--node-rank", "1", "--main-address", "host", SCRIPT])


def test_the_number_of_nodes_may_be_a_range() -> None:
    plan = parse_arguments(["--num-nodes", "1:4", "--rdzv-endpoint", "host:29400", SCRIPT])
    assert plan.rendezvous is not None
    assert (plan.rendezvous.min_nodes, plan.rendezvous.num_nodes, plan.rendezvous.backend) == (1, 4, "c10d")
    assert plan.run_config.num_nodes == 4
    for words in (["4:1"], ["0:2"], ["1:"], [":2"], ["many"], ["1:2:3"], ["1:2", "--rdzv-backend", "static"], ["1:2"]):
        with pytest.raises(LaunchError, match="Given"):
            parse_arguments(["--num-nodes", *words, SCRIPT])


def test_report_of_a_crash_names_the_users_line(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import ctypes\nctypes.string_at(0)\n")
    log = tmp_path / "rank_0.err"
    log.write_text(
        "Fatal Python error: Segmentation fault\n\nCurrent thread 0x00007f (most recent call first):\n"
        f'  File "{sysconfig.get_path("stdlib")}/ctypes/__init__.py", line 519 in string_at\n'
        f'  File "{script}", line 2 in <module>\n'
    )
    assert report(Failure(0, -11, str(log))).splitlines() == [
        "fabric-run: rank 0 failed: killed by SIGSEGV",
        f"  at {script}:2, in <module>",
        "    ctypes.string_at(0)",
        f"  The full traceback is in {log}, those of other ranks beside it.",
    ]


def test_a_hang_is_reported_in_its_own_words_and_at_most_ten_lines() -> None:
    failure = Failure(0, 1, "/logs/rank_0.err", hang=("fabric-run: rank 1 did not arrive", *["  a rank"] * 20))
    lines = report(failure).splitlines()
    assert lines[0] == "fabric-run: rank 1 did not arrive"
    assert len(lines) == 10
    assert summary(failure) == "rank 1 did not arrive"


def test_report_is_short_however_long_the_message() -> None:
    try:
        raise ValueError("\n".join(["line " * 200] * 50))
    except ValueError as error:
        details = describe_exception(error)
    lines = report(Failure(3, 1, "/logs/rank_3.err", details)).splitlines()
    assert len(lines) <= 10
    assert max(map(len, lines)) < 400
    assert lines[0].startswith("fabric-run: rank 3 failed: ValueError: line line ")
    assert __file__ in lines[-3]


@pytest.mark.parametrize(("code", "status"), [(0, 0), (3, 3), (-9, 137), (-15, 143)])
def test_exit_status_is_the_shells(code: int, status: int) -> None:
    assert exit_status(code) == status


class Noting:
    """A callback that notes what it is told."""

    def __init__(self, told: list[str]) -> None:
        self.told = told

    def on_before_setup_dataloader(self, loader: Any) -> None:
        self.told.append(f"before {type(loader).__name__}")

    def on_after_setup_dataloader(self, fabric: Any, loader: Any) -> None:
        self.told.append(f"after {type(loader).__name__} of {type(fabric).__name__}")

    def on_after_setup_optimizer(self, optimizer: Any) -> None:
        self.told.append(type(optimizer).__name__)


@pytest.fixture
def installed() -> Iterator[Callable[..., RunConfig]]:
    def install(**fields: Any) -> RunConfig:
        config = RunConfig(**fields)
        run_config.install(config)
        return config

    yield install
    run_config.install(None)


def test_a_callback_of_the_run_config_is_told_of_everything_that_is_set_up(
    installed: Callable[..., RunConfig],
) -> None:
    told: list[str] = []
    installed(callback=f"{__name__}:Noting", callback_options={"told": told})
    fabric = Fabric(accelerator="cpu", devices=1)
    model = nn.Linear(2, 2)
    fabric.setup(model, torch.optim.SGD(model.parameters()))
    fabric.setup_dataloaders(DataLoader([1, 2]), [3, 4])
    fabric.close()
    assert told == [
        "SGD",
        "before DataLoader",
        "before list",
        "after DataLoader of Fabric",
        "after MovedIterable of Fabric",
    ]


def test_what_stands_around_a_loader_sees_each_batch_of_both_kinds() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    for loader in fabric.setup_dataloaders(DataLoader([1, 2, 3], batch_size=2), [torch.tensor(4)]):
        seen = []

        def around(advance: Callable[[], Any], seen: list[Any] = seen) -> Callable[[], Any]:
            def noting() -> Any:
                batch = advance()
                seen.append(batch)
                return batch

            return noting

        plain = [batch.tolist() for batch in loader]
        started = []

        def start(begin: Callable[..., Any], started: list[Any] = started) -> Callable[..., Any]:
            def noting(source: Any) -> Any:
                started.append(source)
                return begin(source)

            return noting

        put_around(loader, start=start, batches=around)
        assert [batch.tolist() for batch in loader] == plain == [batch.tolist() for batch in seen]
        assert len(started) == 1
    fabric.close()


def test_with_a_scratch_folder_checkpoints_go_there_and_earlier_ones_are_still_read(
    installed: Callable[..., RunConfig], tmp_path: Path
) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    file = tmp_path / "own" / "a.ckpt"
    fabric.save(file, {"value": 1})
    before = file.read_bytes()
    installed(scratch_folder=str(tmp_path / "scratch"))
    assert fabric.load(file)["value"] == 1
    fabric.save(file, {"value": 2})
    assert fabric.load(file)["value"] == 2
    assert file.read_bytes() == before
    assert Checkpoints(tmp_path / "own").folder.is_relative_to(tmp_path / "scratch")
    fabric.close()
