"""Which parts of a model are sharded by themselves: gathered just before they run and freed after."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator

from torch import nn

from fabric_lite.errors import StrategyError
from fabric_lite.policy import Policy, classes_of, description_of, is_torchs, predicate_of, size_of

__all__ = ["choose_blocks"]

# Layers of one kind are worth a collective of their own if together they hold this share of the parameters.
_WORTH_SHARE = 0.1
# They have no forward of their own, so nothing would gather what they hold.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def choose_blocks(module: nn.Module, policy: Policy | None, option: str = "auto_wrap_policy") -> list[nn.Module]:
    """Return the submodules to shard by themselves, inner ones first; ``module`` itself is never among them.

    Submodules whose parameters are shared with modules outside them (tied weights) are left to the root's group.

    Args:
        module: The whole model.
        policy: Classes, or one, whose instances are blocks (subclasses too), none at all for no blocks; or a function
            ``f(module) -> bool``; or one of torch's policies, ``f(module, recurse, nonwrapped_numel) -> bool``. None
            finds repeated layers.
        option: The policy's name in errors.

    Raises:
        StrategyError: The classes occur nowhere in the model.
    """
    if policy is None:
        wanted = _repeated_layers(module)
    elif is_torchs(policy):
        wanted = _asked_in_turn(policy, module)
    else:
        wanted = list(filter(predicate_of(policy), _with_parameters(module)))
        if classes_of(policy) and not any(map(predicate_of(policy), module.modules())):
            raise _found_nothing(module, policy, option)
    candidates = [child for child in wanted if child is not module and not isinstance(child, _CONTAINERS)]
    is_tied = _tied_outside(module)
    return [child for child in candidates if not is_tied(child)]


def _inner_first(module: nn.Module) -> Iterator[nn.Module]:
    return reversed(list(module.modules()))


def _repeated_layers(root: nn.Module) -> list[nn.Module]:
    """The outermost layers of which a container holds several of one class, if they are a good part of the model."""
    enough = _WORTH_SHARE * size_of(root)
    layers: list[nn.Module] = []
    todo = [root]
    while todo:
        module = todo.pop()
        found = _alike(module, enough) if isinstance(module, (nn.Sequential, *_CONTAINERS)) else []
        layers += found
        todo += [child for child in module.children() if not any(child is layer for layer in found)]
    return layers


def _alike(container: nn.Module, enough: float) -> list[nn.Module]:
    """The children of one class that occurs several times and has ``enough`` parameters in all.

    Not the leaves, such as the two linear layers of a perceptron: they are too small to be gathered one by one, and
    models read their weights without calling them.
    """
    by_class: dict[type, list[nn.Module]] = collections.defaultdict(list)
    for child in container.children():
        if not isinstance(child, _CONTAINERS) and next(child.children(), None) is not None:
            by_class[type(child)].append(child)
    return [
        layer
        for alike in by_class.values()
        if len(alike) > 1 and sum(map(size_of, alike)) >= max(enough, 1)
        for layer in alike
    ]


def _with_parameters(module: nn.Module) -> Iterator[nn.Module]:
    return (child for child in _inner_first(module) if next(child.parameters(), None) is not None)


def _asked_in_turn(policy: Callable[..., bool], root: nn.Module) -> list[nn.Module]:
    """The blocks of one of torch's policies, asked as FSDP1 asks it.

    First whether to look into a module: not into ``nn.MultiheadAttention``, which reads the weights of a layer that it
    never calls. Then, after the modules inside, whether the parameters that these have left over are enough.
    """
    blocks: dict[nn.Module, None] = {}

    def visit(module: nn.Module) -> int:
        count = size_of(module)
        if module in blocks or not count or not policy(module=module, recurse=True, nonwrapped_numel=count):
            return 0
        inside = sum(visit(child) for child in module.children())
        is_block = module is not root and not isinstance(module, _CONTAINERS)
        if is_block and policy(module=module, recurse=False, nonwrapped_numel=count - inside):
            blocks[module] = None
            return count
        return inside

    visit(root)
    return list(blocks)


def _tied_outside(root: nn.Module) -> Callable[[nn.Module], bool]:
    """Return whether a module shares a parameter with one outside it; torch keeps tied ones tied in one group only."""
    owners: dict[int, list[nn.Module]] = collections.defaultdict(list)
    for module in root.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(module)

    def is_tied(block: nn.Module) -> bool:
        inside = set(block.modules())
        return any(owner not in inside for parameter in block.parameters() for owner in owners[id(parameter)])

    return is_tied


def _found_nothing(module: nn.Module, policy: Policy, option: str) -> StrategyError:
    names = description_of(policy)
    present = sorted({type(child).__name__ for child in module.modules() if child is not module})
    return StrategyError(
        f"{option}={names} found no {names[1:-1]} in the model, so nothing would be sharded per block.",
        given=f"{type(module).__name__} made of {', '.join(present)}",
        fix=f"one of these classes in {option}, or leave it out to choose the blocks automatically",
    )
