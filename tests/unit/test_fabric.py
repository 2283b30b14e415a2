"""The rest of ``Fabric``: properties, callbacks, logging, placement, settings of the command line."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fabric_lite import AttributeDict, DDPStrategy, Fabric, Precision, SingleDeviceStrategy, Strategy, seed_everything
from fabric_lite.errors import FabricTypeError
from fabric_lite.precision import PRECISIONS
from fabric_lite.run import Arguments, resolve
from fabric_lite.run_config import RUN_ID_PREFIX, RunConfig
from tests.models import Net, make_net


def cpu(**arguments: Any) -> Fabric:
    return Fabric(**{"accelerator": "cpu", "devices": 1, **arguments})


def test_properties_are_right_from_the_constructor_on() -> None:
    fabric = cpu()
    assert fabric.device == torch.device("cpu")
    assert (fabric.global_rank, fabric.local_rank, fabric.node_rank, fabric.world_size) == (0, 0, 0, 1)
    assert fabric.is_global_zero
    assert fabric.strategy == SingleDeviceStrategy()
    assert fabric.strategy.precision.name == "32-true"
    assert fabric.accelerator.device_type == "cpu"
    assert fabric.loggers == []
    assert fabric.logger is None
    waiting = cpu(devices=3, strategy="DDP_Find_Unused_Parameters_True")
    assert waiting.strategy == DDPStrategy(find_unused_parameters=True)
    assert (waiting.world_size, waiting.global_rank) == (3, 0)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (None, "32-true"), (64, "64-true"), (32, "32-true"), (16, "16-mixed"),
        ("bf16", "bf16-mixed"), ("BF16-True", "bf16-true"),
    ],
)  # fmt: skip
def test_precisions_have_aliases(given: Any, name: str) -> None:
    assert cpu(precision=given).precision.name == name


def test_an_ambiguous_alias_is_explained_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    cpu(precision="bf16")
    assert "'bf16-mixed'" in capsys.readouterr().err


def test_a_precision_may_be_an_object_or_a_plugin() -> None:
    own = Precision("own", compute_dtype=torch.bfloat16)
    assert cpu(precision=own).precision is own
    assert cpu(plugins=own).precision is own
    assert cpu(plugins=["bf16-true"]).precision.name == "bf16-true"
    assert cpu(precision=own).setup(Net())(torch.ones(1, 4)).dtype == torch.bfloat16


def test_the_command_line_wins_over_the_script_and_says_so() -> None:
    config = RunConfig(strategy="ddp", devices="2", precision="bf16-mixed")
    environ = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    arguments = Arguments(accelerator="cpu", strategy="single_device", devices=1, precision="32-true")
    run = resolve(arguments, None, config, environ)
    assert run.strategy == DDPStrategy()
    assert run.strategy.precision.name == "bf16-mixed"
    assert run.topology.rank == 1
    assert not run.needs_launch
    assert [notice.split(" wins")[0] for notice in run.notices] == [
        "the command line's --strategy ddp",
        "the command line's --devices 2",
        "the command line's --precision bf16-mixed",
    ]


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def on_after_setup(self, module: nn.Module) -> None:
        self.calls.append(("setup", {"module": module}))

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        self.calls.append(("step", {"strategy": strategy, "optimizer": optimizer}))

    def on_epoch(self, epoch: int, **rest: Any) -> None:
        self.calls.append(("epoch", {"epoch": epoch, **rest}))

    on_nothing = "not a function"


@pytest.mark.parametrize(
    "callbacks",
    ["early_stopping", [object(), None], {object()}, (object() for _ in range(1))],
    ids=["text", "none", "set", "generator"],
)
def test_what_has_no_hooks_by_nature_is_no_callback(callbacks: Any) -> None:
    with pytest.raises(FabricTypeError, match=r"callbacks=('early_stopping'|None|\{|<)[\s\S]*EarlyStopping\("):
        cpu(callbacks=callbacks)


def test_callbacks_get_the_arguments_that_they_take() -> None:
    recorder, other = Recorder(), object()
    given = [recorder, other]
    fabric = cpu(callbacks=given)
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    optimizer.step()
    fabric.call("on_epoch", 3, loss=1.0)
    fabric.call("on_nothing")
    fabric.call("on_absent", 1)
    assert given == [recorder, other]
    assert [name for name, _ in recorder.calls] == ["setup", "step", "epoch"]
    assert recorder.calls[0][1] == {"module": model}
    assert recorder.calls[1][1] == {"strategy": fabric.strategy, "optimizer": optimizer}
    assert recorder.calls[2][1] == {"epoch": 3, "loss": 1.0}
    fabric.release(optimizer)
    optimizer.step()
    assert len(recorder.calls) == 3


class Logger:
    def __init__(self) -> None:
        self.rows: list[tuple[dict[str, float], int | None]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((metrics, step))


def test_scalars_go_to_every_logger() -> None:
    first, second = Logger(), Logger()
    fabric = cpu(loggers=[first, second])
    fabric.log("loss", torch.tensor(0.5), step=3)
    fabric.log_dict({"a": 1, "b": torch.tensor(2)})
    assert first.rows == second.rows == [({"loss": 0.5}, 3), ({"a": 1, "b": 2}, None)]
    assert fabric.logger is first
    assert cpu(loggers=first).loggers == [first]
    cpu().log("loss", 1.0)


def test_modules_and_tensors_are_made_where_and_as_they_are_needed() -> None:
    fabric = cpu(precision="64-true")
    with fabric.init_module():
        model = Net()
    with fabric.init_tensor():
        x = torch.ones(2, 4)
    assert model.first.weight.dtype == x.dtype == torch.float64
    assert fabric.setup(model)(torch.ones(2, 4)).dtype == torch.float64
    assert torch.ones(1).dtype == torch.float32
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with fabric.init_module(empty_init=True):
        Net()
    assert torch.equal(torch.get_rng_state(), state), "an empty initialization draws nothing"
    with pytest.raises(ZeroDivisionError), fabric.init_module():
        raise ZeroDivisionError


def test_an_empty_module_is_filled_by_a_checkpoint(tmp_path: Any) -> None:
    fabric = cpu()
    source = fabric.setup(make_net())
    fabric.save(tmp_path / "x.ckpt", {"model": source})
    with fabric.init_module(empty_init=True):
        model = Net()
    fabric.load(tmp_path / "x.ckpt", {"model": model})
    assert torch.equal(model.first.weight, source.first.weight)


class Movable:
    def to(self, device: torch.device) -> str:
        return f"moved to {device}"


def test_to_device_moves_modules_in_place_and_anything_nested() -> None:
    fabric = cpu()
    model = Net()
    assert fabric.to_device(model) is model
    assert fabric.to_device({"a": [Movable()], "b": 3}) == {"a": ["moved to cpu"], "b": 3}


def test_setup_may_leave_the_module_where_it_is() -> None:
    with torch.device("meta"):
        model = Net()
    assert cpu().setup(model, move_to_device=False).first.weight.is_meta


def test_print_and_seed(capsys: pytest.CaptureFixture[str]) -> None:
    fabric = cpu()
    fabric.print("a", "b", sep="-", end="!")
    assert capsys.readouterr().out == "a-b!"
    assert fabric.seed_everything(5) == 5
    first = torch.rand(1)
    assert seed_everything(5) == 5
    assert torch.equal(torch.rand(1), first)


def test_autocast_is_the_context_of_forward() -> None:
    with cpu(precision="bf16-mixed").autocast():
        assert torch.is_autocast_enabled("cpu")
    with cpu().autocast():
        assert not torch.is_autocast_enabled("cpu")


def test_launch_where_nothing_is_to_be_started() -> None:
    fabric = cpu()
    assert fabric.launch() is None
    assert fabric.launch() is None
    assert fabric.launch(lambda run, a, b=0: (run is fabric, a, b), 1, b=2) == (True, 1, 2)


def test_state_of_an_optimizer_that_has_stepped_survives_setup() -> None:
    model = make_net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    moments = [entry["exp_avg"].clone() for entry in optimizer.state.values()]
    cpu().setup(model, optimizer)
    assert all(torch.equal(a, b["exp_avg"]) for a, b in zip(moments, optimizer.state.values(), strict=True))


def test_closures_return_what_the_users_optimizer_returns() -> None:
    model = make_net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    fabric = cpu()
    fabric.setup(model, optimizer)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).pow(2).mean()
        fabric.backward(loss)
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_attribute_dict_reads_like_an_object() -> None:
    state = AttributeDict(step=1)
    state.step += 1
    assert state["step"] == 2


def test_the_precision_may_stand_in_the_strategy_but_not_twice() -> None:
    own = DDPStrategy(precision=PRECISIONS["bf16-mixed"])
    assert cpu(strategy=own).precision.name == "bf16-mixed"
    assert cpu(strategy=DDPStrategy(precision="bf16-mixed")).precision is cpu(strategy=own).precision
    assert str in get_args(get_type_hints(Strategy)["precision"])  # a type checker lets a name pass
    assert cpu(strategy=own, precision="bf16-mixed").precision.name == "bf16-mixed"
    with pytest.raises(ValueError, match="choose one"):
        cpu(strategy=own, precision="64-true")
    assert {DDPStrategy(): 1}[DDPStrategy()] == 1


def test_a_strategy_may_have_an_init_of_its_own() -> None:
    class Own(Strategy):
        def __init__(self, knob: int) -> None:
            object.__setattr__(self, "knob", knob)

    fabric = cpu(strategy=Own(3), precision="bf16-mixed")
    assert fabric.strategy.knob == 3  # type: ignore[attr-defined]
    assert fabric.strategy.precision is fabric.precision


def test_loaders_are_all_checked_before_any_is_set_up() -> None:
    fabric, good = cpu(), DataLoader([1, 2])
    with pytest.raises(TypeError, match="iterable"):
        fabric.setup_dataloaders(good, 3)
    assert type(good) is DataLoader
    fabric.setup_dataloaders(good)
    assert cpu().setup_dataloaders(good) is good  # released from the first one
    rows = [torch.ones(2)]
    moved = fabric.setup_dataloaders(rows)
    assert list(moved) == rows
    assert fabric.release(moved) is rows


@pytest.mark.parametrize(
    "around",
    [{}, {"SLURM_PROCID": "0", "SLURM_NNODES": "2"}, {"SKYPILOT_NUM_NODES": "2"}],
    ids=["", "in a batch script", "on a node of SkyPilot's"],
)
def test_a_subprocess_of_a_rank_runs_by_itself(around: dict[str, str]) -> None:
    inherited = {
        **around,
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "TORCHELASTIC_RUN_ID": f"{RUN_ID_PREFIX}7",
    }
    run = resolve(Arguments(accelerator="cpu"), None, None, inherited)
    assert (run.topology.world_size, run.needs_launch) == (1, False)
    assert "subprocess of a rank" in run.notices[0]
    assert (
        resolve(Arguments(accelerator="cpu"), None, RunConfig(), {**inherited, "LOCAL_WORLD_SIZE": "2"}).topology.rank
        == 1
    )


def test_parameters_that_a_move_exchanges_are_stepped_on() -> None:
    """As on XLA, whose tensors can't take the place of others."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model = nn.Linear(2, 1)
        before = model.weight
        model, optimizer = cpu(precision="bf16-true").setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert model.weight is not before
    model(torch.ones(1, 2)).sum().backward()
    old = model.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.weight, old - 1)
