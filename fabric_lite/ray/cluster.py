"""The cluster: connecting to it, asking for places for the ranks, and giving them back."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from fabric_lite.errors import FabricImportError, FabricValueError, LaunchError
from fabric_lite.ray.actor import Rank

__all__ = ["Resources", "check_resources", "connected", "default_resources", "places", "start_actors"]

Resources = Mapping[str, float]


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Be connected to the cluster; a connection that is there already is used, and left.

    Raises:
        FabricImportError: Ray is not installed.
        LaunchError: There is no cluster at this address.
    """
    if importlib.util.find_spec("ray") is None:
        raise FabricImportError("fabric_lite.ray needs a package that is not installed.", given="ray", fix=_INSTALL)
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        _knock(address or os.environ.get("RAY_ADDRESS", ""))
        ray.init(address=address)
    except (ConnectionError, ValueError) as error:
        raise LaunchError(
            "There is no Ray cluster at this address.",
            given=f"address={address or os.environ.get('RAY_ADDRESS')!r}: {error}",
            fix="ray start --head there, or leave the address out for a cluster of this machine alone",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise ConnectionError where nobody listens at ``[ray://]HOST:PORT``: Ray would try that for five minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(str(error)) from error


_KNOCK_SECONDS = 5.0
_INSTALL = "pip install 'fabric-lite[ray]'"


def default_resources(accelerator: Any) -> dict[str, float]:
    """Return what a rank needs where nothing was said: a core and, unless it runs without, a GPU.

    Args:
        accelerator: As in ``Fabric(accelerator=)``. Where it leaves the choice, a GPU if the cluster has any.
    """
    import ray

    kind = _kind_of(accelerator)
    wants_gpu = ray.cluster_resources().get("GPU", 0) > 0 if kind in _ANY else kind in _GPUS
    return {"CPU": 1, "GPU": 1} if wants_gpu else {"CPU": 1}


def _kind_of(accelerator: Any) -> Any:
    """The name of what was asked for. By its attribute: the driver does without torch, and so without the class."""
    kind = getattr(accelerator, "device_type", accelerator)
    return kind.strip().lower() if isinstance(kind, str) else kind


_ANY = (None, "auto")
_GPUS = ("cuda", "gpu", "xpu")  # Intel's are GPUs to Ray too


def check_resources(resources: Resources, accelerator: Any = None) -> None:
    """Raise unless a rank can use them.

    Raises:
        FabricValueError: A share of a GPU or several, a negative amount, nothing at all, or no GPU for
            ``Fabric(accelerator=)`` that needs one.
    """
    right = '{"CPU": 1, "GPU": 1}'
    if resources.get("GPU", 0) not in (0, 1):
        raise FabricValueError("A rank uses one GPU or none.", given=f"resources_per_rank={dict(resources)}", fix=right)
    if min(resources.values(), default=0) < 0 or not any(resources.values()):
        raise FabricValueError(
            "A rank needs some resource, and none can be negative.",
            given=f"resources_per_rank={dict(resources)}",
            fix=right,
        )
    if _kind_of(accelerator) in _GPUS and not resources.get("GPU", 0):
        raise FabricValueError(
            "Ranks that run on a GPU need one each.",
            given=f"accelerator={accelerator!r}, resources_per_rank={dict(resources)}",
            fix=f"{right}, or accelerator='cpu'",
        )


@contextlib.contextmanager
def places(ranks: int, resources: Resources, wait_seconds: float) -> Iterator[Any]:
    """A placement group of one bundle for each rank, on as few nodes as possible; removed, with its actors, at the end.

    Raises:
        LaunchError: The cluster has not had that much to give for so long.
    """
    import ray

    group = ray.util.placement_group([_without_zeros(resources)] * ranks, strategy="PACK")
    try:
        if not group.wait(wait_seconds):
            raise _too_few(ranks, resources, wait_seconds)
        yield group
    finally:
        ray.util.remove_placement_group(group)


def start_actors(group: Any, resources: Resources) -> list[Any]:
    """Start an actor in each bundle; it is there once it answers."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    names = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    amounts = _without_zeros(resources)
    options: dict[str, Any] = {"num_cpus": 0}
    options |= {names[name]: amount for name, amount in amounts.items() if name in names}
    options["resources"] = {name: amount for name, amount in amounts.items() if name not in names}
    if "GPU" in amounts:
        # Left to itself Ray shows each actor its own GPU alone, as number 0; then LOCAL_RANK would number nothing.
        options["runtime_env"] = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
    actor_class = ray.remote(Rank)
    strategies = [PlacementGroupSchedulingStrategy(group, bundle) for bundle in range(group.bundle_count)]
    return [actor_class.options(**options, scheduling_strategy=strategy).remote() for strategy in strategies]


def _without_zeros(resources: Resources) -> dict[str, float]:
    return {name: amount for name, amount in resources.items() if amount}


def _too_few(ranks: int, resources: Resources, wait_seconds: float) -> LaunchError:
    import ray

    whole, free = ray.cluster_resources(), ray.available_resources()
    amounts = _without_zeros(resources).items()
    counts = [
        f"{name}: {amount * ranks:g} needed, {whole.get(name, 0):g} in the cluster, {free.get(name, 0):g} free"
        for name, amount in amounts
    ]
    return LaunchError(
        f"The cluster has had no places for {ranks} ranks for {wait_seconds:g} seconds.",
        given=f"{dict(resources)} for each; {'; '.join(counts)}",
        fix="fewer ranks, fewer resources_per_rank, or a longer wait_seconds for a cluster that is busy or grows",
    )
