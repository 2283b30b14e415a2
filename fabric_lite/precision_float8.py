"""Linear layers that multiply in float8, by torchao."""

from __future__ import annotations

from torch import nn

from fabric_lite.errors import FabricValueError
from fabric_lite.precision_layers import Exchanged, check_torchao, exchange_linear_layers

__all__ = ["to_float8"]

# The kernels take matrices of which both sides are a multiple of it.
_SIDE = 16


def to_float8(module: nn.Module) -> list[Exchanged]:
    """Let the linear layers of ``module`` multiply in float8, scaled by each tensor's largest value; changed in place.

    Layers are exchanged and their parameters stay the same objects, in their own dtype, under the same names. Taken are
    ``nn.Linear`` itself, trainable, with both sides a multiple of 16; a model that is such a layer itself is not.
    A model without trainable linear layers, a frozen teacher or one of convolutions, stays as it is.

    Returns:
        Handles whose ``remove()`` puts the layers back, with the parameters that are there then.

    Raises:
        FabricImportError: torchao is not installed.
        FabricValueError: There are trainable linear layers, but none such.
    """
    check_torchao("precision='fp8-mixed'")
    from torchao.float8.float8_linear import Float8Linear

    exchanged = exchange_linear_layers(module, _is_taken, Float8Linear.from_float)
    others = [child for child in module.modules() if isinstance(child, nn.Linear) and child.weight.requires_grad]
    if others and not exchanged:
        raise FabricValueError(
            f"No layer of {type(module).__name__} can multiply in float8.",
            given=f"{len(others)} trainable linear layers",
            fix="nn.Linear below the model, both sides a multiple of 16; or precision='bf16-mixed'",
        )
    return exchanged


def _is_taken(_: str, layer: nn.Linear) -> bool:
    return layer.in_features % _SIDE == 0 and layer.out_features % _SIDE == 0 and layer.weight.requires_grad
