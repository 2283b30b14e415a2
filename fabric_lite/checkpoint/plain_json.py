"""Plain data as JSON and back, exactly; tensors are numbered leaves, and nothing that is read can run code.

Values that JSON has are themselves; a dict with string keys is an object. Anything else is
``{"tag": KIND, "value": ...}``, and a tensor is ``{"tensor": NUMBER}``. Kinds are looked up in a fixed table.
"""

from __future__ import annotations

import base64
import collections
import math
import struct
import warnings
from collections.abc import Callable
from typing import Any

import torch

from fabric_lite.errors import CheckpointDamagedError, CheckpointError, FabricTypeError

__all__ = ["decode", "encode"]

_DTYPES = {str(value)[6:]: value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_LAYOUTS = {str(value)[6:]: value for value in vars(torch).values() if isinstance(value, torch.layout)}
_QSCHEMES = {str(value)[6:]: value for value in vars(torch).values() if isinstance(value, torch.qscheme)}
_LARGEST = 1 << 63  # Python limits the digits of a number that it reads; hexadecimal ones have no limit
_QUANTIZED = (torch.qint8, torch.quint8, torch.qint32)
_PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)

TensorNumber = Callable[[Any], int]
TensorOf = Callable[[int], Any]


def encode(value: Any, tensor_number: TensorNumber) -> Any:
    """Return plain data as values that ``json.dumps`` takes.

    Args:
        value: What :func:`fabric_lite.checkpoint.plain.plain` returns; in the places of its tensors any objects.
        tensor_number: Called with each tensor in order, returns its number. A sparse or a quantized tensor comes as
            the strided tensors that it is made of.

    Raises:
        FabricTypeError: A tensor is of a kind that can't be taken apart.
    """
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is dict:
        return _encode_dict(value, tensor_number)
    if kind is list:
        return [encode(item, tensor_number) for item in value]
    write = _ENCODERS.get(kind)
    if write is not None:
        return write(value, tensor_number)
    if isinstance(value, torch.Tensor) and (value.layout != torch.strided or value.is_quantized):
        return _tagged(*_taken_apart(value, tensor_number))
    return {"tensor": tensor_number(value)}


def decode(encoded: Any, tensor: TensorOf) -> Any:
    """Return the plain data that :func:`encode` was given.

    Args:
        encoded: What ``json.loads`` returned.
        tensor: Returns what to put in the place of a tensor, by its number. Where a sparse or a quantized tensor is
            put together, it is asked for ``full()`` if it is no tensor.

    Raises:
        CheckpointError: It is no such data.
    """
    try:
        return _decode(encoded, tensor)
    except CheckpointError:
        raise
    except Exception as error:  # struct.error, OverflowError and more: what was planted is handed to many functions
        raise CheckpointDamagedError(
            "The description of a checkpoint's content is damaged.",
            given=f"{type(error).__name__}: {error}",
            fix="an earlier checkpoint",
        ) from error


def _decode(encoded: Any, tensor: TensorOf) -> Any:
    if isinstance(encoded, list):
        return [_decode(item, tensor) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    if encoded.keys() == {"tensor"}:
        return tensor(_whole_number(encoded["tensor"]))
    if encoded.keys() != {"tag", "value"}:
        return {key: _decode(item, tensor) for key, item in encoded.items()}
    tag = encoded["tag"]
    if not isinstance(tag, str) or tag not in _DECODERS:
        raise CheckpointError(
            "A checkpoint holds a kind of value that this fabric_lite does not know.",
            given=f"{tag!r:.80}",
            fix="the version of fabric_lite that wrote it, or an earlier checkpoint",
        )
    return _DECODERS[tag](encoded["value"], tensor)


def _tagged(tag: str, value: Any) -> dict[str, Any]:
    return {"tag": tag, "value": value}


def _encode_int(value: int, _: TensorNumber) -> Any:
    return value if -_LARGEST <= value < _LARGEST else _tagged("int", hex(value))


def _encode_float(value: float, _: TensorNumber) -> Any:
    # A nan's bits may mean something to whoever saved it.
    return value if math.isfinite(value) else _tagged("float", struct.pack(">d", value).hex())


def _encode_str(value: str, _: TensorNumber) -> Any:
    if not _has_surrogates(value):
        return value
    # JSON would join two halves of a pair that stand side by side.
    return _tagged("str", value.encode("utf-32-be", "surrogatepass").hex())


def _has_surrogates(value: str) -> bool:
    return not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value)


def _encode_dict(value: dict[Any, Any], tensor_number: TensorNumber) -> Any:
    readable = all(type(key) is str and not _has_surrogates(key) for key in value)
    if readable and value.keys() != {"tensor"} and value.keys() != {"tag", "value"}:
        return {key: encode(item, tensor_number) for key, item in value.items()}
    pairs = [[encode(key, tensor_number), encode(item, tensor_number)] for key, item in value.items()]
    return _tagged("dict", pairs)


def _decode_dict(value: Any, tensor: TensorOf) -> dict[Any, Any]:
    return {_decode(key, tensor): _decode(item, tensor) for key, item in value}


def _encode_ordered(value: Any, tensor_number: TensorNumber) -> Any:
    fields = {"items": encode(dict(value), tensor_number)}
    if "_metadata" in vars(value):
        fields["_metadata"] = encode(vars(value)["_metadata"], tensor_number)
    return _tagged(type(value).__name__, fields)


def _decode_ordered(kind: Callable[[Any], Any]) -> Callable[[Any, TensorOf], Any]:
    def ordered(value: Any, tensor: TensorOf) -> Any:
        made = kind(_decode(value["items"], tensor))
        if "_metadata" in value:
            made._metadata = _decode(value["_metadata"], tensor)
        return made

    return ordered


def _encode_set(value: set[Any], tensor_number: TensorNumber) -> Any:
    # The order of a set of strings differs from process to process; the same state shall give the same bytes.
    items = sorted(value, key=lambda item: (type(item).__name__, repr(item)))
    return _tagged("set", [encode(item, tensor_number) for item in items])


def _whole_number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.80} is no tensor's number")
    return value


def _taken_apart(tensor: torch.Tensor, tensor_number: TensorNumber) -> tuple[str, dict[str, Any]]:
    """The tag and the fields of a tensor that is made of several strided ones."""
    if tensor.is_quantized:
        return "quantized", _quantized_fields(tensor, tensor_number)
    if tensor.layout == torch.sparse_coo:
        parts, coalesced = [tensor._indices(), tensor._values()], tensor.is_coalesced()
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts, coalesced = [tensor.crow_indices(), tensor.col_indices(), tensor.values()], None
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts, coalesced = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()], None
    else:
        raise FabricTypeError(
            f"A checkpoint folder can't hold a tensor of layout {tensor.layout}.",
            given=f"shape {tuple(tensor.shape)}, {tensor.dtype}",
            fix="value.to_dense() in its place",
        )
    numbers = [{"tensor": tensor_number(part)} for part in parts]
    return "sparse", {
        "layout": str(tensor.layout)[6:],
        "shape": list(tensor.shape),
        "coalesced": coalesced,
        "parts": numbers,
    }


def _quantized_fields(tensor: torch.Tensor, tensor_number: TensorNumber) -> dict[str, Any]:
    if tensor.dtype not in _QUANTIZED:
        raise FabricTypeError(
            f"A checkpoint folder can't hold a tensor of {tensor.dtype}.",
            given=f"shape {tuple(tensor.shape)}",
            fix='value.dequantize() in its place, or state_dict_type="full"',
        )
    fields: dict[str, Any] = {"integers": {"tensor": tensor_number(tensor.int_repr())}, "dtype": str(tensor.dtype)[6:]}
    if tensor.qscheme() in _PER_TENSOR:
        return fields | {"scale": tensor.q_scale(), "zero_point": tensor.q_zero_point()}
    scales, zero_points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    numbers = [{"tensor": tensor_number(part)} for part in (scales, zero_points)]
    return fields | {"scales": numbers[0], "zero_points": numbers[1], "axis": tensor.q_per_channel_axis()}


def _whole(encoded: Any, tensor: TensorOf) -> torch.Tensor:
    part = _decode(encoded, tensor)
    return part if isinstance(part, torch.Tensor) else part.full()


def _sparse(value: Any, tensor: TensorOf) -> torch.Tensor:
    layout, shape = _LAYOUTS[value["layout"]], tuple(value["shape"])
    parts = [_whole(part, tensor) for part in value["parts"]]
    if layout == torch.sparse_coo:
        indices, values = parts
        return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=value["coalesced"], check_invariants=True)
    with warnings.catch_warnings():  # that compressed layouts are in beta is no news to who saved one
        warnings.simplefilter("ignore", UserWarning)
        ends, indices, values = parts
        return torch.sparse_compressed_tensor(ends, indices, values, shape, layout=layout, check_invariants=True)


def _quantized(value: Any, tensor: TensorOf) -> torch.Tensor:
    integers = _whole(value["integers"], tensor)
    with warnings.catch_warnings():  # torch is giving up quantized tensors; who saved one gets it back
        warnings.simplefilter("ignore", UserWarning)
        if "scale" in value:
            made = torch._make_per_tensor_quantized_tensor(integers, value["scale"], value["zero_point"])
        else:
            scales, zero_points = _whole(value["scales"], tensor), _whole(value["zero_points"], tensor)
            made = torch._make_per_channel_quantized_tensor(integers, scales, zero_points, value["axis"])
    if made.dtype != _DTYPES[value["dtype"]]:
        raise ValueError(f"integers of {integers.dtype} are no {value['dtype']}")
    return made


_ENCODERS: dict[type, Callable[[Any, TensorNumber], Any]] = {
    int: _encode_int,
    float: _encode_float,
    str: _encode_str,
    complex: lambda value, number: _tagged("complex", [encode(part, number) for part in (value.real, value.imag)]),
    bytes: lambda value, _: _tagged("bytes", base64.b64encode(value).decode()),
    bytearray: lambda value, _: _tagged("bytearray", base64.b64encode(value).decode()),
    tuple: lambda value, number: _tagged("tuple", [encode(item, number) for item in value]),
    set: _encode_set,
    collections.OrderedDict: _encode_ordered,
    collections.Counter: _encode_ordered,
    torch.Size: lambda value, _: _tagged("Size", list(value)),
    torch.dtype: lambda value, _: _tagged("dtype", str(value)[6:]),
    torch.device: lambda value, _: _tagged("device", str(value)),
    torch.layout: lambda value, _: _tagged("layout", str(value)[6:]),
    torch.qscheme: lambda value, _: _tagged("qscheme", str(value)[6:]),
}
_DECODERS: dict[str, Callable[[Any, TensorOf], Any]] = {
    "int": lambda value, _: int(value, 16),
    "float": lambda value, _: struct.unpack(">d", bytes.fromhex(value))[0],
    "str": lambda value, _: bytes.fromhex(value).decode("utf-32-be", "surrogatepass"),
    "complex": lambda value, tensor: complex(*(_decode(part, tensor) for part in value)),
    "bytes": lambda value, _: base64.b64decode(value, validate=True),
    "bytearray": lambda value, _: bytearray(base64.b64decode(value, validate=True)),
    "tuple": lambda value, tensor: tuple(_decode(item, tensor) for item in value),
    "set": lambda value, tensor: {_decode(item, tensor) for item in value},
    "dict": _decode_dict,
    "OrderedDict": _decode_ordered(collections.OrderedDict),
    "Counter": _decode_ordered(collections.Counter),
    "Size": lambda value, _: torch.Size(value),
    "dtype": lambda value, _: _DTYPES[value],
    "device": lambda value, _: torch.device(value),
    "layout": lambda value, _: _LAYOUTS[value],
    "qscheme": lambda value, _: _QSCHEMES[value],
    "sparse": _sparse,
    "quantized": _quantized,
}
