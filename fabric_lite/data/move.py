"""Batches on the device: containers keep their type, and what is there already is not touched."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from fabric_lite.device import kind_of
from fabric_lite.trees import map_leaves

__all__ = ["move_to_device", "mover"]


def move_to_device(data: Any, device: torch.device | str) -> Any:
    """Return ``data`` with every tensor, and every object with a ``.to`` method, on ``device``.

    A container in which nothing moved is returned as it is. Copies from pinned memory do not block.
    """
    return mover(torch.device(device))(data)


def mover(device: torch.device) -> Callable[[Any], Any]:
    """Return the function that moves one batch to ``device``; loops, since torch's pytree costs five times as much."""
    may_overlap = kind_of(device).pins_memory
    to_cpu = device.type == "cpu"
    tensor_type = torch.Tensor

    def move(data: Any) -> Any:
        kind = type(data)
        if kind is tensor_type or isinstance(data, tensor_type):
            if data.is_cpu if to_cpu else data.device == device:
                return data
            return data.to(device, non_blocking=may_overlap and data.device.type == "cpu" and data.is_pinned())
        if kind is dict:
            moved: Any = {key: move(value) for key, value in data.items()}
            for key in data:
                if moved[key] is not data[key]:
                    return moved
            return data
        if kind is tuple or kind is list:
            for value in data:  # most batches: tensors that are where they belong
                if type(value) is not tensor_type or not (value.is_cpu if to_cpu else value.device == device):
                    break
            else:
                return data
            items = [move(value) for value in data]
            # Identity and not equality: comparing tensors would compare their numbers.
            if all(map(operator.is_, items, data)):
                return data
            return tuple(items) if kind is tuple else items
        if _moves_itself(data):
            result = data.to(device)
            return data if result is None else result
        return map_leaves(lambda leaf: leaf if leaf is data else move(leaf), data, _moves_itself)

    return move


def _moves_itself(data: Any) -> bool:
    """Whether ``data`` has a ``.to`` of its own.

    Asked before containers are taken apart: a PackedSequence is a namedtuple that must keep one of its tensors on CPU.
    """
    return callable(getattr(data, "to", None)) and not isinstance(data, type)
