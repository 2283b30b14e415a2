"""What of the DeepSpeed strategy needs no DeepSpeed: its configuration, and locks of builds that were killed."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.file_baton import FileBaton

from fabric_lite import Fabric
from fabric_lite.errors import FabricImportError, FabricTypeError, FabricValueError, StrategyError
from fabric_lite.precision import PRECISIONS
from fabric_lite.strategies import DeepSpeedStrategy
from fabric_lite.strategies.deepspeed.config import check_offloading, engine_config, is_offloaded, read_config
from fabric_lite.strategies.deepspeed.ops import await_lock
from fabric_lite.strategies.deepspeed.optimizers import follow_options, inner_optimizer, trained_of

is_installed = importlib.util.find_spec("deepspeed") is not None


@pytest.mark.skipif(is_installed, reason="DeepSpeed is installed")
@pytest.mark.parametrize("make", [DeepSpeedStrategy, lambda: Fabric(accelerator="cpu", strategy="deepspeed_stage_3")])
def test_without_deepspeed_the_error_names_the_extra(make: Any) -> None:
    with pytest.raises(FabricImportError, match=r"fabric-lite\[deepspeed\]"):
        make()


def test_importing_the_library_does_not_import_deepspeed() -> None:
    code = "import sys, fabric_lite.strategies; from fabric_lite import Fabric; print('deepspeed' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"


def settings(own: dict[str, Any] | None = None, precision: str = "32-true", **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"stage": 2, "offload_optimizer": False, "offload_parameters": False, **options}
    return engine_config(read_config(own), precision=PRECISIONS[precision], **given)


def test_a_configuration_of_ones_own_is_kept_beside_what_the_strategy_says(tmp_path: Path) -> None:
    own = {"zero_optimization": {"reduce_bucket_size": 1000}, "log_level": "info", "zero_force_ds_cpu_optimizer": True}
    (tmp_path / "config.json").write_text(json.dumps(own))
    for given in (own, tmp_path / "config.json", str(tmp_path / "config.json")):
        config = settings(given, stage=3, offload_parameters=True)
        assert config["zero_optimization"]["reduce_bucket_size"] == 1000
        assert config["zero_optimization"]["stage"] == 3
        assert config["zero_optimization"]["offload_param"]["device"] == "cpu"
        assert config["log_level"] == "info"
    assert own == json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    ("precision", "stage", "accumulates", "sends"),
    [("bf16-mixed", 1, "bf16", "fp32"), ("bf16-mixed", 3, "fp32", "fp32"), ("bf16-true", 2, "bf16", None)],
)
def test_half_precision_says_in_what_gradients_add_up(
    precision: str, stage: int, accumulates: str, sends: str | None
) -> None:
    config = settings(precision=precision, stage=stage)
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"]["grad_accum_dtype"] == accumulates
    assert config.get("communication_data_type") == sends
    assert "bf16" not in settings()


@pytest.mark.parametrize(
    ("config", "fix"),
    [
        ({"optimizer": {}}, r"fabric\.setup"),
        ({"fp16": {"enabled": True}}, "precision="),
        ({"gradient_clipping": 1.0}, "clip_gradients"),
        ({"gradient_accumulation_steps": 4}, "no_backward_sync"),
        ({"train_batch_size": 4}, "batch_size"),
    ],
)
def test_what_the_script_says_has_no_place_in_the_configuration(config: dict[str, Any], fix: str) -> None:
    with pytest.raises(FabricValueError, match=fix):
        read_config(config)


def test_what_a_configuration_leaves_to_the_script_is_not_there() -> None:
    own = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    assert read_config({**own, "gradient_accumulation_steps": "auto", "wall_clock_breakdown": True}) == {
        "wall_clock_breakdown": True
    }


def check(own: dict[str, Any], **options: Any) -> None:
    given: dict[str, Any] = {"stage": 3, "offload_optimizer": False, "offload_parameters": False, **options}
    check_offloading(read_config({"zero_optimization": own}), **given)


@pytest.mark.parametrize(
    ("own", "options", "words"),
    [
        (
            {"offload_optimizer": {"device": "none"}},
            {"offload_optimizer": True},
            r"offload_optimizer=True, and offload_optimizer=\{'device': 'none'\}",
        ),
        (
            {"offload_param": {"device": "none"}},
            {"offload_parameters": True},
            r"offload_parameters=True, and offload_param=\{'device': 'none'\}",
        ),
        ({"offload_param": {"device": "cpu"}}, {"stage": 2}, r"stage=2, offload_param=\{'device': 'cpu'\}"),
        ({}, {"stage": 1, "offload_parameters": True}, "stage=1, offload_parameters=True"),
        (
            {"offload_param": {"device": "nvme", "nvme_path": "/disk"}},
            {},
            r"offload_param=\{'device': 'nvme'\}[\s\S]*offload_parameters=True",
        ),
    ],
)
def test_options_and_configuration_that_contradict_each_other_or_cannot_be_are_shown(
    own: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(FabricValueError, match=words):
        check(own, **options)


def test_offloading_that_agrees_is_let_through() -> None:
    check({"offload_optimizer": {"device": "cpu"}}, offload_optimizer=True)
    check({"offload_optimizer": {"pin_memory": True}, "offload_param": {"pin_memory": True}}, offload_parameters=True)
    check({"offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}}, stage=2)
    check({"offload_optimizer": None, "offload_param": None}, stage=2, offload_optimizer=True)


@pytest.mark.parametrize(
    ("own", "options", "is_wanted"),
    [
        ({}, {}, False),
        ({"offload_optimizer": {"device": "none"}}, {}, False),
        ({"offload_optimizer": {"pin_memory": False}}, {}, False),  # DeepSpeed's own default is no device
        ({"offload_optimizer": {"pin_memory": False}}, {"offload_optimizer": True}, True),
        ({"offload_optimizer": {"device": "cpu"}}, {}, True),
    ],
)
def test_what_is_offloaded_is_what_the_device_says(
    own: dict[str, Any], options: dict[str, Any], is_wanted: bool
) -> None:
    config = settings({"zero_optimization": own}, **options)
    assert is_offloaded(config, "offload_optimizer") is is_wanted
    # DeepSpeed takes a norm that is left out for none alone.
    assert config["zero_optimization"].get("compute_grad_norm", True) is is_wanted


def test_a_norm_that_the_user_wants_is_computed() -> None:
    assert (
        settings({"zero_optimization": {"compute_grad_norm": True}})["zero_optimization"]["compute_grad_norm"] is True
    )


def test_nulls_are_what_is_left_out_and_other_values_where_a_dict_belongs_are_errors() -> None:
    nulls = {"zero_optimization": {"offload_optimizer": None, "offload_param": None}, "data_types": None}
    assert (
        settings(nulls, "bf16-mixed")
        == settings({"zero_optimization": None}, "bf16-mixed")
        == settings(None, "bf16-mixed")
    )
    for wrong in ([], {"offload_optimizer": "cpu"}, {"offload_param": True}):
        with pytest.raises(FabricTypeError, match="is a dict"):
            read_config({"zero_optimization": wrong})


@pytest.mark.parametrize(
    ("former", "key"), [("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")]
)
def test_former_names_of_offloading_are_refused_with_the_new_one(former: str, key: str) -> None:
    with pytest.raises(FabricValueError, match=rf'{former}=True\n.*"{key}"'):
        read_config({"zero_optimization": {former: True}})


@pytest.mark.skipif(not is_installed, reason="DeepSpeed is not installed")
def test_the_strategy_checks_what_its_configuration_offloads() -> None:
    with pytest.raises(FabricValueError, match="stage=2, offload_param"):
        DeepSpeedStrategy(config={"zero_optimization": {"offload_param": {"device": "cpu"}}})
    assert DeepSpeedStrategy(config={"zero_optimization": None}).stage == 2


def test_a_configuration_that_cannot_be_read_is_shown(tmp_path: Path) -> None:
    with pytest.raises(FabricValueError, match="could not be read"):
        read_config(tmp_path / "nothing.json")
    with pytest.raises(FabricTypeError, match=r"given|Given"):
        read_config(3)


def test_the_inner_optimizer_follows_the_options_and_has_no_hooks() -> None:
    first, frozen, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = torch.optim.AdamW([{"params": [first]}, {"params": [frozen]}, {"params": [second], "lr": 0.5}], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # exchanges the object's step
    steps: list[int] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trained, inner = trained_of(optimizer), inner_optimizer(optimizer, offload=False)
    assert type(inner) is torch.optim.AdamW
    assert [group["params"] for group in inner.param_groups] == [[first], [second]]
    first.grad = torch.ones(2)
    inner.step()
    assert steps == []
    assert not optimizer.state
    with pytest.warns(UserWarning, match=r"lr_scheduler\.step"):
        schedule.step()
    follow_options(inner, optimizer, trained)
    assert [group["lr"] for group in inner.param_groups] == [0.05, 0.25]
    assert [group["params"] for group in inner.param_groups] == [[first], [second]]


def test_groups_that_are_frozen_or_unfrozen_after_setup_are_not_taken_for_others() -> None:
    first, second, third, new = (torch.nn.Parameter(torch.ones(2)) for _ in range(4))
    second.requires_grad_(False)
    rates = [{"params": [first], "lr": 1.0}, {"params": [second], "lr": 2.0}, {"params": [third], "lr": 3.0}]
    optimizer = torch.optim.SGD(rates)
    trained, inner = trained_of(optimizer), inner_optimizer(optimizer, offload=False)

    def followed() -> list[float]:
        follow_options(inner, optimizer, trained)
        return [group["lr"] for group in inner.param_groups]

    assert followed() == [1.0, 3.0]
    first.requires_grad_(False)
    assert followed() == [0.0, 3.0]
    first.requires_grad_(True)
    assert followed() == [1.0, 3.0]
    second.requires_grad_(True)
    first.requires_grad_(False)
    with pytest.raises(StrategyError, match=r"1 parameters, in group 1 of 3\n.*requires_grad_\(False\) after it"):
        followed()
    second.requires_grad_(False)
    optimizer.add_param_group({"params": [new]})
    with pytest.raises(StrategyError, match="in group 3 of 4"):
        followed()
    del optimizer.param_groups[2:]
    with pytest.raises(StrategyError, match="has lost groups since setup"):
        followed()


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.Adafactor, torch.optim.Adagrad])
def test_an_optimizer_over_whole_parameters_is_refused(kind: Any) -> None:
    with pytest.raises(StrategyError, match=f"{kind.__name__} cannot step on parts"):
        inner_optimizer(kind([torch.nn.Parameter(torch.ones(2))]), offload=False)


def build(folder: Path) -> subprocess.Popen[str]:
    """A process that builds in ``folder``, as torch's compiler of extensions does, until it is told to end."""
    code = (
        "import sys; from torch.utils.file_baton import FileBaton; baton = FileBaton(sys.argv[1]); "
        "assert baton.try_acquire(); print('building', flush=True); sys.stdin.read(); baton.release()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    return process


def test_a_lock_that_a_killed_build_has_left_is_removed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with build(tmp_path) as process:
        process.kill()
    assert (tmp_path / "lock").exists()  # on which torch would wait for ever
    await_lock(tmp_path / "lock", wait_seconds=0)
    assert not (tmp_path / "lock").exists()
    assert "left behind" in capfd.readouterr().err
    await_lock(tmp_path / "lock")  # no lock, no wait


def test_a_build_that_goes_on_is_waited_for_so_long_and_no_longer(tmp_path: Path) -> None:
    with build(tmp_path) as process:
        with pytest.raises(StrategyError, match=rf"held by \[{process.pid}\]"):
            await_lock(tmp_path / "lock", wait_seconds=0)
        waiter = threading.Thread(target=await_lock, args=(tmp_path / "lock",))
        waiter.start()
        assert (tmp_path / "lock").exists()
        process.communicate("")  # it comes to its end
        waiter.join(60)
        assert not waiter.is_alive()
    assert not os.path.exists(tmp_path / "lock")


def test_ranks_that_meet_a_lock_that_was_left_behind_build_one_at_a_time(tmp_path: Path) -> None:
    lock, begun, end = tmp_path / "lock", threading.Barrier(8), threading.Barrier(8)
    building, errors = threading.Lock(), []

    def meet() -> None:
        for _ in range(4):
            if begun.wait() == 0:
                lock.touch()
            end.wait()
            try:
                await_lock(lock, wait_seconds=60)
                baton = FileBaton(str(lock))
                if not baton.try_acquire():
                    continue
                assert building.acquire(blocking=False), "two builds in one folder"
                hashlib.sha256(bytes(50_000_000))  # a build takes its time
                building.release()
                baton.release()
            except BaseException as error:
                errors.append(error)

    ranks = [threading.Thread(target=meet) for _ in range(8)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert errors == []
    assert not lock.exists()


def test_a_lock_is_left_alone_while_another_rank_is_about_to_remove_it(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with (tmp_path / "fabric_lite.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StrategyError, match=r"rm .*/lock if nobody compiles there any more"):
            await_lock(tmp_path / "lock", wait_seconds=0)
        assert (tmp_path / "lock").exists()
    await_lock(tmp_path / "lock", wait_seconds=0)
    assert not (tmp_path / "lock").exists()


IN_CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc"]
can_contain = shutil.which("unshare") is not None and subprocess.run([*IN_CONTAINER, "true"]).returncode == 0


@pytest.mark.skipif(not can_contain, reason="needs unshare of util-linux, and root, for a PID namespace")
def test_a_build_in_another_container_is_waited_for_too(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fabric_lite.strategies.deepspeed.ops import await_lock; "
        "await_lock(Path(sys.argv[1]), 0)"
    )
    command = [*IN_CONTAINER, sys.executable, "-c", code, str(tmp_path / "lock")]
    with build(tmp_path) as process:
        done = subprocess.run(command, capture_output=True, text=True)
        assert "held by nobody who can be seen from here" in done.stderr
        process.communicate("")  # it finds its lock in its place
        assert process.returncode == 0
    (tmp_path / "lock").touch()
    assert subprocess.run(command).returncode == 0
    assert not (tmp_path / "lock").exists()


@pytest.mark.skipif(not can_contain, reason="needs unshare of util-linux, and root, for a mount of a kind of its own")
def test_a_lock_on_a_file_system_that_may_be_shared_is_never_removed(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from fabric_lite.strategies.deepspeed.ops import await_lock\n"
        "try: await_lock(Path('lock'), 0)\n"
        "finally: print(Path('lock').exists())"
    )
    # A kind that nothing is known about here.
    script = f'mount -t ramfs none {tmp_path} && cd {tmp_path} && touch lock && exec {sys.executable} -c "$0"'
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script, code], capture_output=True, text=True)
    assert "waiting for lock: who holds it cannot be seen from here; rm lock if nobody compiles" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("  Try: rm lock if")
    assert done.stdout == "True\n"
