"""Linear layers of NVIDIA's Transformer Engine, which multiply in 8 bits on its GPUs (from Ada and Hopper on)."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from fabric_lite.errors import FabricValueError
from fabric_lite.precision_layers import Changed, change_layers, check_installed, linear_layers

__all__ = ["check_transformer_engine", "in_transformer_engine", "to_transformer_engine"]

# Of both dimensions of a matrix, for its kernels.
_SIDE = 16


def check_transformer_engine(given: str) -> None:
    """Raise FabricImportError unless Transformer Engine is installed; ``given`` is what asks for it."""
    check_installed("transformer_engine", given, "pip install --no-build-isolation 'transformer-engine[pytorch]'")


def in_transformer_engine() -> contextlib.AbstractContextManager[Any]:
    """What ``forward`` runs in: its layers choose their own format and scales there, by its default recipe."""
    import transformer_engine.pytorch

    return transformer_engine.pytorch.autocast(enabled=True)


def to_transformer_engine(module: nn.Module) -> list[Changed]:
    """Change the linear layers of ``module``, in place, into those of Transformer Engine.

    Layers and parameters stay the same objects, in their own dtype, under the same names. Taken are those of
    :func:`linear_layers` with both sides a multiple of 16.

    Returns:
        Handles whose ``remove()`` undoes it.

    Raises:
        FabricImportError: Transformer Engine is not installed.
        FabricValueError: There are linear layers, but none such.
    """
    check_transformer_engine("precision='transformer-engine'")
    import transformer_engine.pytorch

    kind = transformer_engine.pytorch.Linear
    taken = [
        layer
        for _, layer in linear_layers(module)
        if layer.in_features % _SIDE == 0 and layer.out_features % _SIDE == 0
    ]
    changed = change_layers(
        taken,
        kind,
        lambda layer: {
            "bias": layer.bias is not None,
            "params_dtype": layer.weight.dtype,
            "device": layer.weight.device,
        },
    )
    others = [child for child in module.modules() if isinstance(child, nn.Linear)]
    if others and not any(isinstance(child, kind) for child in module.modules()):
        raise FabricValueError(
            f"No layer of {type(module).__name__} can be one of Transformer Engine.",
            given=f"{len(others)} linear layers",
            fix="nn.Linear below the model, both sides a multiple of 16; or precision='bf16-mixed'",
        )
    return changed
