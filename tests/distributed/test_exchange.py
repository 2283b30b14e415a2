"""A checkpoint of any layout goes on under any other, bit for bit as that one does from the same tensors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_lite.testing import RankPool
from tests.distributed.layouts import GPT, LAYOUTS, loss_of, make_gpt, run_under, token_batches
from tests.models import Counter, full

NAMES = ["single", "ddp 2", "fsdp 2", "fsdp 4", "hsdp 2x2", "tensor parallel 2"]
STEPS = 3  # before the checkpoint, and again after it


class Training:
    """A run of one layout: model, optimizer with two groups, schedule and counter, all made before ``setup``."""

    def __init__(self, layout: str, seed: int) -> None:
        self.layout = LAYOUTS[layout]
        self.fabric = self.layout.fabric()
        self.model: GPT = make_gpt(seed)
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 0.02, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95))
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=2, gamma=0.5)
        self.counter = Counter()
        self.fabric.setup(self.model, self.optimizer)
        self.state = {
            "model": self.model,
            "training": {"optimizer": self.optimizer, "schedule": self.schedule},
            "extras": [{"counter": self.counter}],
        }

    def train(self) -> None:
        first = self.counter.count
        for batch in token_batches(2 * STEPS)[first : first + STEPS]:
            tokens, targets = map(self.layout.share, batch)
            self.fabric.backward(loss_of(self.model(tokens), targets))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.counter.count += 1

    def whole(self) -> dict[str, Any]:
        """All that makes up the run, in full tensors; every rank calls."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {
            "parameters": {name: full(parameter) for name, parameter in self.model.named_parameters()},
            "moments": {
                names[id(parameter)]: {key: full(value) for key, value in entry.items()}
                for parameter, entry in self.optimizer.state.items()
            },
            "options": [
                {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
            ],
            "schedule": self.schedule.state_dict(),
            "count": self.counter.count,
        }

    @torch.no_grad()
    def place(self, whole: dict[str, Any]) -> None:
        """The oracle of loading: what :meth:`whole` gave, put in place tensor by tensor."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(laid_out(whole["parameters"][name], parameter))
            self.optimizer.state[parameter] = {
                key: laid_out(value, parameter) if value.dim() else value.clone()
                for key, value in whole["moments"][name].items()
            }
        for group, options in zip(self.optimizer.param_groups, whole["options"], strict=True):
            group.update(options)
        self.schedule.load_state_dict(whole["schedule"])
        self.counter.count = whole["count"]


def laid_out(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    value = value.clone()  # what comes from another process is memory that all of them share
    if not hasattr(parameter, "placements"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def save(layout: str, path: str, kind: str | None) -> dict[str, Any]:
    training = Training(layout, seed=0)
    training.train()
    training.fabric.save(path, training.state, state_dict_type=kind)
    whole = training.whole()
    training.fabric.close()
    return whole


def go_on(layout: str, path: str, whole: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the run as it was loaded, after three more steps, and after three more steps of one placed by hand."""
    loaded, by_hand = Training(layout, seed=1), Training(layout, seed=2)
    remainder = loaded.fabric.load(path, loaded.state)
    assert remainder == {}
    at_start = loaded.whole()
    by_hand.place(whole)
    loaded.train()
    by_hand.train()
    result = at_start, loaded.whole(), by_hand.whole()
    loaded.fabric.close()
    by_hand.fabric.close()
    return result


def assert_same(one: Any, two: Any) -> None:
    """Equal in every bit and dtype, through nested dicts and lists."""
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, list):
        for mine, other in zip(one, two, strict=True):
            assert_same(mine, other)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    else:
        assert one == two


Saved = Callable[[str, "str | None"], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The checkpoint of a layout, and what was in it; each is written once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def write(layout: str, kind: str | None) -> tuple[Path, dict[str, Any]]:
        path = folder / f"{layout} {kind}"
        wholes = run_under(ranks, layout, save, str(path), kind)
        for other in wholes[1:]:
            assert_same(other, wholes[0])
        return path, wholes[0]

    return write


def exchange(ranks: RankPool, path: Path, whole: dict[str, Any], target: str) -> None:
    start = make_gpt().state_dict()
    assert not any(torch.equal(value, start[name]) for name, value in whole["parameters"].items())
    for at_start, after, by_hand in run_under(ranks, target, go_on, str(path), whole):
        assert_same(at_start, whole)
        assert_same(after, by_hand)
        assert after["count"] == 2 * STEPS
        assert [group["lr"] for group in after["options"]] == [0.01 / 8, 0.02 / 8]
        assert {float(entry["step"]) for entry in after["moments"].values()} == {2.0 * STEPS}


PAIRS = list(itertools.product(NAMES, NAMES))


def is_always(source: str, target: str) -> bool:
    """Whether plain pytest takes this pair: every layout is once a source, and once a target."""
    return (NAMES.index(target) - NAMES.index(source)) % len(NAMES) == 1


# Shards of shards: a few pairs always, the others in the complete table.
TWO_AXES = [("2-D 2x2", "2-D 2x2"), ("2-D 2x2", "fsdp 2"), ("single", "2-D 2x2")]
OTHERS = [pair for name in NAMES for pair in ((name, "2-D 2x2"), ("2-D 2x2", name)) if pair not in TWO_AXES]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        *(pytest.param(*pair, marks=() if is_always(*pair) else pytest.mark.full) for pair in PAIRS),
        *TWO_AXES,
        *(pytest.param(*pair, marks=pytest.mark.full) for pair in OTHERS),
    ],
)
def test_a_checkpoint_of_one_layout_goes_on_bitwise_under_another(
    ranks: RankPool, saved: Saved, source: str, target: str
) -> None:
    path, whole = saved(source, None)
    assert path.is_dir() is LAYOUTS[source].strategy().is_sharded
    exchange(ranks, path, whole, target)


@pytest.mark.parametrize(
    ("source", "target", "kind"),
    [
        ("fsdp 2", "single", "full"),
        ("hsdp 2x2", "fsdp 2", "full"),
        ("tensor parallel 2", "fsdp 4", "full"),
        pytest.param("fsdp 4", "tensor parallel 2", "full", marks=pytest.mark.full),
        ("single", "fsdp 2", "sharded"),
        ("ddp 2", "tensor parallel 2", "sharded"),
    ],
)
def test_the_kind_of_checkpoint_may_be_chosen(
    ranks: RankPool, saved: Saved, source: str, target: str, kind: str
) -> None:
    path, whole = saved(source, kind)
    assert path.is_dir() is (kind == "sharded")
    exchange(ranks, path, whole, target)
