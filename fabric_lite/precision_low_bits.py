"""Frozen linear layers whose weights take 4 or 8 bits a value, by torchao: for training small layers beside them."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fabric_lite.errors import FabricValueError
from fabric_lite.precision_layers import check_torchao, exchange_linear_layers

__all__ = ["LOW_BITS", "LowBits"]

# Sizes of torchao's own: values that share a scale, and scales that share one.
_NF4_BLOCK, _NF4_SCALES = 64, 256


def _nf4(weight: torch.Tensor) -> Any:
    from torchao.quantization import NF4Tensor

    blocks = weight.numel() // _NF4_BLOCK
    return NF4Tensor.from_tensor(weight, _NF4_BLOCK, math.gcd(blocks, _NF4_SCALES))


def _int8(weight: torch.Tensor) -> Any:
    from torchao.quantization import Int8Tensor, PerRow

    return Int8Tensor.from_hp(weight, PerRow())


@dataclasses.dataclass(frozen=True)
class _Mode:
    quantize: Callable[[torch.Tensor], Any]
    to_float: Callable[[Any], torch.Tensor]
    divisor: int  # of the number of values in a weight


LOW_BITS = {
    "nf4": _Mode(_nf4, lambda weight: weight.get_original_weight(), _NF4_BLOCK),
    "int8": _Mode(_int8, lambda weight: weight.dequantize(), 1),
}


@dataclasses.dataclass(frozen=True)
class LowBits:
    """Changes the frozen linear layers of a model in place; what a :class:`Precision` takes as ``convert``.

    Args:
        mode: ``"nf4"``: 4-bit NormalFloat in blocks of 64, their scales in 8 bits (QLoRA, arXiv:2305.14314).
            ``"int8"``: 8 bits, a scale for each row.
        ignored: Names of modules; they, and what is below them, stay.
    """

    mode: str
    ignored: frozenset[str] = frozenset()

    def __call__(self, module: nn.Module) -> list[Any]:
        """Exchange layers whose weight does not require a gradient and belongs to no other module (tied weights).

        They stay exchanged after release, and their original weights are emptied: the values would fill the memory that
        is saved. :attr:`LowBitLinear.weight` has them.

        Returns:
            Nothing to undo.

        Raises:
            FabricImportError: torchao is not installed.
            FabricValueError: There are linear layers, but none such; or one is still on the meta device.
        """
        check_torchao(f"weights in {self.mode}")
        owners = collections.Counter(
            id(parameter) for child in module.modules() for parameter in child.parameters(recurse=False)
        )
        divisor = LOW_BITS[self.mode].divisor

        def is_taken(name: str, layer: nn.Linear) -> bool:
            parts = name.split(".")
            is_ignored = any(".".join(parts[: end + 1]) in self.ignored for end in range(len(parts)))
            weight = layer.weight
            is_fit = not weight.requires_grad and owners[id(weight)] == 1 and weight.numel() % divisor == 0
            return is_fit and not is_ignored and not _is_on_meta(name, weight)

        exchange_linear_layers(module, is_taken, lambda layer: LowBitLinear(layer, self.mode))
        linear = [child for child in module.modules() if isinstance(child, nn.Linear)]
        if linear and not any(isinstance(child, LowBitLinear) for child in module.modules()):
            raise FabricValueError(
                f"No layer of {type(module).__name__} can have a weight in {self.mode}.",
                given=f"{len(linear)} linear layers, {sum(not layer.weight.requires_grad for layer in linear)} frozen",
                fix="model.requires_grad_(False) before setup, and then the layers to train (LoRA) as trainable ones",
            )
        return []


def _is_on_meta(name: str, weight: torch.Tensor) -> bool:
    if weight.is_meta:
        raise FabricValueError(
            "A weight that has no values yet can't be put into fewer bits.",
            given=f"{name} on the meta device",
            fix="load the weights before setup, or make the model outside of fabric.init_module(empty_init=True)",
        )
    return False


class LowBitLinear(nn.Module):
    """``nn.Linear`` with a frozen weight of few bits, whose parts are parameters: they are stored and sharded as such.

    Forward and backward each make the weight for the moment, so no full weight is kept between them.
    """

    def __init__(self, layer: nn.Linear, mode: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.mode = layer.in_features, layer.out_features, mode
        quantized = LOW_BITS[mode].quantize(layer.weight.detach())
        names, self._context = quantized.__tensor_flatten__()
        self._kind, self._parts = type(quantized), tuple(names)
        self._scalars = {name for name in names if getattr(quantized, name).dim() == 0}
        self._float = next(name for name in names if getattr(quantized, name).is_floating_point())
        for name in names:
            part = getattr(quantized, name)
            # Sharding needs a dimension.
            self.register_parameter(f"weight_{name}", nn.Parameter(part.reshape(part.shape or (1,)), False))
        self.bias = layer.bias
        layer.weight.data = layer.weight.new_empty(0)

    @property
    def weight(self) -> torch.Tensor:
        """The weight's values, ``(out_features, in_features)``, in the dtype of its scales; made anew each time.

        Of a sharded model, outside of its forward and backward, all ranks must ask for it.
        """
        parts = {name: getattr(self, f"weight_{name}") for name in self._parts}
        parts = {name: part.full_tensor() if hasattr(part, "full_tensor") else part for name, part in parts.items()}
        dtype = parts[self._float].dtype  # moving and sharding may have changed it
        parts |= {name: parts[name].reshape(()) for name in self._scalars}
        size = torch.Size((self.out_features, self.in_features))
        quantized = self._kind.__tensor_unflatten__(parts, self._context, size, (self.in_features, 1))
        with torch.no_grad():
            return LOW_BITS[self.mode].to_float(quantized).to(dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        return _Multiplied.apply(input, self.bias, self)

    def extra_repr(self) -> str:
        """As ``nn.Linear`` has it, and the mode."""
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={self.mode}"


class _Multiplied(torch.autograd.Function):
    """``input @ weight.T + bias``, with the weight made again in backward instead of kept."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, bias: torch.Tensor | None, layer: LowBitLinear) -> torch.Tensor:
        ctx.layer, ctx.dtypes = layer, (input.dtype, None if bias is None else bias.dtype)
        return functional.linear(input, layer.weight.to(input.dtype), None if bias is None else bias.to(input.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        of_input, of_bias, _ = ctx.needs_input_grad
        input_dtype, bias_dtype = ctx.dtypes
        return (
            (gradient @ ctx.layer.weight.to(gradient.dtype)).to(input_dtype) if of_input else None,
            gradient.flatten(0, -2).sum(0).to(bias_dtype) if of_bias else None,
            None,
        )
