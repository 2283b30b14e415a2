"""``setup`` returns the user's own objects, and what is not asked for is not touched."""

from __future__ import annotations

import abc
import copy
import dataclasses
import gc
import inspect
import pickle
import typing
import warnings
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from fabric_lite import (
    Fabric,
    FabricRuntimeError,
    FabricTypeError,
    FabricValueError,
    StrategyError,
    is_wrapped,
    plain,
)
from tests.models import Net, make_net

PRECISIONS = ["32-true", "bf16-mixed"]


def fabric_with(precision: str = "bf16-mixed") -> Fabric:
    return Fabric(accelerator="cpu", devices=1, precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_setup_returns_the_same_objects(precision: str) -> None:
    raw = Net()
    optimizer = torch.optim.SGD(raw.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    keys, names = list(raw.state_dict()), [name for name, _ in raw.named_parameters()]
    model, same, schedule = fabric_with(precision).setup(raw, optimizer, scheduler=scheduler)
    assert model is raw
    assert same is optimizer
    assert schedule is scheduler
    assert isinstance(model, Net)
    assert type(model).__name__ == "Net"
    assert type(model).__qualname__ == "Net"
    assert type(model).__module__ == Net.__module__
    assert type(model).__doc__ == Net.__doc__
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == names
    assert [name for name, _ in model.named_modules()] == ["", "first", "second"]
    assert is_wrapped(model)
    assert is_wrapped(optimizer)
    assert model.module is model
    assert inspect.signature(model.forward) == inspect.signature(Net().forward)
    model.note = "changed"
    assert raw.note == "changed"


def test_on_one_device_in_32_true_nothing_runs_between_the_user_and_torch() -> None:
    model = fabric_with("32-true").setup(Net())
    assert type(model).forward is Net.forward
    assert type(model).__call__ is nn.Module.__call__
    assert "forward" not in type(model).__dict__
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("precision", PRECISIONS)
def test_copies_and_pickles_are_plain_and_compute_with_their_own_weights(precision: str) -> None:
    model = fabric_with(precision).setup(make_net())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy([model])[0]):
        assert type(other) is Net
        assert not is_wrapped(other)
        x = torch.ones(2, 4)
        before = other(x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(other(x), before)
        assert before.abs().sum() > 0
        model.load_state_dict(other.state_dict())
    assert is_wrapped(model)
    assert type(copy.copy(model)) is Net


@pytest.mark.parametrize("precision", PRECISIONS)
def test_release_gives_the_plain_object_back(precision: str) -> None:
    fabric = fabric_with(precision)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    fabric.release(model, optimizer)
    assert type(model) is Net
    assert "_fabric_lite_extension" not in model.__dict__
    assert not is_wrapped(optimizer)
    fabric.setup(model, optimizer)
    fabric.close()
    assert type(model) is Net


def test_an_object_of_another_fabric_is_released_first(capsys: pytest.CaptureFixture[str]) -> None:
    model = fabric_with("bf16-mixed").setup(make_net())
    assert fabric_with("32-true").setup(model) is model
    assert model(torch.ones(1, 4)).dtype == torch.float32
    assert "released first" in capsys.readouterr().err


def test_setting_up_twice_is_an_error() -> None:
    fabric = fabric_with()
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    with pytest.raises(FabricValueError, match="set up already"):
        fabric.setup(model)
    with pytest.raises(FabricValueError, match="set up already"):
        fabric.setup(Net(), optimizer)


def test_a_forward_assigned_before_or_after_setup_runs_in_the_runs_precision() -> None:
    fabric = fabric_with("bf16-mixed")
    model = Net()
    seen = []

    def early(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return Net.forward(model, x)

    model.forward = early  # type: ignore[method-assign]
    fabric.setup(model)
    model(torch.ones(1, 4))
    model.forward = lambda x: early(x) * 2  # type: ignore[method-assign]
    model(torch.ones(1, 4))
    model.forward(torch.ones(1, 4))
    assert seen == [True] * 3
    del model.forward
    model(torch.ones(1, 4))
    assert len(seen) == 3
    with pytest.raises(AttributeError):
        del model.forward


def test_hooks_fire_once() -> None:
    model = fabric_with("bf16-mixed").setup(Net())
    calls: list[str] = []
    model.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.register_forward_hook(lambda *_: calls.append("forward"))
    model.register_full_backward_hook(lambda *_: calls.append("backward"))
    model(torch.ones(1, 4, requires_grad=True)).sum().backward()
    assert calls == ["pre", "forward", "backward"]


class Output(NamedTuple):
    values: torch.Tensor
    label: str


@dataclasses.dataclass(frozen=True)
class Record:
    logits: torch.Tensor
    count: int
    nothing: None = None


class ModelOutput(dict):  # type: ignore[type-arg]
    """As Hugging Face's: a mapping with attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@pytest.mark.parametrize("make", [
    lambda t: t,
    lambda t: {"a": t, "n": 3},
    lambda t: (t, None, "x"),
    lambda t: [t, [t]],
    lambda t: Output(t, "label"),
    lambda t: Record(t, 2),
    lambda t: ModelOutput(logits=t, hidden=(t, t)),
], ids=["tensor", "dict", "tuple", "list", "namedtuple", "dataclass", "ModelOutput"])  # fmt: skip
def test_float_outputs_come_back_in_float32_in_containers_of_the_same_type(make: Any) -> None:
    class Returns(Net):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            half = super().forward(x)
            assert half.dtype == torch.bfloat16
            return make(half)

    output = fabric_with("bf16-mixed").setup(Returns())(torch.ones(1, 4))
    expected = make(torch.zeros(1))
    assert type(output) is type(expected)
    from fabric_lite.trees import leaves

    for leaf, other in zip(leaves(output), leaves(expected), strict=True):
        assert leaf.dtype == torch.float32 if isinstance(leaf, torch.Tensor) else leaf == other


class Registers(Net):
    """A registry by ``__init_subclass__`` that requires a keyword: it must not see our class."""

    known: typing.ClassVar[list[str]] = []

    def __init_subclass__(cls, *, tag: str, **kwargs: Any) -> None:
        Registers.known.append(tag)


class Named(Registers, tag="named"):
    pass


class Meta(type):
    made: typing.ClassVar[list[str]] = []

    def __new__(cls, name: str, bases: Any, namespace: Any) -> Any:
        Meta.made.append(name)
        return super().__new__(cls, name, bases, namespace)


class WithMeta(Net, metaclass=Meta):
    pass


class Abstract(abc.ABC, Net):
    @abc.abstractmethod
    def needed(self) -> None: ...


class Concrete(Abstract):
    def needed(self) -> None: ...


T = typing.TypeVar("T")


class GenericFirst(typing.Generic[T], Net):
    pass


class OwnDunders(Net):
    def __getattr__(self, name: str) -> Any:
        return 42 if name == "magic" else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)

    def __call__(self, x: Any) -> Any:
        return super().__call__(x)

    def __deepcopy__(self, memo: Any) -> Any:
        other = type(self)()
        other.load_state_dict(self.state_dict())
        other.copied = True
        return other

    def __reduce__(self) -> Any:
        return (type(self), ())


class Slotted(Net):
    __slots__ = ("extra",)


class MakesItsLike(Net):
    def like(self) -> Any:
        return self.__class__(width=3)


@pytest.mark.parametrize("kind", [Named, WithMeta, Concrete, GenericFirst, OwnDunders, Slotted, MakesItsLike])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_unusual_classes_are_extended_too(kind: type[Net], precision: str) -> None:
    tags, made = list(Registers.known), list(Meta.made)
    torch.manual_seed(0)
    model = kind()
    reference = copy.deepcopy(model).to(torch.float32)
    fabric = fabric_with(precision)
    assert fabric.setup(model) is model
    x = torch.ones(2, 4)
    with fabric.autocast():
        expected = reference(x)
    assert torch.equal(model(x), expected.float())
    assert isinstance(model, kind)
    other = copy.deepcopy(model)
    assert type(other) is kind
    if kind is OwnDunders:
        assert other.copied
        assert model.magic == 42
    if kind is MakesItsLike:
        assert model.like().first.out_features == 3
        assert model.like()(x).shape == (2, 4)
    assert Registers.known == tags
    assert Meta.made == made


def test_two_hundred_models_share_one_class_and_are_all_freed() -> None:
    fabric = fabric_with()
    models = [fabric.setup(Net()) for _ in range(200)]
    assert len({type(model) for model in models}) == 1
    references = [weakref.ref(model) for model in models]
    fabric.close()
    models.clear()
    gc.collect()
    assert not any(reference() is not None for reference in references)


def test_a_scripted_module_is_refused_with_the_way_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch, still in use
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(FabricTypeError, match=r"before torch\.jit\.script"):
        fabric_with().setup(scripted)


def test_a_lazy_module_is_refused_until_it_is_materialized() -> None:
    lazy = nn.LazyLinear(3)
    with pytest.raises(FabricTypeError, match="run one forward pass before setup"):
        fabric_with().setup(lazy)
    lazy(torch.ones(1, 2))
    assert fabric_with().setup(lazy)(torch.ones(1, 2)).shape == (1, 3)


def test_plain_is_for_export_and_parametrizations_work_before_and_after() -> None:
    model = fabric_with().setup(Net())
    with plain(model):
        assert type(model) is Net
        exported = torch.export.export(model, (torch.ones(2, 4),))
    assert exported.module()(torch.ones(2, 4)).shape == (2, 4)
    assert is_wrapped(model)
    nn.utils.parametrizations.weight_norm(model.first)
    assert model(torch.ones(2, 4)).shape == (2, 4)
    before = Net()
    nn.utils.parametrizations.weight_norm(before.first)
    assert fabric_with().setup(before)(torch.ones(2, 4)).shape == (2, 4)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["module.compile", "torch.compile"])
def test_compilation_before_or_after_setup_gives_the_same_numbers(when: str, how: str) -> None:
    raw, model = make_net(), make_net()
    fabric = fabric_with("bf16-mixed")
    target: Any = model
    if when == "after":
        fabric.setup(model)
    if how == "module.compile":
        model.compile(backend="aot_eager")
    else:
        target = torch.compile(model, backend="aot_eager")
    if when == "before":
        assert fabric.setup(target) is target
    x = torch.randn(4, 4)
    with fabric.autocast():
        expected = raw(x).float()
    output = target(x)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    output.sum().backward()
    expected.sum().backward()
    for mine, other in zip(model.parameters(), raw.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-6)
    torch._dynamo.reset()


def test_the_second_epoch_compiles_nothing() -> None:
    model = fabric_with("bf16-mixed").setup(make_net())
    frames = torch._dynamo.testing.CompileCounter()
    model.compile(backend=frames, fullgraph=True)
    first_epoch = 0
    for epoch in range(3):
        model.train()
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()
        model.eval()
        with torch.no_grad():
            model(torch.ones(2, 4))
        if epoch == 0:
            first_epoch = frames.frame_count
    assert frames.frame_count == first_epoch
    torch._dynamo.reset()


def test_marked_methods_run_in_the_runs_precision() -> None:
    model = fabric_with("bf16-mixed").setup(Net())
    x = torch.ones(2, 4)
    plainly = model.by_layers(x)
    model.mark_forward_method("by_layers")
    assert model.by_layers(x) != plainly
    with pytest.raises(FabricTypeError, match="no method 'nonsense'"):
        model.mark_forward_method("nonsense")


class Nested(nn.Module):
    """Runs itself within itself, and then goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.seen: list[tuple[torch.dtype, bool]] = []

    def forward(self, x: torch.Tensor, depth: int = 2, fails: bool = False) -> torch.Tensor:
        if depth:
            x = self(x, depth - 1, fails)
        elif fails:
            raise ValueError("inside")
        x = self.inner(x)
        self.seen.append((x.dtype, torch.is_autocast_cache_enabled()))
        return x


def test_the_contexts_of_a_precision_are_made_once_and_hold_within_each_other_and_after_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed").setup(Nested())
    made = []
    monkeypatch.setattr(torch, "autocast", lambda *words, kind=torch.autocast: made.append(words) or kind(*words))
    model(torch.ones(2, 4))
    with pytest.raises(ValueError, match="inside"):
        model(torch.ones(2, 4), fails=True)
    assert not torch.is_autocast_enabled("cpu")
    model(torch.ones(2, 4))
    count = len(made)
    for _ in range(3):
        model(torch.ones(2, 4))
    assert len(made) == count
    # A change of autocast's cache by the user holds as it does for a context that is made then.
    torch.set_autocast_cache_enabled(False)
    try:
        model(torch.ones(2, 4))
    finally:
        torch.set_autocast_cache_enabled(True)
    *before, first, second, third = model.seen
    assert {first, second, third} == {(torch.bfloat16, False)}
    assert set(before) == {(torch.bfloat16, True)}
    assert not torch.is_autocast_enabled("cpu")


def test_a_module_of_the_users_own_called_module_is_theirs() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x)

    model = fabric_with().setup(Holder())
    assert type(model.module) is nn.Linear


def test_a_set_up_model_in_another_one_trains() -> None:
    fabric = fabric_with("bf16-mixed")
    inner = fabric.setup(Net())
    outer = fabric.setup(nn.Sequential(inner, nn.Linear(4, 1)))
    outer(torch.ones(2, 4)).sum().backward()
    assert inner.first.weight.grad is not None
    assert next(iter(outer.state_dict())) == "0.first.weight"


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "fsdp"])
def test_strategies_for_several_processes_work_in_one(strategy: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy)
    raw, model = make_net(), make_net()
    fabric.setup(model)
    with fabric.no_backward_sync(model):
        fabric.backward(model(torch.ones(2, 4)).sum())
    fabric.backward(model(torch.ones(2, 4)).sum())
    (raw(torch.ones(2, 4)).sum() * 2).backward()
    for mine, other in zip(model.parameters(), raw.parameters(), strict=True):
        gradient: Any = mine.grad
        torch.testing.assert_close(gradient.full_tensor() if strategy == "fsdp" else gradient, other.grad)
    fabric.close()


def test_a_class_whose_forward_is_exchanged_later_runs_the_new_one() -> None:
    class Patched(Net):
        pass

    model = fabric_with().setup(Patched())
    Patched.forward = lambda _, x: x + 1  # type: ignore[assignment, method-assign, misc]
    assert torch.equal(model(torch.zeros(1, 4)), torch.ones(1, 4))
    assert torch.equal(fabric_with().setup(Patched())(torch.zeros(1, 4)), torch.ones(1, 4))


def test_a_users_own_attribute_called_fabric_is_theirs() -> None:
    fabric = fabric_with()
    model = Net()
    model._fabric = fabric  # type: ignore[assignment]
    assert not is_wrapped(model)
    fabric.setup(model)
    assert model._fabric is fabric


def test_a_fabric_does_not_keep_what_it_has_set_up() -> None:
    fabric = fabric_with("16-mixed")
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    references = [weakref.ref(model), weakref.ref(optimizer)]
    del model, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_private_methods_and_those_that_nn_module_has_can_be_marked() -> None:
    class Private(Net):
        def _train(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x)

        def extra_repr(self) -> str:
            return str(self.first(torch.ones(1, 4)).dtype)

    model = fabric_with("bf16-mixed").setup(Private())
    plainly = model._train(torch.ones(1, 4))
    for name in ("_train", "extra_repr"):
        model.mark_forward_method(name)
    assert not torch.equal(model._train(torch.ones(1, 4)), plainly)
    assert "bfloat16" in model.extra_repr()
    model.late = lambda x: x  # type: ignore[assignment]
    for wrong in ("late", 3):
        with pytest.raises(FabricTypeError, match="no method"):
            model.mark_forward_method(wrong)


def test_a_failed_setup_casts_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    with pytest.raises(FabricTypeError, match="1 in Sequential"):
        fabric_with("bf16-true").setup(model)
    assert model[0].weight.dtype == torch.float32


def test_a_compiled_module_of_a_set_up_model_is_set_up_already() -> None:
    fabric = fabric_with()
    model = fabric.setup(Net())
    with pytest.raises(FabricValueError, match="set up already"):
        fabric.setup(torch.compile(model, backend="eager"))
    assert fabric.release(model) is model
    assert type(model) is Net


def test_a_meta_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(StrategyError, match=r"first is first\.weight"):
        fabric_with().setup(model)


def test_a_closed_fabric_says_so() -> None:
    fabric = fabric_with()
    fabric.close()
    with pytest.raises(FabricRuntimeError, match="closed"):
        fabric.setup(Net())
