"""Whether the ranks set up the same thing: compared once at ``setup``, before anything is laid out.

Ranks whose models differ otherwise hang, or train on mixed-up gradients; ranks whose learning rates differ drift apart.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import fabric_lite
from fabric_lite.call_site import names_of
from fabric_lite.collectives import gather_objects, is_distributed
from fabric_lite.errors import CollectiveError
from fabric_lite.notices import rank_zero_info
from fabric_lite.seed import latest_seed

__all__ = ["check_agreement", "compare_circumstances"]

Description = list[tuple[str, str]]


def check_agreement(
    module: nn.Module | None,
    optimizers: Sequence[Optimizer],
    facts: Mapping[str, str],
    group: Any = None,
    *,
    follows_buffers: bool = True,
) -> None:
    """Compare what is set up; every rank of ``group`` calls.

    Costs one gather of hashes; only where they differ, one of everything.

    Args:
        module: Its parameters and buffers are compared: names in order, shapes, dtypes, ``requires_grad``.
        optimizers: Their groups are: number of parameters, options. A tensor among the options counts as its value.
        facts: Compared as they are.
        group: The ranks that train the same model; None is all.
        follows_buffers: Whether buffers have to agree too, since they are sent from rank to rank.

    Raises:
        CollectiveError: On all ranks, naming the first difference and what each rank has there.
    """
    if not is_distributed():
        return
    own = [*facts.items(), *_describe_module(module, follows_buffers), *_describe_optimizers(optimizers, module)]
    digest = hashlib.sha256(repr(own).encode()).hexdigest()
    if len(set(gather_objects(digest, group))) == 1:
        return
    descriptions: list[Description] = gather_objects(own, group)
    ranks = torch.distributed.get_process_group_ranks(group)
    place = _first_difference(descriptions)
    found = {rank: _at(description, place) for rank, description in zip(ranks, descriptions, strict=True)}
    lines = [f"    {names_of(who)}: {what}" for what, who in _by_value(found).items()]
    raise CollectiveError(
        "The ranks do not set up the same thing.",
        given="the first difference\n" + "\n".join(lines),
        fix="let every rank make the model and its optimizers from the same arguments, in the same order",
    )


def compare_circumstances() -> None:
    """Say on rank 0 when versions or seeds differ over the ranks, which may be meant; every rank calls."""
    if not is_distributed():
        return
    seed = latest_seed()
    own = {
        "fabric_lite": fabric_lite.__version__,
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
        "seed": "none" if seed is None else str(seed),
    }
    all_ranks = gather_objects(own)
    for name in own:
        values = {rank: circumstances[name] for rank, circumstances in enumerate(all_ranks)}
        if len(set(values.values())) > 1:
            parts = [f"{value} on {names_of(who)}" for value, who in _by_value(values).items()]
            rank_zero_info(f"the ranks differ in {name}: {', '.join(parts)}")


def _describe_module(module: nn.Module | None, follows_buffers: bool) -> Description:
    if module is None:
        return []
    # Parameters that DDP leaves alone may well differ: parts of a model that is spread by hand.
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    parameters = [
        (f"parameter {name!r}", f"{_layout(parameter)}{'' if parameter.requires_grad else ', frozen'}")
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if name not in ignored
    ]
    buffers = [
        (f"buffer {name!r}", _layout(buffer))
        for name, buffer in module.named_buffers(remove_duplicate=False)
        if follows_buffers and name not in ignored
    ]
    return [("model", type(module).__name__), *parameters, *buffers]


def _layout(tensor: torch.Tensor) -> str:
    if nn.parameter.is_lazy(tensor):  # refused next
        return "without a shape yet"
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _describe_optimizers(optimizers: Sequence[Optimizer], module: nn.Module | None) -> Description:
    names = {} if module is None else {id(parameter): name for name, parameter in module.named_parameters()}
    lines: Description = []
    for number, optimizer in enumerate(optimizers):
        title = f"optimizer {number} ({type(optimizer).__name__})"
        lines.append((title, f"{len(optimizer.param_groups)} groups"))
        for index, group in enumerate(optimizer.param_groups):
            options = {name: value for name, value in group.items() if name not in ("params", "param_names")}
            lines += [(f"{title}, group {index}, {name}", text) for name, text in _in_words(options)]
            parameters = [names.get(id(parameter), _layout(parameter)) for parameter in group["params"]]
            digest = hashlib.sha256(repr(parameters).encode()).hexdigest()[:8]
            lines.append((f"{title}, group {index}, parameters", f"{len(parameters)} (names and order: {digest})"))
    return lines


def _in_words(options: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """The options that can be compared: numbers, words, and tuples of them."""
    for name, value in options.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if value is None or isinstance(value, (bool, int, float, str)):
            yield name, repr(value)
        elif isinstance(value, (tuple, list)) and all(isinstance(one, (bool, int, float, str)) for one in value):
            yield name, repr(tuple(value))


def _at(description: Description, place: int) -> str:
    return ": ".join(description[place]) if place < len(description) else "nothing more"


def _first_difference(descriptions: list[Description]) -> int:
    return next(place for place in range(max(map(len, descriptions))) if len({_at(d, place) for d in descriptions}) > 1)


def _by_value(values: Mapping[int, str]) -> dict[str, list[int]]:
    ranks: dict[str, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(rank)
    return ranks
