"""Seeds and the random state of a process."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fabric_lite import seed
from fabric_lite.errors import FabricTypeError, FabricValueError


@pytest.fixture(autouse=True)
def generators_and_record_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(seed, "_latest", None)
    before = seed.random_state()
    yield
    seed.set_random_state(before)


def draw() -> tuple[float, float, float, float]:
    return random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))


def test_the_same_seed_gives_the_same_numbers_in_python_numpy_and_torch() -> None:
    assert seed.seed_everything(7) == 7
    first = draw()
    seed.seed_everything(7)
    assert draw() == first
    seed.seed_everything(8)
    assert all(new != old for new, old in zip(draw(), first, strict=True))


def test_no_seed_means_a_fresh_one_and_later_the_one_before() -> None:
    fresh = seed.seed_everything()
    assert 0 <= fresh <= seed.MAX_SEED
    assert seed.seed_everything() == fresh
    seed.seed_everything(3)
    assert seed.seed_everything(None) == 3


def test_reset_seed_starts_the_same_numbers_again() -> None:
    seed.seed_everything(11)
    first = draw()
    seed.reset_seed()
    assert draw() == first


def test_reset_seed_without_a_seed_changes_nothing() -> None:
    before = torch.get_rng_state()
    seed.reset_seed()
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_get_a_seed_only_when_asked_for() -> None:
    assert seed.worker_seed_base() is None
    seed.seed_everything(5)
    assert seed.worker_seed_base() == 5
    seed.seed_everything(5, workers=False)
    assert seed.worker_seed_base() is None


@pytest.mark.parametrize("wrong", [-1, 2**32])
def test_a_seed_out_of_range_is_an_error_that_says_the_range(wrong: int) -> None:
    with pytest.raises(FabricValueError, match="0 to 4294967295"):
        seed.seed_everything(wrong)


@pytest.mark.parametrize("wrong", ["1", 1.5])
def test_a_seed_that_is_no_whole_number_is_a_type_error(wrong: object) -> None:
    with pytest.raises(FabricTypeError, match="whole number"):
        seed.seed_everything(wrong)  # type: ignore[arg-type]


def test_numpy_integers_and_the_ends_of_the_range_are_seeds() -> None:
    assert seed.seed_everything(np.int64(4)) == 4  # type: ignore[arg-type]
    assert seed.seed_everything(0) == 0
    assert seed.seed_everything(seed.MAX_SEED) == seed.MAX_SEED


def test_random_state_goes_through_a_weights_only_file_and_gives_the_same_numbers() -> None:
    seed.seed_everything(13)
    draw()  # numpy now holds the second of a pair of normal numbers
    file = io.BytesIO()
    torch.save(seed.random_state(), file)
    first = [draw() for _ in range(3)]
    file.seek(0)
    seed.set_random_state(torch.load(file, weights_only=True))
    assert [draw() for _ in range(3)] == first


def test_a_state_without_numpy_is_refused_and_changes_nothing() -> None:
    state = seed.random_state()
    before = torch.get_rng_state()
    torch.rand(1)
    now = torch.get_rng_state()
    del state["numpy"]
    with pytest.raises(FabricValueError, match="numpy"):
        seed.set_random_state(state)
    assert torch.equal(torch.get_rng_state(), now)
    assert not torch.equal(before, now)
