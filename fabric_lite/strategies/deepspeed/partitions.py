"""Which part of each parameter, gradient and optimizer state DeepSpeed keeps on this rank.

ZeRO's optimizers keep them flat and side by side, one flat tensor for each group (stages 1 and 2) or slice of a group
(stage 3), and of each parameter a run of elements, which may begin and end anywhere. These two classes are all that
knows where.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Divided", "Part", "Replicated", "partitions_of"]


@dataclasses.dataclass(frozen=True)
class Part:
    """This rank's run of a parameter's elements.

    Args:
        flat: The flat tensor that holds it, with the values in the dtype of the step; optimizer state is kept under it.
        begin: Its first element there.
        offset: Its first element in the flattened parameter.
        count: How many; 0 where the rank holds nothing of the parameter.
    """

    flat: torch.Tensor
    begin: int
    offset: int
    count: int


class Replicated:
    """Stages 1 and 2: the parameters themselves are whole on every rank.

    Args:
        zero: DeepSpeed's ``DeepSpeedZeroOptimizer``.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def groups(self) -> list[tuple[torch.Tensor, Sequence[torch.Tensor]]]:
        """Each flat tensor with the parameters of which it may hold parts, on all ranks alike."""
        return list(zip(self._zero.single_partition_of_fp32_groups, self._zero.bit16_groups, strict=True))

    def divided_beside(self, _: torch.nn.Module) -> list[torch.Tensor]:
        """Frozen parameters that are in parts as well."""
        return []

    @staticmethod
    def shape_of(parameter: Any) -> torch.Size:
        return parameter.shape

    def part_of(self, parameter: Any) -> Part | None:
        """Where this rank's part of a trainable parameter is; None if it holds nothing of it."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        held, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
        flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        return Part(flat, held.start, whole.start, held.numel)

    def gradients(self) -> list[torch.Tensor]:
        """The parts of the gradients of the step to come, in whatever shapes; over all ranks each element once."""
        if self._zero.cpu_offload:
            return [flat.grad for flat in self._zero.single_partition_of_fp32_groups]
        return [gradient for group in self._zero.averaged_gradients.values() for gradient in group]

    def forget(self) -> None:
        """Drop all gradients, wherever they are on their way."""
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        zero.averaged_gradients.clear()
        zero.all_grad_tensors.clear()
        zero.micro_step_id = -1  # as after a step
        zero._epilogue_ran_this_backward = False
        for number in range(len(zero.params_already_reduced)):
            zero.params_already_reduced[number] = False
        for bucket in zero.ipg_buckets.values():
            bucket.clear()
        zero._release_ipg_buffers()
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
            zero._offload_accumulated_param_ids = set()
            for flat in zero.single_partition_of_fp32_groups:
                flat.grad.zero_()  # a parameter that the next window leaves out would be stepped on with this one's

    def publish(self) -> None:
        """Give the model the values in the flat tensors; every rank calls."""
        self._zero.update_lp_params()

    def recover(self) -> None:
        """After an exception in forward: nothing, parameters are always there."""


class Divided:
    """Stage 3: a rank holds a part of each parameter, and the whole while it is in use.

    Args:
        zero: DeepSpeed's ``DeepSpeedZeroOptimizer_Stage3``.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def groups(self) -> list[tuple[torch.Tensor, Sequence[torch.Tensor]]]:
        return list(zip(self._zero.fp32_partitioned_groups_flat, self._zero.fp16_groups, strict=True))

    def divided_beside(self, module: torch.nn.Module) -> list[torch.Tensor]:
        stepped = {id(parameter) for _, parameters in self.groups() for parameter in parameters}
        return [parameter for parameter in module.parameters() if id(parameter) not in stepped]

    @staticmethod
    def shape_of(parameter: Any) -> torch.Size:
        return parameter.ds_shape

    def part_of(self, parameter: Any) -> Part | None:
        number = parameter.ds_tensor.numel()
        flat, begin = parameter.ds_tensor, 0
        position = self._zero.grad_position.get(self._zero.get_param_id(parameter))
        if position is not None:
            index, begin, number = position
            flat = self._zero.fp32_partitioned_groups_flat[index]
        offset = number * dist.get_rank(parameter.ds_process_group)
        # The last ranks' parts go on beyond the end.
        return Part(flat, begin, offset, max(0, min(number, parameter.ds_numel - offset)))

    def gradients(self) -> list[torch.Tensor]:
        if self._zero.offload_optimizer:
            return [flat.grad for flat in self._zero.fp32_partitioned_groups_flat]
        return [gradient for group in self._zero.averaged_gradients.values() for gradient in group]

    def forget(self) -> None:
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        zero.averaged_gradients = {}
        zero._offload_boundary_param_ids = set()
        zero.grad_partitions_flat_buffer.zero_()
        for number in zero.params_already_reduced:
            zero.params_already_reduced[number] = False
        for bucket in zero.ipg_buckets.values():
            bucket.clear_params()
        if zero.offload_optimizer:
            zero.reset_cpu_buffers()
            for flat in zero.fp32_partitioned_groups_flat:
                flat.grad.zero_()

    def publish(self) -> None:
        zero = self._zero
        zero._partition_all_parameters()
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def recover(self) -> None:
        """After an exception in forward: divide again what was gathered, and forget the order that was being noted."""
        offload = self._zero.parameter_offload
        offload.partition_all_parameters()
        coordinator = offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        from deepspeed.runtime.zero import parameter_offload

        stack = parameter_offload.FWD_MODULE_STACK
        while stack and stack[-1] is not offload.module:
            stack.pop()


def partitions_of(zero: Any, stage: int) -> Replicated | Divided:
    """The class for a stage."""
    return Divided(zero) if stage == 3 else Replicated(zero)
