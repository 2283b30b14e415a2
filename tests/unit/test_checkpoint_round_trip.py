"""What is saved comes back: objects in place, values in the user's own containers, any source of files."""

from __future__ import annotations

import collections
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fabric_lite.checkpoint import AttributeDict, load, load_raw, save
from fabric_lite.errors import CheckpointError, FabricKeyError, FabricTypeError, FabricValueError
from tests.models import Counter


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def trained(steps: int = 3, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW) -> dict[str, Any]:
    torch.manual_seed(0)
    model = small_model()
    adam = optimizer(model.parameters(), lr=0.01)  # type: ignore[call-arg]
    scheduler = torch.optim.lr_scheduler.StepLR(adam, 2)
    train(model, adam, scheduler, steps)
    return {"model": model, "optimizers": [adam], "nested": {"scheduler": scheduler, "step": steps}, "history": [1.0]}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> None:
    data = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4, generator=data)).square().sum().backward()
        optimizer.step()
        scheduler.step()


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def states(state: dict[str, Any]) -> list[Any]:
    objects = [state["model"], state["optimizers"][0], state["nested"]["scheduler"]]
    return [*(one.state_dict() for one in objects), state["nested"]["step"], state["history"]]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_a_nested_state_comes_back_bit_for_bit(tmp_path: Path, optimizer: type[torch.optim.Optimizer]) -> None:
    saved = trained(3, optimizer)
    save(tmp_path / "a.ckpt", saved)
    other = trained(1, optimizer)
    assert not same(states(other), states(saved))
    assert load(tmp_path / "a.ckpt", other) == {}
    assert same(states(other), states(saved))
    for state in (saved, other):
        train(state["model"], state["optimizers"][0], state["nested"]["scheduler"], 2)
    assert same(states(other), states(saved))


def test_training_goes_on_bit_for_bit_in_a_fresh_process(tmp_path: Path) -> None:
    state = trained()
    save(tmp_path / "a.ckpt", state)
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from tests.unit.test_checkpoint_round_trip import *\n"
        "folder = Path(sys.argv[1]); state = trained(0); load(folder / 'a.ckpt', state)\n"
        "train(state['model'], state['optimizers'][0], state['nested']['scheduler'], 2)\n"
        "save(folder / 'b.ckpt', state)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], check=True, timeout=60)
    train(state["model"], state["optimizers"][0], state["nested"]["scheduler"], 2)
    after = load(tmp_path / "b.ckpt")
    assert same(after["model"], dict(state["model"].state_dict()))
    assert same(after["optimizers"], [state["optimizers"][0].state_dict()])


def test_plain_torch_load_reads_the_file_with_the_users_own_keys(tmp_path: Path) -> None:
    state = trained()
    save(tmp_path / "a.ckpt", state)
    plain = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert same(plain["model"], state["model"].state_dict())
    small_model().load_state_dict(plain["model"])
    assert plain["nested"]["step"] == 3


def test_parameters_keep_their_memory_and_dtype(tmp_path: Path) -> None:
    state = trained()
    save(tmp_path / "a.ckpt", state)
    half = small_model().to(torch.bfloat16)
    memory = [parameter.data_ptr() for parameter in half.parameters()]
    load(tmp_path / "a.ckpt", {"model": half})
    assert [parameter.data_ptr() for parameter in half.parameters()] == memory
    assert torch.equal(half[0].weight, state["model"][0].weight.to(torch.bfloat16))


def test_a_bare_parameter_comes_back_where_the_user_holds_it(tmp_path: Path) -> None:
    scale, frozen = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(3), requires_grad=False)
    state = {"scale": scale, "more": {"list": [frozen, 1]}, "optimizer": torch.optim.SGD([scale], lr=0.1)}
    memory = [scale.data_ptr(), frozen.data_ptr()]
    save(tmp_path / "a.ckpt", state)
    with torch.no_grad():
        scale.fill_(0.0)
        frozen.fill_(0.0)
    state["more"]["list"][1] = 0
    assert load(tmp_path / "a.ckpt", state) == {}
    assert state["scale"] is scale
    assert state["more"]["list"][0] is frozen
    assert state["more"]["list"][1] == 1
    assert (scale.item(), frozen.tolist()) == (2.0, [1.0, 1.0, 1.0])
    assert [scale.data_ptr(), frozen.data_ptr()] == memory
    assert scale.requires_grad
    assert not frozen.requires_grad


def test_a_bare_parameter_of_another_shape_is_an_error_that_names_both(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", {"other": nn.Parameter(torch.ones(2)), "scale": nn.Parameter(torch.ones(3))})
    other, scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    message = r'state\["scale"\] has shape \(3,\) in the file and shape \(2,\) here'
    with pytest.raises(FabricValueError, match=message):
        load(tmp_path / "a.ckpt", {"other": other, "scale": scale})
    assert other.tolist() == scale.tolist() == [0.0, 0.0]
    with pytest.warns(UserWarning, match=message):
        load(tmp_path / "a.ckpt", {"other": other, "scale": scale}, strict=False)
    assert (other.tolist(), scale.tolist()) == ([1.0, 1.0], [0.0, 0.0])


def test_values_are_replaced_in_the_users_own_nested_dicts(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", {"step": 5, "log": {"epochs": {"0": 1.0}}, "best": None, "pair": (1, 2), "more": 1})
    log: dict[str, Any] = {"epochs": {}}
    state: dict[str, Any] = {"step": 0, "log": log, "best": 3, "pair": None}
    assert load(tmp_path / "a.ckpt", state) == {"more": 1}
    assert log == {"epochs": {"0": 1.0}}
    assert state["log"] is log
    assert (state["step"], state["best"], state["pair"]) == (5, None, (1, 2))


def test_values_beside_objects_in_lists_and_tuples_come_back(tmp_path: Path) -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    save(tmp_path / "a.ckpt", {"list": [first, 1], "tuple": (first, 2), "extra": {"model": first, "epoch": 3}})
    state: dict[str, Any] = {"list": [second, 0], "tuple": (second, 0), "extra": {"model": second}}
    mine = state["list"]
    assert load(tmp_path / "a.ckpt", state) == {"extra": {"epoch": 3}}
    assert state["list"] is mine
    assert mine[1] == 1
    assert state["tuple"] == (second, 2)
    assert torch.equal(first.weight, second.weight)


def test_an_attribute_dict_is_restored_by_attribute(tmp_path: Path) -> None:
    state = AttributeDict(model=nn.Linear(2, 2), step=3, inner=AttributeDict(rate=0.1))
    save(tmp_path / "a.ckpt", state)
    other = AttributeDict(model=nn.Linear(2, 2), step=0, inner=AttributeDict(rate=0.0))
    load(tmp_path / "a.ckpt", other)
    assert other.step == 3
    assert other.inner.rate == 0.1
    assert torch.equal(other.model.weight, state.model.weight)
    with pytest.raises(AttributeError, match="no key 'nothing'"):
        _ = other.nothing


def test_everything_that_may_be_in_a_file_comes_back_equal(tmp_path: Path) -> None:
    values = {
        "none": None, "number": 10**30, "complex": 1j, "text": "é", "bytes": b"x",
        "set": {1, 2}, "size": torch.Size([2]),
        "dtype": torch.bfloat16, "device": torch.device("cpu"), "ordered": collections.OrderedDict(b=1, a=2),
        "counter": collections.Counter("aab"), ("tuple", 1): [(), [], {}], 1.5: True,
        "numpy": np.float32(1.5), np.int64(3): np.bool_(True), "default": collections.defaultdict(list, a=[1]),
        "conjugate": torch.ones(2, dtype=torch.cfloat).mul(1j).conj(), "empty": torch.empty(0, 3),
        "sparse": torch.eye(3).to_sparse(), "quarter": torch.ones(3).to(torch.float8_e4m3fn).view(torch.uint8),
    }  # fmt: skip
    save(tmp_path / "a.ckpt", values)
    back = load(tmp_path / "a.ckpt")
    sparse = back.pop("sparse")
    assert torch.equal(sparse.to_dense(), torch.eye(3))
    assert all(same(back[key], value) for key, value in values.items() if key != "sparse")
    assert [type(back["numpy"]), type(back[3]), type(back["default"])] == [float, bool, dict]


def test_tied_weights_stay_shared_and_a_view_does_not_bring_its_storage(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    tied[1].weight = tied[0].weight
    big = torch.randn(1000, 1000)
    memory = torch.arange(10.0)
    views = {"row": big[3], "column": torch.randn(1000, 1000)[:, 3], "expanded": torch.ones(1).expand(10**6)}
    parts = {"left": memory[:6], "right": memory[4:8], "bits": memory[:2].view(torch.int32)}
    save(tmp_path / "a.ckpt", {"model": tied, **views, **parts})
    assert (tmp_path / "a.ckpt").stat().st_size < 2 * 64 * 64 * 4
    back = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert back["model"]["0.weight"].data_ptr() == back["model"]["1.weight"].data_ptr()
    assert all(torch.equal(back[key], view) for key, view in views.items())
    assert torch.equal(back["right"], memory[4:8])
    assert torch.equal(back["bits"].view(torch.float32), memory[:2])


def test_overlapping_views_still_share_memory_after_loading(tmp_path: Path) -> None:
    memory = torch.arange(100.0)
    save(tmp_path / "a.ckpt", {"left": memory[10:20], "right": memory[15:25]})
    back = load(tmp_path / "a.ckpt")
    back["left"][5] = -1.0
    assert back["right"][0] == -1.0


def test_channels_last_and_transposed_tensors_come_back_with_their_strides(tmp_path: Path) -> None:
    tensors = {"image": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), "turned": torch.randn(3, 5).t()}
    save(tmp_path / "a.ckpt", tensors)
    back = load(tmp_path / "a.ckpt")
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())
    assert back["image"].stride() == tensors["image"].stride()


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC):UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc])
def test_compressed_sparse_tensors_come_back(tmp_path: Path, layout: torch.layout) -> None:
    blocks = (2, 2) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    tensor = torch.eye(4).to_sparse(layout=layout, blocksize=blocks)
    save(tmp_path / "a.ckpt", {"sparse": tensor, "list": [tensor]})
    state: dict[str, Any] = {"sparse": None, "list": None}
    load(tmp_path / "a.ckpt", state)
    for loaded in (load(tmp_path / "a.ckpt"), state):
        for one in (loaded["sparse"], *loaded["list"]):
            assert one.layout == layout
            assert torch.equal(one.to_dense(), torch.eye(4))


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:TypedStorage:UserWarning")
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("zero_point", [torch.int64, torch.float32])
def test_quantized_tensors_come_back(tmp_path: Path, per_channel: bool, zero_point: torch.dtype) -> None:
    values, scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.5, 0.25])
    if per_channel:
        tensor = torch.quantize_per_channel(values, scales, torch.zeros(2, dtype=zero_point), 0, torch.qint8)
    else:
        tensor = torch.quantize_per_tensor(values, 0.5, 0, torch.qint8)
    save(tmp_path / "a.ckpt", {"first": torch.ones(2), "quantized": tensor, "last": torch.zeros(3)})
    loaded = load(tmp_path / "a.ckpt")
    assert loaded["quantized"].qscheme() == tensor.qscheme()
    assert torch.equal(loaded["quantized"].dequantize(), values)
    assert (loaded["first"].tolist(), loaded["last"].tolist()) == ([1.0, 1.0], [0.0, 0.0, 0.0])


def test_what_was_loaded_does_not_change_with_the_file(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", {"weight": torch.ones(100_000)})
    back = load(tmp_path / "a.ckpt")
    size = (tmp_path / "a.ckpt").stat().st_size
    with (tmp_path / "a.ckpt").open("r+b") as file:
        file.write(b"\0" * size)
    assert back["weight"].eq(1).all()


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_plain_torch_save_load(tmp_path: Path, zipped: bool) -> None:
    saved = trained()
    content = {"model": saved["model"].state_dict(), "optimizers": [saved["optimizers"][0].state_dict()], "epoch": 4}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    other = trained(1)
    assert load(tmp_path / "a.pt", {"model": other["model"], "optimizers": other["optimizers"]}) == {"epoch": 4}
    assert same(states(other)[:2], states(saved)[:2])


def test_tensors_in_odd_places_of_a_file_of_plain_torch_save_have_their_values(tmp_path: Path) -> None:
    with_attribute: Any = collections.OrderedDict(weight=torch.ones(2))
    with_attribute.extra = torch.full((3,), 2.0)
    torch.save({"set": {torch.full((2,), 3.0)}, "ordered": with_attribute}, tmp_path / "a.ckpt")
    saved = load(tmp_path / "a.ckpt")
    assert [tensor.tolist() for tensor in saved["set"]] == [[3.0, 3.0]]
    assert saved["ordered"].extra.tolist() == [2.0, 2.0, 2.0]
    assert saved["ordered"]["weight"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_forward_module.", "_orig_mod.module."])
def test_the_prefixes_of_other_wrappers_are_taken_off(tmp_path: Path, prefix: str) -> None:
    model = trained()["model"]
    torch.save({"model": {prefix + key: value for key, value in model.state_dict().items()}}, tmp_path / "a.pt")
    other = small_model()
    load(tmp_path / "a.pt", {"model": other})
    assert same(other.state_dict(), model.state_dict())


def test_a_model_whose_own_keys_begin_with_module_is_left_alone(tmp_path: Path) -> None:
    own = nn.ModuleDict({"module": nn.Linear(2, 2)})
    save(tmp_path / "a.ckpt", {"model": own})
    other = nn.ModuleDict({"module": nn.Linear(2, 2)})
    load(tmp_path / "a.ckpt", {"model": other})
    assert torch.equal(other["module"].weight, own["module"].weight)


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def test_compiled_models_and_compiled_parts_are_saved_with_plain_keys(tmp_path: Path) -> None:
    model = small_model()
    part = nn.Sequential(compiled(model[0]), model[1], model[2])
    for name, module in {"whole": compiled(model), "part": part}.items():
        save(tmp_path / name, {"model": module})
        assert same(torch.load(tmp_path / name, weights_only=True)["model"], dict(model.state_dict()))
        other = small_model()
        target = compiled(other) if name == "part" else nn.Sequential(compiled(other[0]), other[1], other[2])
        load(tmp_path / name, {"model": target})
        assert same(other.state_dict(), model.state_dict())


def test_a_filter_chooses_what_is_written(tmp_path: Path) -> None:
    model = small_model()
    save(tmp_path / "a.ckpt", {"model": model, "step": 1}, filter={"model": lambda _, value: value.dim() == 2})
    assert set(load(tmp_path / "a.ckpt")["model"]) == {"0.weight", "2.weight"}
    load(tmp_path / "a.ckpt", {"model": small_model()}, strict=False)
    with pytest.raises(FabricKeyError, match=r"lacks 0\.bias"):
        load(tmp_path / "a.ckpt", {"model": small_model()})


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (bool, FabricTypeError, "filter is a dict"),
        ({"model": 1}, FabricTypeError, "can't be called"),
        ({"modle": print}, FabricValueError, "'modle'"),
    ],
)
def test_a_wrong_filter_is_refused(tmp_path: Path, wrong: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        save(tmp_path / "a.ckpt", {"model": small_model()}, filter=wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["module", "optimizer"])
def test_load_raw_takes_a_bare_state_dict(tmp_path: Path, kind: str) -> None:
    saved, other = trained(), trained(1)
    objects = {"module": lambda state: state["model"], "optimizer": lambda state: state["optimizers"][0]}
    torch.save(objects[kind](saved).state_dict(), tmp_path / "a.pt")
    load_raw(tmp_path / "a.pt", objects[kind](other))
    assert same(objects[kind](other).state_dict(), objects[kind](saved).state_dict())


def test_load_raw_names_what_it_takes(tmp_path: Path) -> None:
    with pytest.raises(FabricTypeError, match="state_dict and load_state_dict"):
        load_raw(tmp_path / "a.pt", {"model": small_model()})


class Refusing(nn.Linear):
    """Takes half of its state, then raises."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if getattr(self, "armed", False):
            self.armed = False
            self.weight.data.fill_(-1.0)
            raise OSError("no more")
        return super().load_state_dict(state_dict, strict, assign)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.head = nn.Linear(8, 5)


def failing_states() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    refusing = Refusing(4, 8)
    refusing.armed = True
    return {
        "a module with other keys": ({"model": Wide()}, FabricKeyError, r"state\[\"model\"\]: the file lacks body"),
        "another shape": (
            {"model": nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))},
            FabricValueError,
            r'state\["model"\]\["2.weight"\] has shape \(2, 8\) in the file and \(3, 8\) in the model',
        ),
        "a key that is missing": ({"nested": {"scheduler": object}, "absent": 1, "nothing": {}},
                                  FabricKeyError, "absent"),
        "more parameters": ({"optimizers": [torch.optim.AdamW([*small_model().parameters()][:2])]}, FabricValueError,
                            r'state\["optimizers"\]\[0\] has other parameters'),
        "an object that raises": ({"single": refusing}, CheckpointError, r"(?s)did not take.*OSError: no more"),
        "a number for a module": ({"history": small_model()}, CheckpointError, "no state dict there"),
        "fewer objects": ({"optimizers": [trained()["optimizers"][0]] * 2}, CheckpointError, "2 entries"),
    }  # fmt: skip


@pytest.mark.parametrize("case", list(failing_states()))
def test_a_failed_load_leaves_every_object_and_value_as_it_was(tmp_path: Path, case: str) -> None:
    broken, error, message = failing_states()[case]
    single = Refusing(4, 8)
    save(tmp_path / "a.ckpt", {**trained(), "single": single, "value": 1})
    others = trained(1)
    state = {"value": 0, "model": others["model"], "optimizers": others["optimizers"], **broken}
    state.setdefault("nested", others["nested"])
    objects = [broken.get("single", single), *([state["model"]] if "model" in state else [])]
    before = [{key: value.clone() for key, value in module.state_dict().items()} for module in objects]
    optimizer_before = {key: value.clone() for key, value in others["optimizers"][0].state_dict()["state"][0].items()}
    with pytest.raises(error, match=message):
        load(tmp_path / "a.ckpt", state)
    assert same(before, [dict(module.state_dict()) for module in objects])
    assert same(optimizer_before, others["optimizers"][0].state_dict()["state"][0])
    assert state["value"] == 0
    assert others["nested"]["step"] == 1


def optimizers_of_torch() -> list[type[torch.optim.Optimizer]]:
    found = [getattr(torch.optim, name) for name in dir(torch.optim)]
    return [kind for kind in found if isinstance(kind, type) and kind.__module__.startswith("torch.optim.")
            and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer]  # fmt: skip


def stepped(kind: type[torch.optim.Optimizer], shape: tuple[int, ...] = (4, 3)) -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.ones(shape))
    optimizer: torch.optim.Optimizer = kind([parameter])  # type: ignore[call-arg, arg-type]

    def closure() -> torch.Tensor:
        loss = parameter.square().sum()
        parameter.grad = (2 * parameter).detach()
        if kind is torch.optim.SparseAdam:
            parameter.grad = parameter.grad.to_sparse()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return optimizer


@pytest.mark.parametrize("kind", optimizers_of_torch(), ids=lambda kind: kind.__name__)
def test_the_state_of_every_optimizer_of_torch_loads_into_a_fresh_one(
    tmp_path: Path, kind: type[torch.optim.Optimizer]
) -> None:
    saved = stepped(kind)
    save(tmp_path / "a.ckpt", {"optimizer": saved})
    fresh = kind([nn.Parameter(torch.ones(4, 3))])  # type: ignore[call-arg, arg-type]
    load(tmp_path / "a.ckpt", {"optimizer": fresh})
    assert same(fresh.state_dict()["state"], saved.state_dict()["state"])


class Rows(torch.optim.SGD):
    """Keeps one number a row."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["rows"] = torch.ones(len(parameter))


def test_the_state_of_a_users_optimizer_has_the_shapes_that_it_likes(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", {"optimizer": stepped(Rows)})
    fresh = Rows([nn.Parameter(torch.ones(4, 3))])
    load(tmp_path / "a.ckpt", {"optimizer": fresh})
    assert fresh.state_dict()["state"][0]["rows"].shape == (4,)


@pytest.mark.parametrize(
    ("current", "message"),
    [
        (torch.optim.Adam([nn.Parameter(torch.ones(3, 4))]),
         r'\["state"\]\[0\]\["exp_avg"\] has shape \(4, 3\) in the file, and the parameter has \(3, 4\)'),
        (torch.optim.SGD([nn.Parameter(torch.ones(4, 3))]), "another kind of optimizer.*lacks momentum, dampening"),
        (torch.optim.RMSprop([nn.Parameter(torch.ones(4, 3))]), "another kind of optimizer.*lacks momentum, alpha"),
    ],
    ids=["another shape", "Adam into SGD", "Adam into RMSprop"],
)  # fmt: skip
def test_an_optimizer_that_does_not_fit_is_refused_before_anything_changes(
    tmp_path: Path, current: torch.optim.Optimizer, message: str
) -> None:
    save(tmp_path / "a.ckpt", {"model": nn.Linear(2, 2), "optimizer": stepped(torch.optim.Adam), "step": 3})
    model, before = nn.Linear(2, 2), current.state_dict()
    weight = model.weight.detach().clone()
    state = {"model": model, "optimizer": current, "step": 0}
    with pytest.raises(FabricValueError, match=message):
        load(tmp_path / "a.ckpt", state)
    assert torch.equal(model.weight, weight)
    assert state["step"] == 0
    assert current.state_dict() == before


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_a_file_of_an_older_torch_and_one_with_a_schedulers_keys_load(
    tmp_path: Path, kind: type[torch.optim.Optimizer]
) -> None:
    state = stepped(kind).state_dict()
    for name in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        state["param_groups"][0].pop(name, None)
    state["param_groups"][0]["initial_lr"] = 0.1
    torch.save({"optimizer": state}, tmp_path / "a.ckpt")
    fresh = stepped(kind)
    load(tmp_path / "a.ckpt", {"optimizer": fresh})
    fresh.step()
    assert fresh.param_groups[0]["initial_lr"] == 0.1


def test_without_strict_what_fits_is_loaded_and_the_rest_is_named(tmp_path: Path) -> None:
    saved = Wide()
    save(tmp_path / "a.ckpt", {"model": saved, "step": 3})
    other = Wide()
    other.head = nn.Linear(8, 7)
    state = {"model": other, "step": 0, "absent": "kept"}
    with pytest.warns(UserWarning, match=r'\["head.weight"\] has shape \(5, 8\) in the file and \(7, 8\)'):
        load(tmp_path / "a.ckpt", state, strict=False)
    assert torch.equal(other.body.weight, saved.body.weight)
    assert (state["step"], state["absent"]) == (3, "kept")


def test_batch_norm_of_an_old_file_without_its_counter_loads_as_in_torch(tmp_path: Path) -> None:
    model = small_model()
    old = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    torch.save({"model": old}, tmp_path / "a.pt")
    load(tmp_path / "a.pt", {"model": small_model()})


class Migrating(nn.Linear):
    """Reads the key of an earlier version of itself, as users do."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        if prefix + "w" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "w")
        super()._load_from_state_dict(state_dict, prefix, *others)


def test_a_module_that_migrates_old_keys_does_so(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2, 2), "bias": torch.ones(2)}}, tmp_path / "a.pt")
    model = Migrating(2, 2)
    load(tmp_path / "a.pt", {"model": model})
    assert model.weight.eq(1).all()
    torch.save({"model": {"bias": torch.zeros(2)}}, tmp_path / "b.pt")
    with pytest.raises(FabricKeyError, match="weight"):
        load(tmp_path / "b.pt", {"model": model})
    assert model.bias.eq(1).all()


class Tagged(nn.Parameter):
    """A parameter of a class of the user's own."""


def test_a_parameter_of_a_users_own_class_is_saved_as_a_tensor(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.weight = Tagged(torch.ones(2, 2))
    save(tmp_path / "model.ckpt", {"model": model})
    assert type(torch.load(tmp_path / "model.ckpt", weights_only=True)["model"]["weight"]) is torch.Tensor


def test_any_object_with_a_state_comes_back_also_deep_inside(tmp_path: Path) -> None:
    counter, other = Counter(), Counter()
    counter.count = 5
    save(tmp_path / "a.ckpt", {"a": [{"b": (counter,)}]})
    load(tmp_path / "a.ckpt", {"a": [{"b": (other,)}]})
    assert other.count == 5


def test_a_dict_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FabricTypeError, match='"model": model'):
        save(tmp_path / "a.ckpt", small_model())  # type: ignore[arg-type]
    with pytest.raises(FabricTypeError, match="load_raw"):
        load(tmp_path / "a.ckpt", small_model())  # type: ignore[arg-type]
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="does not hold a dict"):
        load(tmp_path / "list.pt")
