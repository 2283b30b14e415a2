"""Collectives over nested data: values, dtypes, errors on all ranks."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from fabric_lite import CollectiveError, Fabric, FabricRuntimeError, FabricValueError
from fabric_lite.collectives import Collectives, broadcast_object, gather_objects
from fabric_lite.testing import RankError, RankPool

DTYPES = [
    torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip


class Pair(NamedTuple):
    left: Any
    right: Any


def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=2)


def gather_and_reduce() -> dict[str, Any]:
    run = fabric()
    rank = run.global_rank
    results: dict[str, Any] = {}
    for dtype in DTYPES:
        mine = torch.tensor([rank, 1, 0]).to(dtype)
        kept = mine.clone()
        results[str(dtype)] = (
            run.all_gather(mine),
            {op: run.all_reduce(mine, reduce_op=op) for op in ("sum", "min", "max", "product", "mean")},
        )
        assert torch.equal(mine, kept), "the input was changed"
    big = 2**40 + 1 + rank
    results["big"] = (run.all_gather(big), run.all_reduce(big, reduce_op="sum"), run.all_reduce(big))
    results["tree"] = run.all_gather({"a": Pair(rank, [np.float64(rank) / 3]), "b": torch.full((2, 3), float(rank))})
    results["strided"] = run.all_gather(torch.arange(6).reshape(2, 3).t() + rank)
    return results


def test_gather_and_reduce_keep_dtypes_and_inputs(ranks: RankPool) -> None:
    for results in ranks.run(gather_and_reduce):
        for dtype in DTYPES:
            gathered, reduced = results[str(dtype)]
            assert gathered.dtype == dtype
            assert gathered.tolist() == [[0, 1, 0], [1, 1, 0]]
            assert all(reduced[op].dtype == dtype for op in ("sum", "min", "max", "product"))
            assert reduced["min"].tolist() == [0, 1, 0]
            assert reduced["max"].tolist() == [1, 1, 0]
            assert reduced["product"].tolist() == [0, 1, 0]
            assert reduced["sum"].tolist() == ([1, 1, 0] if dtype == torch.bool else [1, 2, 0])
            assert reduced["mean"].tolist() == [0.5, 1.0, 0.0]
            assert reduced["mean"].dtype == (dtype if dtype.is_floating_point else torch.float64)
        gathered, total, mean = results["big"]
        assert gathered.tolist() == [2**40 + 1, 2**40 + 2]
        assert total.item() == 2 * 2**40 + 3
        assert mean.item() == 2**40 + 1.5
        tree = results["tree"]
        assert isinstance(tree["a"], Pair)
        assert tree["a"].left.tolist() == [0, 1]
        assert tree["a"].right[0].tolist() == [0.0, 1 / 3]
        assert tree["b"].shape == (2, 2, 3)
        assert results["strided"][1].tolist() == [[1, 4], [2, 5], [3, 6]]


def gradients_through_gather() -> tuple[list[float], list[float]]:
    run = fabric()
    mine = torch.tensor([1.0, 2.0], requires_grad=True)
    gathered = run.all_gather(mine, sync_grads=True)
    (gathered * torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (run.global_rank + 1)).sum().backward()
    other = torch.tensor([1.0], requires_grad=True)
    assert not run.all_gather(other).requires_grad
    return mine.grad.tolist(), run.all_reduce(mine.detach()).tolist()  # type: ignore[union-attr]


def test_gradients_flow_through_a_gather(ranks: RankPool) -> None:
    # Rank r weighs by r + 1; the sum over ranks is 3.
    assert [gradient for gradient, _ in ranks.run(gradients_through_gather)] == [[3.0, 6.0], [9.0, 12.0]]


def gradients_beside_a_gather() -> tuple[list[float], list[float]]:
    run = fabric()
    c = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (run.global_rank + 1)
    x = torch.zeros(2, requires_grad=True)
    w = torch.ones(2, 2, requires_grad=True)
    gathered = run.all_gather(x, sync_grads=True)
    ((gathered + w * 3) * c).sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    return x.grad.tolist(), (w.grad / c).flatten().tolist()


def test_a_gather_leaves_the_gradients_of_other_branches_alone(ranks: RankPool) -> None:
    for rank, (of_gathered, of_other) in enumerate(ranks.run(gradients_beside_a_gather)):
        assert of_gathered == [[3.0, 6.0], [9.0, 12.0]][rank]
        assert of_other == [3.0] * 4


def reduce_large_halves() -> torch.Tensor:
    return fabric().all_reduce(torch.tensor([60000.0], dtype=torch.float16))  # type: ignore[no-any-return]


def test_the_mean_of_large_halves_is_finite(ranks: RankPool) -> None:
    for mean in ranks.run(reduce_large_halves):
        assert mean.dtype == torch.float16
        assert mean.tolist() == [60000.0]  # exact: a multiple of float16's spacing there, 32


def broadcast_things() -> Any:
    run = fabric()
    mine = {
        "tensor": torch.tensor([2**40 + run.global_rank]),
        "text": f"rank {run.global_rank}",
        "half": torch.ones(2, dtype=torch.bfloat16) * run.global_rank,
        "float8": torch.ones(2).to(torch.float8_e4m3fn),
        "object": {run.global_rank},
    }
    return run.broadcast(mine), run.broadcast(mine, src=1)


def test_broadcast_takes_any_object_and_keeps_dtypes(ranks: RankPool) -> None:
    for pair in ranks.run(broadcast_things):
        for source, result in enumerate(pair):
            assert result["tensor"].item() == 2**40 + source
            assert result["text"] == f"rank {source}"
            assert result["half"].dtype == torch.bfloat16
            assert result["float8"].dtype == torch.float8_e4m3fn
            assert result["object"] == {source}


def send_what_cannot_be_pickled(kind: str) -> str:
    run = fabric()
    mine = (lambda: 0) if run.global_rank == 1 else "fine"
    with pytest.raises(CollectiveError) as error:
        if kind == "gather":
            gather_objects({"key": mine})
        elif kind == "broadcast":
            broadcast_object(mine, src=1)
        else:
            run.broadcast([torch.ones(2), mine], src=1)
    assert run.broadcast("still here") == "still here"
    return str(error.value)


@pytest.mark.parametrize("kind", ["gather", "broadcast", "broadcast of a tree"])
def test_an_object_that_cannot_be_pickled_is_an_error_on_all_ranks(ranks: RankPool, kind: str) -> None:
    first, second = ranks.run(send_what_cannot_be_pickled, kind)
    assert first == second
    assert first.startswith("The object of rank 1 cannot be pickled")
    assert "\n  Given: " in first
    assert "lambda" in first
    assert "\n  Try: " in first


def count_object_collectives() -> dict[str, int]:
    run = fabric()
    long = "x" * 5000
    uneven = "x" * (5000 if run.is_global_zero else 1)
    counts = {}
    for name, function, value in [
        ("gather", gather_objects, [run.global_rank]),
        ("gather of long ones", gather_objects, [run.global_rank, long]),
        ("gather of uneven ones", gather_objects, [run.global_rank, uneven]),
        ("broadcast", broadcast_object, [run.global_rank]),
    ]:
        with CommDebugMode() as mode:
            result = function(value)
        counts[name] = mode.get_total_counts()
        if name != "broadcast":
            assert [one[0] for one in result] == list(range(run.world_size))
    with CommDebugMode() as mode:
        dist.all_gather_object([None, None], run.global_rank)
    counts["torch's gather"] = mode.get_total_counts()
    with CommDebugMode() as mode:
        dist.broadcast_object_list([run.global_rank])
    counts["torch's broadcast"] = mode.get_total_counts()
    return counts


def test_sending_an_object_costs_no_more_than_it_costs_torch_and_a_short_one_is_gathered_at_once(
    ranks: RankPool,
) -> None:
    for counts in ranks.run(count_object_collectives):
        assert counts["gather"] == 1
        assert counts["gather of long ones"] == counts["gather of uneven ones"] == counts["torch's gather"] == 2
        assert counts["broadcast"] == counts["torch's broadcast"] == 2


@pytest.mark.parametrize("length", [1, 1000, 1024, 1025, 5000])
def test_objects_of_any_length_are_gathered_as_they_are(ranks: RankPool, length: int) -> None:
    expected = [b"x" * length, b"x" * 2 * length]
    assert ranks.run(gather_letters, length) == [expected, expected]


def gather_letters(length: int) -> list[bytes]:
    return gather_objects(b"x" * length * (1 + fabric().global_rank))


def gather_uneven() -> Any:
    run = fabric()
    count = 2 + run.global_rank
    return run.gather({"x": torch.full((count, 2), run.global_rank), "n": count})


def test_gather_joins_parts_of_unequal_size(ranks: RankPool) -> None:
    for result in ranks.run(gather_uneven):
        assert result["x"].tolist() == [[0, 0]] * 2 + [[1, 1]] * 3
        assert result["n"].tolist() == [2, 3]


def fail_on_rank_zero() -> str:
    run = fabric()
    with pytest.raises((CollectiveError, ZeroDivisionError)) as error, run.rank_zero_first():
        if run.is_global_zero:
            raise ZeroDivisionError("download failed")
        pytest.fail("rank 1 must not run the block")
    run.barrier()
    with run.rank_zero_first(local=True):
        pass
    return str(error.value)


def test_an_exception_in_rank_zero_first_reaches_all_ranks_at_once(ranks: RankPool) -> None:
    first, second = ranks.run(fail_on_rank_zero)
    assert first == "download failed"
    assert "rank 0: ZeroDivisionError: download failed\n  Given: " in second
    assert "\n  Try: " in second


def exit_on_rank_zero(kind: type[BaseException]) -> str:
    run = fabric()
    with pytest.raises((CollectiveError, kind)) as error, run.rank_zero_first():
        raise kind("enough")
    run.barrier()
    return f"{type(error.value).__name__}: {error.value}"


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_leaving_the_program_in_rank_zero_first_reaches_all_ranks_at_once(ranks: RankPool, kind: Any) -> None:
    first, second = ranks.run(exit_on_rank_zero, kind)
    assert first == f"{kind.__name__}: enough"
    assert second.startswith(f"CollectiveError: rank_zero_first() failed on rank 0: {kind.__name__}: enough")


def order_of_rank_zero_first() -> list[int]:
    run = fabric()
    with run.rank_zero_first():
        before = run.global_rank  # rank 0's block has ended before rank 1's begins
    return run.all_gather(before).tolist()  # type: ignore[no-any-return]


def test_rank_zero_first_lets_all_through(ranks: RankPool) -> None:
    assert ranks.run(order_of_rank_zero_first) == [[0, 1], [0, 1]]


def mismatched(kind: str) -> str:
    rank = fabric().global_rank
    checked = Collectives(torch.device("cpu"), check=True)
    with pytest.raises(CollectiveError) as error:
        if kind == "shape":
            checked.all_gather(torch.zeros(2 + rank))
        elif kind == "dtype":
            checked.all_reduce(torch.zeros(2, dtype=torch.float64 if rank else torch.float32))
        elif rank:
            checked.all_gather(torch.zeros(2))
        else:
            checked.all_reduce(torch.zeros(2))
    assert checked.all_reduce(1.0).item() == 1.0
    return str(error.value)


@pytest.mark.parametrize("kind", ["shape", "dtype", "order"])
def test_with_the_check_on_a_difference_is_reported_with_rank_and_call_site(ranks: RankPool, kind: str) -> None:
    for message in ranks.run(mismatched, kind):
        assert "rank 0: all_" in message
        assert "rank 1: all_" in message
        assert "test_collectives.py:" in message


def mismatched_order(kind: str) -> str:
    first = fabric().is_global_zero
    checked = Collectives(torch.device("cpu"), check=True)
    with pytest.raises(CollectiveError) as error:
        if first:
            checked.all_reduce(torch.zeros(2))
        elif kind == "barrier":
            checked.barrier()
        elif kind == "gather":
            checked.gather_uneven(torch.zeros(2))
        else:
            with checked.rank_zero_first(False):
                pytest.fail("the ranks are not in the same call")
    return str(error.value)


@pytest.mark.parametrize("kind", ["barrier", "gather", "rank_zero_first"])
def test_with_the_check_on_every_collective_is_compared(ranks: RankPool, kind: str) -> None:
    for message in ranks.run(mismatched_order, kind):
        assert "rank 0: all_reduce" in message
        assert re.search(rf"rank 1: {kind} .*at .*test_collectives\.py:", message)


def checked_calls_that_agree() -> list[Any]:
    rank = fabric().global_rank
    checked = Collectives(torch.device("cpu"), check=True)
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    checked.barrier()
    with checked.rank_zero_first(rank == 0):
        pass
    rows = checked.gather_uneven(torch.full((1 + rank,), rank))
    # Different calls in different groups: compared over all ranks, these would be an error or hang.
    own = checked.all_gather(torch.ones(3), alone) if rank else checked.all_reduce(torch.ones(2), alone)
    dist.destroy_process_group(alone)
    return [rows.tolist(), own.tolist()]


def test_with_the_check_on_ranks_are_compared_within_the_group_of_the_call(ranks: RankPool) -> None:
    assert ranks.run(checked_calls_that_agree) == [[[0, 1, 1], [1.0, 1.0]], [[0, 1, 1], [[1.0, 1.0, 1.0]]]]


def test_a_process_alone_gets_its_data_back() -> None:
    run = Fabric(accelerator="cpu", devices=1)
    assert run.all_gather({"x": torch.ones(2), "n": 3})["x"].shape == (2,)
    assert run.all_reduce(torch.tensor([1, 2])).tolist() == [1.0, 2.0]
    assert run.broadcast("x") == "x"
    assert run.gather(torch.ones(2)).shape == (2,)
    run.barrier("named")
    with run.rank_zero_first():
        pass


def test_a_process_alone_gets_the_same_kind_of_result_as_several() -> None:
    run = Fabric(accelerator="cpu", devices=1)
    mine = torch.ones(2, requires_grad=True)
    assert not run.all_gather(mine).requires_grad
    assert run.all_gather(mine, sync_grads=True).requires_grad
    assert not run.gather(mine).requires_grad
    assert run.gather({"n": 3, "loss": torch.tensor(0.5)}) == {"n": torch.tensor([3]), "loss": torch.tensor([0.5])}


def test_wrong_arguments_are_named() -> None:
    run = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(FabricValueError, match="mean, avg, sum, min, max, product"):
        run.all_reduce(1, reduce_op="median")
    with pytest.raises(FabricValueError, match="tensors, numbers and numpy arrays"):
        run.all_gather({"a": "text"})
    with pytest.raises(FabricValueError, match="src=3"):
        run.broadcast(1, src=3)


def test_communication_before_launch_names_launch() -> None:
    run = Fabric(accelerator="cpu", devices=2)
    assert (run.world_size, run.global_rank, run.is_global_zero) == (2, 0, True)
    for call in (
        run.barrier,
        lambda: run.all_reduce(1),
        lambda: run.setup(torch.nn.Linear(1, 1)),
        lambda: run.save("x", {}),
    ):
        with pytest.raises(FabricRuntimeError, match=r"fabric\.launch\(\).*fabric-run"):
            call()


def raise_on(rank: int) -> None:
    if fabric().global_rank == rank:
        raise ZeroDivisionError("here")
    fabric().barrier()


def test_the_pool_reports_the_rank_that_failed_and_goes_on(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="ZeroDivisionError: here") as error:
        ranks.run(raise_on, 1)
    assert error.value.rank == 1
    assert len(ranks.run(order_of_rank_zero_first)) == 2
