"""Linear layers that multiply in float8, by torchao."""

from __future__ import annotations

from torch import nn

from fabric_lite.errors import FabricValueError
from fabric_lite.precision_layers import Changed, change_layers, check_torchao, linear_layers

__all__ = ["to_float8"]


def to_float8(module: nn.Module) -> list[Changed]:
    """Let the linear layers of ``module`` multiply in float8, scaled by each tensor's largest value; changed in place.

    Layers become a subclass of torchao's ``Float8Linear``; layers and parameters stay the same objects, in their own
    dtype, under the same names. Taken are those of :func:`linear_layers` that train, with both sides a multiple of 16.
    A model without trainable linear layers, a frozen teacher or one of convolutions, stays as it is.

    Returns:
        Handles whose ``remove()`` undoes it.

    Raises:
        FabricImportError: torchao is not installed.
        FabricValueError: There are trainable linear layers, but none such.
    """
    check_torchao("precision='fp8-mixed'")
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    from fabric_lite import precision_float8_layer

    taken = [
        layer
        for _, layer in linear_layers(module)
        if layer.in_features % precision_float8_layer.SIDE == 0
        and layer.out_features % precision_float8_layer.SIDE == 0
        and layer.weight.requires_grad
    ]
    changed = change_layers(
        taken,
        precision_float8_layer.Float8Linear,
        lambda _: {"bias": False, "device": "meta", "config": Float8LinearConfig()},
    )
    linear = [child for child in module.modules() if isinstance(child, nn.Linear)]
    trainable = [layer for layer in linear if layer.weight.requires_grad]
    # Those of a part that has been set up before, or of a copy of a model that is, are changed already.
    if trainable and not any(isinstance(layer, Float8Linear) for layer in linear):
        raise FabricValueError(
            f"No layer of {type(module).__name__} can multiply in float8.",
            given=f"{len(trainable)} trainable linear layers",
            fix="nn.Linear below the model, both sides a multiple of 16; or precision='bf16-mixed'",
        )
    return changed
