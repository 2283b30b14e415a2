"""Frozen linear layers whose weights take 4 or 8 bits a value, by torchao: for training small layers beside them."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fabric_lite.errors import FabricTypeError, FabricValueError
from fabric_lite.precision_layers import check_torchao, linear_layers, named_parts

__all__ = ["LOW_BITS", "LowBitLinear", "LowBits", "names_of"]

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
    sizes: str  # that a weight must have, as errors say it
    fits: Callable[[torch.Tensor], bool]


LOW_BITS = {
    "nf4": _Mode(
        _nf4,
        lambda weight: weight.get_original_weight(),
        f"a multiple of {_NF4_BLOCK} values",
        lambda weight: weight.numel() % _NF4_BLOCK == 0,
    ),
    # torchao takes a row of one value for the whole tensor; nothing would be saved either.
    "int8": _Mode(_int8, lambda weight: weight.dequantize(), "two values or more in a row", lambda w: w.shape[1] > 1),
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
        """Change layers whose weight does not require a gradient and belongs to no other module (tied weights).

        They stay changed after release, and their original weights are emptied: the values would fill the memory that
        is saved. :attr:`LowBitLinear.weight` has them. All is checked before anything is changed.

        Returns:
            Nothing to undo.

        Raises:
            FabricImportError: torchao is not installed.
            FabricValueError: There are linear layers, but none such; one is still on the meta device; no ignored name
                is one of the model's; or layers have weights of another mode.
        """
        check_torchao(f"weights in {self.mode}")
        self._check(module)
        owners = collections.Counter(
            id(parameter) for child in module.modules() for parameter in child.parameters(recurse=False)
        )
        taken: list[tuple[str, nn.Linear]] = []
        left: list[str] = []
        for names, layer in linear_layers(module):
            reason = self._reason_to_stay(names, layer.weight, owners[id(layer.weight)])
            if reason is None:
                taken.append((min(names), layer))
            else:
                left.append(f"{min(names)}: {reason}")
        for name, layer in taken:
            if layer.weight.is_meta:
                raise FabricValueError(
                    "A weight that has no values yet can't be put into fewer bits.",
                    given=f"{name} on the meta device",
                    fix="load the weights before setup; make the model outside of fabric.init_module(empty_init=True)",
                )
        for _, layer in taken:
            _to_low_bits(layer, self.mode)
        linear = sum(isinstance(child, nn.Linear) for child in module.modules())
        if linear and not any(isinstance(child, LowBitLinear) for child in module.modules()):
            raise FabricValueError(
                f"No layer of {type(module).__name__} can have a weight in {self.mode}.",
                given=f"{linear} linear layers" + "".join(f"; {one}" for one in left[:3]) + "; ..." * (len(left) > 3),
                fix="nn.Linear below the model, model.requires_grad_(False) before setup, and then the layers to train "
                "(LoRA) as trainable ones",
            )
        return []

    def _reason_to_stay(self, names: set[str], weight: torch.Tensor, owners: int) -> str | None:
        """Why a layer is not changed; None: it is."""
        mode = LOW_BITS[self.mode]
        if any(_is_in(name, ignored) for name in names for ignored in self.ignored):
            return "ignored"
        if weight.requires_grad:
            return "not frozen"
        if owners > 1:
            return "tied to another module"
        if hasattr(weight, "placements"):
            return "sharded already"
        return None if weight.numel() and mode.fits(weight) else f"{tuple(weight.shape)} is not {mode.sizes}"

    def _check(self, module: nn.Module) -> None:
        """Raise where what is asked for can't be of this model."""
        layers = dict(named_parts(module))
        names = sorted(name for name in layers if name)
        # One Fabric may set up models of which each has some of the names.
        if self.ignored and not self.ignored & layers.keys():
            raise FabricValueError(
                f"{type(module).__name__} has no module of those that are to keep their weights.",
                given=f"ignore_modules={sorted(self.ignored)}",
                fix=f"full names: {', '.join(names[:4])}" + ", ..." * (len(names) > 4),
            )
        for name, layer in layers.items():
            if isinstance(layer, LowBitLinear) and layer.mode != self.mode:
                raise FabricValueError(
                    f"A weight in {layer.mode} can't be put into {self.mode}: its original values are gone.",
                    given=f"{name} in {type(module).__name__}, which was set up before",
                    fix=f"precision='{layer.mode}-weights', or a model made anew",
                )


def _is_in(name: str, other: str) -> bool:
    """Whether the module of that name is the other one or below it."""
    return name == other or name.startswith(other + ".")


class LowBitLinear(nn.Module):
    """``nn.Linear`` with a frozen weight of few bits, whose parts are parameters: they are stored and sharded as such.

    Made of an ``nn.Linear`` by its class, so that all who refer to the layer, and its hooks, stay with it. Forward and
    backward each make the weight for the moment, so no full weight is kept between them.
    """

    in_features: int
    out_features: int
    bias: torch.Tensor | None
    mode: str
    # What torchao's tensor is made of again: its class, its parts and their shapes, its other arguments.
    _kind: Any
    _parts: dict[str, torch.Size]
    _context: Any
    _dtype: torch.dtype

    @property
    def weight(self) -> torch.Tensor:
        """The weight's values, ``(out_features, in_features)``, in the dtype that the layer was last given; made anew.

        Of a sharded model, outside of its forward and backward, all ranks must ask for it.
        """
        parts = {name: getattr(self, f"weight_{name}") for name in self._parts}
        parts = {name: part.full_tensor() if hasattr(part, "full_tensor") else part for name, part in parts.items()}
        parts = {name: part.reshape(self._parts[name]) for name, part in parts.items()}
        size = torch.Size((self.out_features, self.in_features))
        quantized = self._kind.__tensor_unflatten__(parts, self._context, size, (self.in_features, 1))
        with torch.no_grad():
            return LOW_BITS[self.mode].to_float(quantized).to(self._dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        return _Multiplied.apply(input, self.bias, self)

    def extra_repr(self) -> str:
        """As ``nn.Linear`` has it, and the mode."""
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={self.mode}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LowBitLinear:
        """``to``, ``half``, ``cuda``: the scales move too, but stay float32.

        In float16 the factor by which nf4 divides its scales is infinite for the usual weights of a thousand inputs.
        """
        parts = [self._parameters[f"weight_{name}"] for name in self._parts]
        scales = {id(part) for part in parts if part is not None and part.is_floating_point()}

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if id(tensor) in scales and new.dtype != tensor.dtype else new

        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        super()._apply(moved, recurse)
        return self

    def others_among(self, keys: Iterable[str], prefix: str) -> list[str]:
        """Those ``keys`` of a checkpoint that are of this layer's weight, but plain or in another mode.

        Args:
            keys: Of the whole model.
            prefix: The layer's name in it, with a dot.
        """
        found = {key for key in keys if key == f"{prefix}weight" or key.startswith(f"{prefix}weight_")}
        return sorted(found - {f"{prefix}weight_{name}" for name in self._parts})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As torch's, but that weights which are not of this mode are an error without ``strict`` too.

        They would be left out silently, and the layer would go on with what it was made with.
        """
        if others := self.others_among(state_dict, prefix):
            errors: list[str] = args[-1]
            errors.append(
                f"{prefix[:-1] or 'the layer'} has a weight in {self.mode}, but the checkpoint has "
                f"{', '.join(others)}. "
                f"Load a plain checkpoint before setup, and one of few bits under the same precision."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _to_low_bits(layer: nn.Linear, mode: str) -> None:
    """Make ``layer`` a :class:`LowBitLinear`; its weight, which others may hold, is emptied."""
    weight = layer.weight.detach()
    # The scales stay in this dtype.
    quantized = LOW_BITS[mode].quantize(weight.float())
    names, context = quantized.__tensor_flatten__()
    parts = {name: getattr(quantized, name) for name in names}
    others = {name: layer._parameters.pop(name) for name in list(layer._parameters)}
    emptied = others.pop("weight")
    assert emptied is not None
    layer.__class__ = LowBitLinear  # type: ignore[assignment]
    layer.__dict__.update(mode=mode, _kind=type(quantized), _context=context, _dtype=weight.dtype)
    layer.__dict__["_parts"] = {name: part.shape for name, part in parts.items()}
    for name, part in parts.items():
        stored = part.reshape(_stored_shape(part, *weight.shape))
        layer.register_parameter(f"weight_{name}", nn.Parameter(stored, False))
    layer._parameters.update(others)
    emptied.data = weight.new_empty(0)


def _stored_shape(part: torch.Tensor, rows: int, columns: int) -> Sequence[int]:
    """Of a part of a weight: with its rows, where two values are in a byte, so that no other weight's is loaded."""
    if part.numel() * 2 == rows * columns and part.numel() % rows == 0:
        return rows, part.numel() // rows
    return part.shape or (1,)  # sharding needs a dimension


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
            gradient.sum_to_size(gradient.shape[-1]).to(bias_dtype) if of_bias else None,
            None,
        )


def names_of(ignore_modules: Iterable[str] | None) -> frozenset[str]:
    """Full names of modules that a user lists; None is none.

    Raises:
        FabricTypeError: They are one text, whose letters would be taken, or no texts.
    """
    names = ignore_modules if ignore_modules is None or isinstance(ignore_modules, str) else [*ignore_modules]
    if isinstance(names, str) or not all(isinstance(name, str) for name in names or ()):
        raise FabricTypeError(
            "ignore_modules lists the full names of modules.",
            given=f"ignore_modules={ignore_modules!r}",
            fix="ignore_modules={'lm_head'}",
        )
    return frozenset(names or ())
