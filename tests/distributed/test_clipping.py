"""Clipping equals one process, whatever the layout of the parameters, also of several layouts at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fabric_lite import FabricValueError
from fabric_lite.clipping import clip_grad_norm, clip_grad_value
from fabric_lite.testing import RankPool
from tests.models import CountCollectives, full, mesh_of

# Mesh, and for each of three parameters its placements; None is a plain tensor.
LAYOUTS: dict[str, tuple[tuple[int, int], list[tuple[str, ...] | None]]] = {
    "plain beside tensor parallel": ((1, 2), [("tensor", "shard 0"), ("tensor", "replicate"), None]),
    "sharded data": ((2, 1), [("data", "shard 0")] * 3),
    "two axes and one": (
        (2, 2),
        [("both", "shard 0", "shard 1"), ("data", "shard 0"), ("both", "shard 1", "replicate")],
    ),
    "all of them": ((2, 2), [("tensor", "shard 1"), ("data", "shard 0"), None]),
}


def whole_gradients(dtype: torch.dtype = torch.float64, factor: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    # 3 and 5 rows: some ranks hold fewer than others, one of four none.
    return [(torch.randn(rows, 6, generator=generator) * factor).to(dtype) for rows in (5, 3, 4)]


def laid_out(layout: str, gradients: list[torch.Tensor]) -> list[nn.Parameter]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    shape, kinds = LAYOUTS[layout]
    mesh = mesh_of(shape, ("data", "tensor"))
    parameters = []
    for gradient, kind in zip(gradients, kinds, strict=True):
        made: Any = gradient.clone()
        if kind is not None:
            axis, *names = kind
            placements = [Replicate() if name == "replicate" else Shard(int(name[-1])) for name in names]
            made = distribute_tensor(made, mesh if axis == "both" else mesh[axis], placements)
        parameter = nn.Parameter(torch.zeros_like(made))
        parameter.grad = made
        parameters.append(parameter)
    return parameters


def plain(gradients: list[torch.Tensor]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


def gradients_of(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [full(parameter.grad) for parameter in parameters]


class CountReads(TorchDispatchMode):
    """Counts where the host waits for a number of the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def clip_by_norm(layout: str, norm_type: float) -> Any:
    parameters = laid_out(layout, whole_gradients())
    with CountCollectives() as collectives, CountReads() as reads:
        norm = clip_grad_norm(parameters, 0.5, norm_type)
    return norm, gradients_of(parameters), collectives.count, reads.count


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_norm_and_the_clipped_gradients_are_those_of_one_process(
    ranks: RankPool, layout: str, norm_type: float
) -> None:
    parameters = plain(whole_gradients())
    expected = torch.nn.utils.clip_grad_norm_(parameters, 0.5, norm_type)
    for norm, gradients, collectives, reads in ranks.run(
        clip_by_norm, layout, norm_type, ranks=math.prod(LAYOUTS[layout][0])
    ):
        assert type(norm) is torch.Tensor
        torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)
        for one, two in zip(gradients, gradients_of(parameters), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-13, atol=0)
        assert collectives == 1
        assert reads == 0


def clip_by_value(layout: str) -> list[torch.Tensor]:
    parameters = laid_out(layout, whole_gradients())
    clip_grad_value(parameters, 0.25)
    return gradients_of(parameters)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_clipped_in_every_layout(ranks: RankPool, layout: str) -> None:
    expected = [gradient.clamp(-0.25, 0.25) for gradient in whole_gradients()]
    for gradients in ranks.run(clip_by_value, layout, ranks=math.prod(LAYOUTS[layout][0])):
        assert all(torch.equal(one, two) for one, two in zip(gradients, expected, strict=True))


def not_finite_on_one_rank(layout: str, position: int, value: float, norm_type: float) -> tuple[str, bool, float]:
    parameters = laid_out(layout, whole_gradients())
    local = [getattr(parameter.grad, "_local_tensor", parameter.grad) for parameter in parameters]
    if torch.distributed.get_rank() == 0:
        local[position].flatten()[0] = value
    before = [part.clone() for part in local]
    with pytest.raises(RuntimeError, match="non-finite") as error:
        clip_grad_norm(parameters, 1.0, norm_type, error_if_nonfinite=True)
    untouched = all(torch.equal(*map(torch.nan_to_num, pair)) for pair in zip(before, local, strict=True))
    return str(error.value), untouched, float(clip_grad_norm(parameters, 1.0, norm_type))


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_number_that_is_not_finite_on_one_rank_raises_on_all_and_changes_nothing(
    ranks: RankPool, position: int, value: float, norm_type: float
) -> None:
    """Whatever the layout of the tensor that it is in: the plain one too, of which each rank has a copy."""
    found = ranks.run(not_finite_on_one_rank, "all of them", position, value, norm_type, ranks=4)
    assert len({message for message, _, _ in found}) == 1
    assert all(untouched for _, untouched, _ in found)
    assert {str(norm) for _, _, norm in found} == {str(value)}


def half_precision_norms() -> list[torch.Tensor]:
    return [
        clip_grad_norm(laid_out("all of them", whole_gradients(torch.float16, factor)), 1.0) for factor in (100.0, 2e4)
    ]


def test_float16_gradients_have_a_norm_up_to_the_largest_float16(ranks: RankPool) -> None:
    """torch's own norm of DTensors sums squares in float16, where 300 * 300 is infinite already."""
    expected = [torch.nn.utils.get_total_norm(whole_gradients(torch.float16, factor)) for factor in (100.0, 2e4)]
    assert 300 < float(expected[0]) < math.inf
    assert float(expected[1]) == math.inf
    for norms in ranks.run(half_precision_norms, ranks=4):
        assert [norm.dtype for norm in norms] == [torch.float16] * 2
        torch.testing.assert_close(norms[0], expected[0], rtol=2e-3, atol=0)
        assert norms[1] == math.inf


def some_without_gradient() -> float:
    parameters = laid_out("all of them", whole_gradients())
    parameters[1].grad = None
    norm = float(clip_grad_norm(parameters, 1.0))
    for parameter in parameters:
        parameter.grad = None
    assert clip_grad_norm(parameters, 1.0) == 0
    return norm


def test_parameters_without_a_gradient_are_passed_over(ranks: RankPool) -> None:
    first, _, third = whole_gradients()
    expected = float(torch.nn.utils.get_total_norm([first, third]))
    assert ranks.run(some_without_gradient, ranks=4) == pytest.approx([expected] * 4, rel=1e-14)


def refused_norms() -> None:
    for norm_type in (0.0, -1.0, math.nan):
        with pytest.raises(FabricValueError, match="norm_type="):
            clip_grad_norm(laid_out("sharded data", whole_gradients()), 1.0, norm_type)


def test_a_norm_of_no_positive_order_is_refused_for_shards(ranks: RankPool) -> None:
    ranks.run(refused_norms, ranks=2)


class CountKernels(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm_type", [0.0, 1.0, 2.0, math.inf])
def test_plain_tensors_alone_are_clipped_by_torch_bit_for_bit(norm_type: float) -> None:
    ours, theirs = plain(whole_gradients(torch.float32)), plain(whole_gradients(torch.float32))
    with CountKernels() as kernels:
        norm = clip_grad_norm(ours, 0.5, norm_type)
    with CountKernels() as expected_kernels:
        expected = torch.nn.utils.clip_grad_norm_(theirs, 0.5, norm_type)
    assert torch.equal(norm, expected)
    assert all(torch.equal(one, two) for one, two in zip(gradients_of(ours), gradients_of(theirs), strict=True))
    assert kernels.count == expected_kernels.count > 0


def test_a_norm_that_is_not_finite_raises_for_plain_tensors_too() -> None:
    parameters = plain([torch.tensor([1.0, math.nan])])
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm(parameters, 1.0, error_if_nonfinite=True)
    assert float(parameters[0].grad[0]) == 1.0  # type: ignore[index]
