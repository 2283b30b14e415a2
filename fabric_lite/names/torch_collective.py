"""``TorchCollective``: process groups of a program's own, and what their ranks say to each other."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from fabric_lite.errors import FabricRuntimeError

__all__ = ["TorchCollective"]


class TorchCollective:
    """One group of ranks; thin names for the functions of ``torch.distributed``, each with this group. ::

        trainers = TorchCollective()
        trainers.create_group(ranks=[1, 2, 3])  # every rank of the job calls

    Before :meth:`create_group` it is the group of all ranks.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._owns_processes = False

    @property
    def group(self) -> Any:
        """The process group; ``GroupMember.NON_GROUP_MEMBER`` on ranks outside.

        Raises:
            FabricRuntimeError: The processes are not connected.
        """
        if self._group is None:
            if not dist.is_initialized():
                raise FabricRuntimeError(
                    "The processes are not connected yet.", given="TorchCollective().group", fix="fabric.launch() first"
                )
            self._group = dist.group.WORLD
        return self._group

    @property
    def rank(self) -> int:
        """Of this process in the group; -1 outside."""
        return dist.get_rank(self.group)

    @property
    def world_size(self) -> int:
        """The number of ranks in the group; -1 outside."""
        return dist.get_world_size(self.group)

    def setup(
        self, backend: str = "gloo", timeout: datetime.timedelta | None = None, **options: Any
    ) -> TorchCollective:
        """Connect the processes, if nobody has: under a Fabric they are connected."""
        if not dist.is_initialized():
            dist.init_process_group(backend, timeout=timeout, **options)
            self._owns_processes = True
        return self

    def create_group(
        self, ranks: Sequence[int] | None = None, timeout: datetime.timedelta | None = None, **options: Any
    ) -> TorchCollective:
        """Make a group of these ranks, or of all; every rank of the job calls, those outside too."""
        self._group = dist.new_group(None if ranks is None else list(ranks), timeout=timeout, **options)
        return self

    def teardown(self) -> TorchCollective:
        """Leave the group, and the processes where :meth:`setup` has connected them."""
        outside = (None, dist.group.WORLD, dist.GroupMember.NON_GROUP_MEMBER)
        if self._group not in outside:
            dist.destroy_process_group(self._group)
        self._group = None
        if self._owns_processes:
            dist.destroy_process_group()
            self._owns_processes = False
        return self

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Fill the tensor with that of rank ``src`` of the job."""
        dist.broadcast(tensor, src, self.group)
        return tensor

    def all_reduce(self, tensor: torch.Tensor, op: Any = "sum") -> torch.Tensor:
        """Reduce the tensor in place: ``sum min max product avg``, or one of torch's ``ReduceOp``."""
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op.upper()) if isinstance(op, str) else op, self.group)
        return tensor

    def all_gather(self, tensors: list[torch.Tensor], tensor: torch.Tensor) -> list[torch.Tensor]:
        """Fill the list with the tensors of all ranks of the group."""
        dist.all_gather(tensors, tensor, self.group)
        return tensors

    def send(self, tensor: torch.Tensor, dst: int, tag: int = 0) -> None:
        """Send to a rank of the job."""
        dist.send(tensor, dst, self.group, tag)

    def recv(self, tensor: torch.Tensor, src: int | None = None, tag: int = 0) -> torch.Tensor:
        """Fill the tensor with what a rank of the job, or any, has sent."""
        dist.recv(tensor, src, self.group, tag)
        return tensor

    def broadcast_object_list(self, objects: list[Any], src: int, device: Any = None) -> list[Any]:
        """Fill the list with that of rank ``src`` of the job; pickled, so what a rank sends may run code here."""
        dist.broadcast_object_list(objects, src, self.group, device)
        return objects

    def all_gather_object(self, objects: list[Any], obj: Any) -> list[Any]:
        """Fill the list with the objects of all ranks of the group."""
        dist.all_gather_object(objects, obj, self.group)
        return objects

    def gather_object(self, obj: Any, object_gather_list: list[Any] | None, dst: int = 0) -> list[Any] | None:
        """Fill the list of rank ``dst`` of the job with the objects of all ranks of the group."""
        dist.gather_object(obj, object_gather_list, dst, self.group)
        return object_gather_list

    def scatter_object_list(self, output: list[Any], objects: list[Any] | None, src: int = 0) -> list[Any]:
        """Give each rank of the group one of the objects of rank ``src`` of the job, as the first of ``output``."""
        dist.scatter_object_list(output, objects, src, self.group)
        return output

    def barrier(self, device_ids: list[int] | None = None) -> None:
        """Wait for all ranks of the group."""
        dist.barrier(self.group, device_ids=device_ids)
