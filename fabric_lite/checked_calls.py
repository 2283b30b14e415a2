"""Letting the ranks agree before a module communicates: at its forward, and where its backward begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fabric_lite.adopt import extension_of
from fabric_lite.call_site import user_line
from fabric_lite.extension import ModuleExtension, in_backward
from fabric_lite.trees import leaves

__all__ = ["compare_calls"]

Enter = Callable[[str, "str | None"], None]


def compare_calls(module: nn.Module, enter: Enter) -> None:
    """Call ``enter`` with what ``module`` is about to do, wherever its engine then communicates.

    Under ``DistributedDataParallel`` that is every forward with gradients, and its backward; in ``no_backward_sync``
    neither. Under sharding it is every forward, which gathers parameters.

    Args:
        module: It went through ``setup``; ends with its release.
        enter: Waits until all ranks do the same, or raises; takes what, and a line for where none of the user's runs.
    """
    extension: ModuleExtension = extension_of(module)
    name = type(module).__name__
    if extension.hooked:
        extension.handles += [
            module.register_forward_pre_hook(_before_forward(name, enter), prepend=True),  # torch's gathers
            module.register_forward_hook(
                _uncompiled(lambda _, __, output: _follow_backward(name, output, enter)),
            ),
        ]
    elif extension.engine is not None:
        _follow_engine(extension.engine, extension, name, enter)


def _before_forward(name: str, enter: Enter) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        if not in_backward():  # activation checkpointing runs forwards again, each rank on its own
            enter(f"forward of {name}", None)

    return _uncompiled(hook)


def _uncompiled(hook: Callable[..., None]) -> Callable[..., None]:
    """Hooks of a compiled module are compiled with it; the store is nothing for the compiler."""
    disabled: Callable[..., None] = torch.compiler.disable(hook)
    return disabled


def _follow_engine(engine: nn.Module, extension: ModuleExtension, name: str, enter: Enter) -> None:
    run = engine.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if extension.windows:
            return run(*args, **kwargs)
        # The first forward after the first backward settles the buckets over all ranks; others send buffers.
        enter(f"forward of {name}", None)
        output = run(*args, **kwargs)
        _follow_backward(name, output, enter)
        return output

    # On the object alone, which goes with the module's release.
    engine.__dict__["forward"] = forward


def _follow_backward(name: str, output: Any, enter: Enter) -> None:
    """Compare when the first gradient of ``output`` is there, before any of a parameter."""
    entered = False
    site = user_line()  # of the forward: the backward may run in a thread of torch's

    def hook(_: torch.Tensor) -> None:
        nonlocal entered
        if not entered:
            entered = True
            enter(f"backward of {name}", site)

    if torch.is_grad_enabled():
        for leaf in leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(hook)
