"""A whole checkpoint in one safetensors file: its tensors under dotted names, all else in a text of the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from fabric_lite.checkpoint.contents import Contents
from fabric_lite.checkpoint.manifest import DTYPES
from fabric_lite.checkpoint.plain import Place
from fabric_lite.checkpoint.plain_json import decode
from fabric_lite.checkpoint.stored import Located, Piece, StoredTensor, row_major
from fabric_lite.errors import CheckpointError

__all__ = ["KEY", "content_of", "header_of", "metadata_for"]

KEY = "fabric_lite"
FORMAT = 1


def metadata_for(contents: Contents, header: Mapping[str, Any]) -> dict[str, str]:
    """Return the strings of the file's header.

    Args:
        contents: What is in the file.
        header: What is known of the checkpoint: ``torch``, ``strategy`` and the like.
    """
    tensors = [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in contents.tensors]
    text = json.dumps({"format": FORMAT, **header, "content": contents.encoded, "tensors": tensors})
    # transformers refuses files that do not say so; safetensors' own load_model finds tied weights by their names.
    return {**contents.other_names(), "format": "pt", KEY: text}


def header_of(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What :func:`metadata_for` wrote; None for a file of something else. CheckpointError if it is damaged."""
    if KEY not in metadata:
        return None
    try:
        header: dict[str, Any] = json.loads(metadata[KEY])
        if header["format"] > FORMAT:
            raise CheckpointError(
                "This checkpoint was written by a newer fabric_lite.",
                given=f"format {header['format']}, by version {header.get('fabric_lite')}",
                fix="a newer fabric_lite, or the safetensors package for its tensors alone",
            )
        return header | {"content": header["content"], "tensors": [_checked(*entry) for entry in header["tensors"]]}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            "The description of a checkpoint's content is damaged.",
            given=f"__metadata__[{KEY!r}]: {type(error).__name__}: {error}",
            fix="an earlier checkpoint",
        ) from error


def content_of(header: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Any:
    """Return the checkpoint's content, with the file's tensors in their places.

    Raises:
        CheckpointError: The header and the tensors do not fit together.
    """
    return decode(header["content"], [_as_saved(tensors, *entry) for entry in header["tensors"]].__getitem__)


def _checked(name: Any, dtype: Any, shape: Any) -> tuple[str, torch.dtype, torch.Size]:
    if not isinstance(name, str):
        raise TypeError(f"{name!r:.80} is no name")
    if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
        raise TypeError(f"{shape!r:.80} is no shape")
    return name, DTYPES[dtype], torch.Size(shape)


def _as_saved(tensors: Mapping[str, StoredTensor], name: str, dtype: torch.dtype, shape: torch.Size) -> StoredTensor:
    """A tensor with the dtype that it had: the format has bytes in the place of those that it does not know."""
    found = tensors.get(name)
    if found is None or found.shape.numel() * found.dtype.itemsize != shape.numel() * dtype.itemsize:
        raise CheckpointError(
            f"{Place().at(name)} is not in the file as its header describes it.",
            given=f"{dtype} of shape {tuple(shape)}",
            fix="an earlier checkpoint",
        )
    located = found.pieces[0].locate()
    pieces = [Piece.at((0,) * len(shape), shape, Located(located.file, located.begin, row_major(shape)))]
    return StoredTensor(dtype, shape, pieces, row_major(shape))
