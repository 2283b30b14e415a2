"""The loss scaler on step hooks equals ``GradScaler`` by hand, in every order of calls."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from fabric_lite import Fabric, FabricRuntimeError, FabricTypeError
from fabric_lite.optim import LossScaler
from tests.models import Net, batches, make_net, weights

OPTIMIZERS = {
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


def loss_of(model: nn.Module, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    return model(x).pow(2).mean() * factor


def assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, msg=f"{name} differs")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_steps_and_skipped_steps_equal_grad_scaler_by_hand(name: str, clip: float | None) -> None:
    raw = make_net()
    model = copy.deepcopy(raw)
    optimizer, by_hand = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](raw.parameters())
    fabric = Fabric(accelerator="cpu", devices=1, precision="16-mixed")
    scaler = torch.amp.GradScaler("cpu")
    fabric.setup(model, optimizer)
    scales = []
    for step, x in enumerate(batches(8)):
        factor = float("inf") if step in (2, 5) else 1.0
        fabric.backward(loss_of(model, x, factor))
        if clip is not None:
            fabric.clip_gradients(model, optimizer, max_norm=clip)
        optimizer.step()
        optimizer.zero_grad()

        with torch.autocast("cpu", torch.float16):
            out = raw(x)
        scaler.scale(out.float().pow(2).mean() * factor).backward()
        if clip is not None:
            scaler.unscale_(by_hand)
            torch.nn.utils.clip_grad_norm_(raw.parameters(), clip)
        scaler.step(by_hand)
        scaler.update()
        by_hand.zero_grad()
        assert_equal(model, raw)
        scales.append(fabric.state_dict()["loss_scaler"]["scale"])
        assert scales[-1] == scaler.get_scale()
    assert scales[-1] == scales[0] / 4
    for mine, other in zip(optimizer.state.values(), by_hand.state.values(), strict=True):
        for key, value in mine.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


@pytest.mark.parametrize("order", ["b1 b2 s1 s2", "b1 s1 b2 s2", "b2 b1 s1 s2", "b1 b2 s2 s1"])
@pytest.mark.parametrize("overflow", [None, 1, 2])
def test_two_optimizers_step_right_in_any_order_and_an_overflow_skips_only_its_own(
    order: str, overflow: int | None
) -> None:
    models = {1: make_net(1), 2: make_net(2)}
    references = copy.deepcopy(models)
    optimizers = {key: torch.optim.SGD(model.parameters(), lr=0.1) for key, model in models.items()}
    by_hand = {key: torch.optim.SGD(model.parameters(), lr=0.1) for key, model in references.items()}
    fabric = Fabric(accelerator="cpu", devices=1, precision="16-mixed")
    for key in models:
        fabric.setup(models[key], optimizers[key])
    for round_number, x in enumerate(batches(3)):
        for call in order.split():
            key = int(call[1])
            factor = float("inf") if key == overflow and round_number == 1 else 1.0
            if call[0] == "b":
                fabric.backward(loss_of(models[key], x, factor))
            else:
                optimizers[key].step()
                optimizers[key].zero_grad()
        for key, raw in references.items():
            if key == overflow and round_number == 1:
                continue
            with torch.autocast("cpu", torch.float16):
                out = raw(x)
            # One scale for all is exact: it is a power of two.
            (out.float().pow(2).mean() * 65536.0).backward()
            for parameter in raw.parameters():
                parameter.grad /= 65536.0
            by_hand[key].step()
            by_hand[key].zero_grad()
    for key in models:
        assert_equal(models[key], references[key])


@pytest.mark.parametrize(("order", "updates"), [("b1 b2 s1 s2", 1), ("b1 s1 b2 s2", 2), ("b1 b1 s1", 1), ("b1 s1", 1)])
def test_the_scale_is_updated_once_per_set_of_steps(order: str, updates: int) -> None:
    parameters = {key: nn.Parameter(torch.ones(2)) for key in (1, 2)}
    optimizers = {key: torch.optim.SGD([parameter], lr=0.0) for key, parameter in parameters.items()}
    scaler = LossScaler("cpu")
    for optimizer in optimizers.values():
        scaler.attach(optimizer)
    for call in order.split():
        key = int(call[1])
        if call[0] == "b":
            scaler.backward(parameters[key].sum(), torch.Tensor.backward)
        else:
            optimizers[key].step()
            optimizers[key].zero_grad()
    assert scaler.state_dict()["_growth_tracker"] == updates


def test_a_generator_that_holds_the_discriminators_gradients_delays_the_update() -> None:
    """GAN order: the discriminator's loss leaves gradients in the generator, which nobody has stepped on or cleared."""
    parameters = {key: nn.Parameter(torch.ones(2)) for key in "dg"}
    optimizers = {key: torch.optim.SGD([parameter], lr=0.1) for key, parameter in parameters.items()}
    scaler = LossScaler("cpu")
    for optimizer in optimizers.values():
        scaler.attach(optimizer)
    for _ in range(2):
        scaler.backward((parameters["d"] * parameters["g"]).sum(), torch.Tensor.backward)
        optimizers["d"].step()
        optimizers["d"].zero_grad()
    assert scaler.state_dict()["_growth_tracker"] == 0
    optimizers["g"].zero_grad()
    assert scaler.state_dict()["_growth_tracker"] == 1


class CallsSuperStep(torch.optim.SGD):
    """A subclass whose step calls its parent's: torch fires the hooks of both."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class CountsInGroups(torch.optim.SGD):
    """Keeps a counter in its groups, as Prodigy and others do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize("kind", [CallsSuperStep, CountsInGroups])
def test_nested_steps_unscale_once_and_an_overflow_leaves_group_counters_alone(kind: type) -> None:
    model, raw = make_net(), make_net()
    optimizer, by_hand = kind(model.parameters(), lr=0.1), kind(raw.parameters(), lr=0.1)
    fabric = Fabric(accelerator="cpu", devices=1, precision="16-mixed")
    scaler = torch.amp.GradScaler("cpu")
    fabric.setup(model, optimizer)
    for step, x in enumerate(batches(4)):
        factor = float("nan") if step == 1 else 1.0
        optimizer.zero_grad()
        fabric.backward(loss_of(model, x, factor))
        optimizer.step()
        by_hand.zero_grad()
        with torch.autocast("cpu", torch.float16):
            out = raw(x)
        scaler.scale(out.float().pow(2).mean() * factor).backward()
        scaler.step(by_hand)
        scaler.update()
    assert_equal(model, raw)
    assert [group.get("k") for group in optimizer.param_groups] == [group.get("k") for group in by_hand.param_groups]


class RaisesOnce(torch.optim.SGD):
    fails = True

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            self.fails = False
            raise RuntimeError("disk on fire")
        return super().step(closure)


def test_a_step_that_raises_leaves_the_optimizer_whole() -> None:
    model, raw = make_net(), make_net()
    optimizer, by_hand = RaisesOnce(model.parameters(), lr=0.1), torch.optim.SGD(raw.parameters(), lr=0.1)
    fabric = Fabric(accelerator="cpu", devices=1, precision="16-mixed")
    fabric.setup(model, optimizer)
    first, second = batches(2)
    fabric.backward(loss_of(model, first, float("inf")))
    with pytest.raises(RuntimeError, match="disk on fire"):
        optimizer.step()
    optimizer.zero_grad()
    fabric.backward(loss_of(model, second))
    optimizer.step()
    with torch.autocast("cpu", torch.float16):
        out = raw(second)
    (out.float().pow(2).mean() * 65536.0).backward()
    for parameter in raw.parameters():
        parameter.grad /= 65536.0
    by_hand.step()
    assert_equal(model, raw)


def test_accumulated_gradients_are_unscaled_once() -> None:
    model, raw = make_net(), make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric = Fabric(accelerator="cpu", devices=1, precision="16-mixed")
    fabric.setup(model, optimizer)
    for x in batches(4):
        fabric.backward(loss_of(model, x) / 4)
        with torch.autocast("cpu", torch.float16):
            out = raw(x)
        (out.float().pow(2).mean() / 4 * 65536.0).backward()
    norm = fabric.clip_gradients(model, optimizer, max_norm=1e9)
    optimizer.step()
    for parameter in raw.parameters():
        parameter.grad /= 65536.0
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm([p.grad for p in raw.parameters()]), rtol=0, atol=0)
    torch.optim.SGD(raw.parameters(), lr=0.1).step()
    assert_equal(model, raw)


def test_a_plain_backward_names_fabric_backward() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="16-mixed")
    model = fabric.setup(make_net())
    with pytest.raises(FabricRuntimeError, match=r"fabric\.backward\(loss\)"):
        model(torch.ones(2, 4)).mean().backward()
    fabric.backward(model(torch.ones(2, 4)).mean())


@pytest.mark.parametrize("as_keyword", [True, False])
def test_a_closure_with_loss_scaling_is_refused_and_the_next_step_works(as_keyword: bool) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="16-mixed")
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    with pytest.raises(FabricTypeError, match="closure"):
        optimizer.step(closure=lambda: 1.0) if as_keyword else optimizer.step(lambda: 1.0)
    before = [parameter.clone() for parameter in model.parameters()]
    fabric.backward(model(torch.ones(2, 4)).mean())
    optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(("precision", "closure"), list(itertools.product(["32-true", "bf16-mixed"], [True, False])))
def test_without_a_scaler_the_step_is_torchs_own(precision: str, closure: bool) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    assert type(optimizer) is torch.optim.SGD
    assert not optimizer._optimizer_step_pre_hooks
    behind = {hook.__qualname__.split(".")[0] for hook in optimizer._optimizer_step_post_hooks.values()}
    assert behind == {"Steps", "Window"}, "what counts steps and micro steps"
    if closure:
        assert optimizer.step(lambda: 3.0) == 3.0


def scaled_run() -> tuple[Fabric, Net, torch.optim.Optimizer]:
    fabric = Fabric(accelerator="cpu", devices=1, precision="16-mixed")
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    return fabric, model, optimizer


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("clip_again", [True, False])
def test_a_window_given_up_after_clipping_leaves_nothing(set_to_none: bool, clip_again: bool) -> None:
    fabric, model, optimizer = scaled_run()
    other, reference, step = scaled_run()
    first, second = batches(2)
    fabric.backward(loss_of(model, first))
    fabric.clip_gradients(model, optimizer, max_norm=1e9)
    optimizer.zero_grad(set_to_none=set_to_none)
    fabric.backward(loss_of(model, second))
    if clip_again:
        norm = fabric.clip_gradients(model, optimizer, max_norm=1e9)
        assert norm is not None
        assert norm < 10
    optimizer.step()
    other.backward(loss_of(reference, second))
    step.step()
    assert_equal(model, reference)


def test_a_backward_onto_clipped_gradients_is_an_error() -> None:
    fabric, model, optimizer = scaled_run()
    first, second = batches(2)
    fabric.backward(loss_of(model, first))
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    with pytest.raises(FabricRuntimeError, match="clip once"):
        fabric.backward(loss_of(model, second))


def test_clipping_one_model_between_the_backwards_of_two_is_fine() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="16-mixed")
    models = [make_net(1), make_net(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        fabric.setup(model, optimizer)
    before = [weights(model) for model in models]
    for model, optimizer, x in zip(models, optimizers, batches(2), strict=True):
        fabric.backward(loss_of(model, x))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    for model, optimizer, old in zip(models, optimizers, before, strict=True):
        optimizer.step()
        moved = max(float((new - start).abs().max()) for new, start in zip(weights(model), old, strict=True))
        assert 0 < moved <= 0.1


def test_an_idle_optimizer_with_zeroed_gradients_does_not_hold_the_scale() -> None:
    fabric, model, optimizer = scaled_run()
    idle = make_net()
    idle_step = torch.optim.SGD(idle.parameters(), lr=0.1)
    fabric.setup(idle, idle_step)
    fabric.backward(loss_of(model, batches(1)[0]) + loss_of(idle, batches(1)[0]))
    for each in (optimizer, idle_step):
        each.step()
        each.zero_grad(set_to_none=False)
    for _ in range(5):
        fabric.backward(loss_of(model, batches(1)[0], float("inf")))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert fabric.state_dict()["loss_scaler"]["scale"] == 65536 / 2**5


def test_loading_a_scale_forgets_what_was_going_on() -> None:
    fabric, model, optimizer = scaled_run()
    saved = fabric.state_dict()
    fabric.backward(loss_of(model, batches(1)[0], float("inf")))
    optimizer.step()
    optimizer.zero_grad()
    fabric.load_state_dict(saved)
    fabric.backward(loss_of(model, batches(1)[0]))
    assert fabric.state_dict()["loss_scaler"]["scale"] == 65536


def test_clipping_for_an_optimizer_that_is_not_set_up_is_an_error() -> None:
    fabric, model, _ = scaled_run()
    fabric.backward(loss_of(model, batches(1)[0]))
    with pytest.raises(ValueError, match="was not set up"):
        fabric.clip_gradients(model, torch.optim.SGD(model.parameters(), lr=0.1), max_norm=1.0)


def test_a_gradient_penalty_needs_no_scaled_loss() -> None:
    critic = Fabric(accelerator="cpu", devices=1, precision="16-mixed").setup(make_net())
    x = torch.ones(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    assert gradient.shape == x.shape


def test_a_compiled_model_is_scaled_like_a_plain_one() -> None:
    fabric, model, optimizer = scaled_run()
    other, reference, step = scaled_run()
    model.compile(backend="aot_eager", fullgraph=True)
    for run, target, stepped in ((fabric, model, optimizer), (other, reference, step)):
        run.backward(loss_of(target, batches(1)[0]))
        stepped.step()
    torch._dynamo.reset()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_an_optimizer_that_is_never_stepped_does_not_keep_a_scale_at_which_nothing_trains() -> None:
    """The critic's head is trained later; meanwhile its gradients pile up and every first step overflows."""
    fabric, model, optimizer = scaled_run()
    head = make_net(1)
    later = torch.optim.SGD(head.parameters(), lr=0.1)
    fabric.setup(head, later)
    x = batches(1)[0]
    for step in range(4):
        fabric.backward(loss_of(head, model(x), float("inf") if step == 0 else 1.0))
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            later.zero_grad()
            fabric.backward(loss_of(head, x))  # these wait, at the first scale, through the update
            waiting = head.first.weight.grad.clone()  # type: ignore[union-attr]
            fabric.backward(loss_of(model, x, float("inf")))
            optimizer.step()
            optimizer.zero_grad()
            fabric.backward(loss_of(model, x))
            assert torch.equal(head.first.weight.grad, waiting / 2)  # type: ignore[arg-type]
    assert fabric.state_dict()["loss_scaler"]["scale"] == 65536 / 4
