"""Activation checkpointing: chosen submodules keep no activations, and run forward again in backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fabric_lite.errors import StrategyError
from fabric_lite.policy import Policy, check_policy, classes_of, description_of, predicate_of

__all__ = ["checkpoint_activations", "release_activations"]

# What the module's __dict__ held as ``forward`` before; None: nothing, its class's forward is run.
_OWN_FORWARD = "_fabric_lite_checkpointed_forward"


def checkpoint_activations(module: nn.Module, policy: Policy) -> list[str]:
    """Let matching submodules of ``module`` recompute their activations in backward; changed in place.

    Only ``forward`` is recomputed, so hooks of a call (those of ``fully_shard`` too) run once. Names of modules and
    keys of the state dict stay. The state of the random number generators is restored for the second run, so dropout
    is the same. Without gradients nothing is added.

    Args:
        module: The model. It is taken itself only when it matches.
        policy: Classes of modules, none at all for no modules; ``f(module) -> bool``; or one of torch's wrap policies
            (``f(module=, recurse=, nonwrapped_numel=)``). Of nested matches the outer one is taken.

    Returns:
        The names of the modules, as in ``named_modules``; those that have it already are not among them.

    Raises:
        StrategyError: Nothing matches a policy that is about something.
        FabricTypeError: The policy is of none of these kinds.
    """
    check_policy(policy, "activation_checkpointing_policy")
    matches = predicate_of(policy)
    chosen: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        is_inner = any(name == other or other == "" or name.startswith(other + ".") for other in chosen)
        if not is_inner and matches(child):
            chosen[name] = child
    if not chosen and classes_of(policy) != ():
        raise StrategyError(
            f"activation_checkpointing_policy={description_of(policy)} matches nothing in the model, so no memory "
            "would be saved.",
            given=f"{type(module).__name__} made of {', '.join(sorted({type(m).__name__ for m in module.modules()}))}",
            fix="the class of the model's repeated layers",
        )
    added = {name: child for name, child in chosen.items() if _OWN_FORWARD not in child.__dict__}
    for child in added.values():
        child.__dict__[_OWN_FORWARD] = child.__dict__.get("forward")
        # The module is an argument of one shared function: torch.compile compiles repeated layers once.
        forward = functools.partial(_checkpointed, child)
        child.__dict__["forward"] = functools.update_wrapper(forward, child.forward)
    return list(added)


def release_activations(module: nn.Module) -> None:
    """Take off what :func:`checkpoint_activations` added; an own ``forward`` of an object comes back."""
    for child in module.modules():
        if _OWN_FORWARD in child.__dict__:
            own = child.__dict__.pop(_OWN_FORWARD)
            if getattr(child.__dict__.get("forward"), "func", None) is _checkpointed:  # else the user's, set since
                del child.__dict__["forward"]
                if own is not None:
                    child.__dict__["forward"] = own


def _checkpointed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = module.__dict__[_OWN_FORWARD]
    if forward is None:
        forward = functools.partial(type(module).forward, module)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)
