"""Random seeds, and the state of every random generator of this process."""

from __future__ import annotations

import dataclasses
import operator
import random
import secrets
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fabric_lite.device import generator_state, generators_in_use, set_generator_state
from fabric_lite.errors import FabricTypeError, FabricValueError

__all__ = [
    "latest_seed",
    "random_state",
    "reset_seed",
    "seed_everything",
    "set_random_state",
    "set_shared_random_state",
    "shared_random_state",
    "worker_seed_base",
]

MAX_SEED = 2**32 - 1  # numpy takes no more


@dataclasses.dataclass(frozen=True)
class _Seeding:
    seed: int
    workers: bool


_latest: _Seeding | None = None


def seed_everything(seed: int | None = None, workers: bool = True, deterministic: bool | None = None) -> int:
    """Seed Python, numpy and torch with all its accelerators, and return the seed.

    Called on each rank by itself; it communicates nothing and leaves the environment alone.

    Args:
        seed: From 0 to 2**32 - 1. None is the seed of the call before, or, in the first call, a fresh random one
            (then each rank draws its own).
        workers: Whether data loader workers derive their seeds from this one.
        deterministic: Whether torch takes algorithms alone that give the same bits each time, and raises where it has
            none (on CUDA the environment needs ``CUBLAS_WORKSPACE_CONFIG=:4096:8`` for that). None leaves it as it is.

    Raises:
        FabricTypeError: ``seed`` is no whole number.
        FabricValueError: ``seed`` is out of range.

    >>> seed_everything(42)
    42
    """
    global _latest
    if seed is None:
        seed = secrets.randbits(32) if _latest is None else _latest.seed
    _latest = _Seeding(_checked(seed), workers)
    _seed_generators(_latest.seed)
    if deterministic is not None:
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark and not deterministic
    return _latest.seed


def reset_seed() -> None:
    """Start every generator again from the seed of the latest :func:`seed_everything`; nothing if there was none."""
    if _latest is not None:
        _seed_generators(_latest.seed)


def latest_seed() -> int | None:
    """The seed of the latest :func:`seed_everything`; None if there was none."""
    return None if _latest is None else _latest.seed


def worker_seed_base() -> int | None:
    """The seed that data loader workers derive theirs from; None if nobody asked for that."""
    return _latest.seed if _latest is not None and _latest.workers else None


def random_state() -> dict[str, Any]:
    """Return the state of this process's generators: Python, numpy, torch CPU and each device of the accelerator.

    It holds only what ``torch.load(weights_only=True)`` reads back. An accelerator that was never used is left out.
    """
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict)
    numpy_state = {
        "bit_generator": legacy["bit_generator"],
        "key": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
        "position": int(legacy["state"]["pos"]),
        "has_gauss": int(legacy["has_gauss"]),
        "gauss": float(legacy["gauss"]),
    }
    state: dict[str, Any] = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    accelerator = generators_in_use()
    if accelerator is not None:
        name, count = accelerator
        state["accelerator"] = name
        state["devices"] = [generator_state(name, index) for index in range(count)]
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set this process's generators to what :func:`random_state` returned; devices that are not here are passed over.

    Raises:
        FabricValueError: Something is missing; no generator was changed.
    """
    missing = [key for key in ("python", "numpy", "torch") if key not in state]
    if missing:
        raise FabricValueError(
            "This is not the random state of a process.",
            given=f"a mapping without {', '.join(missing)}",
            fix="what fabric_lite.seed.random_state() returned",
        )
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    saved = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": saved["bit_generator"],
            "state": {"key": saved["key"].cpu().numpy().astype(np.uint32), "pos": saved["position"]},
            "has_gauss": saved["has_gauss"],
            "gauss": saved["gauss"],
        }
    )
    torch.set_rng_state(state["torch"].cpu())
    accelerator = generators_in_use()
    if accelerator is not None and accelerator[0] == state.get("accelerator"):
        name, count = accelerator
        for index, device_state in enumerate(state["devices"][:count]):
            set_generator_state(name, index, device_state.cpu())


def shared_random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of this process's generators, and of ``device``'s, for a rank that is to draw the same numbers.

    Unlike :func:`random_state` it fits a rank on another device of the same kind.
    """
    state = random_state()
    index = state.pop("accelerator", None) and device.index
    devices = state.pop("devices", [])
    return state if index is None else {**state, "device": devices[index]}


def set_shared_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Set this process's generators, and ``device``'s, to what :func:`shared_random_state` returned on another rank."""
    set_random_state(state)
    if "device" in state:
        set_generator_state(device.type, device.index, state["device"])


def _checked(seed: Any) -> int:
    try:
        number = operator.index(seed)
    except TypeError as error:
        raise FabricTypeError(
            "A seed is a whole number.", given=f"{type(seed).__name__}: {seed!r:.80}", fix="an int"
        ) from error
    if not 0 <= number <= MAX_SEED:
        raise FabricValueError("This seed is out of range.", given=f"seed={number}", fix=f"0 to {MAX_SEED}, or None")
    return number


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # also every accelerator, at its first use if it was not used yet
    if "torch_xla" in sys.modules:  # but these
        set_generator_state("xla", 0, torch.tensor(seed))
