"""DeepSpeed's configuration: what the strategy says, around what the user's own says."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fabric_lite.errors import FabricTypeError, FabricValueError
from fabric_lite.precision import Precision

__all__ = ["engine_config", "read_config"]

# What is said elsewhere: the key, and where.
_SAID_ELSEWHERE = {
    "optimizer": "fabric.setup(model, optimizer) with an optimizer of torch.optim",
    "scheduler": "a scheduler of torch.optim.lr_scheduler over that optimizer",
    "fp16": "Fabric(precision=)",
    "bf16": "Fabric(precision=)",
    "torch_autocast": "Fabric(precision=)",
    "gradient_clipping": "fabric.clip_gradients(model, optimizer, max_norm=)",
    "managed_gradient_accumulation": "fabric.no_backward_sync(model), and a step at the end of each window",
    "train_batch_size": "the loaders' batch_size, which is per rank",
}


def read_config(config: Any) -> dict[str, Any]:
    """Return a user's configuration, a dict or the path of a JSON file, checked; None is an empty one.

    Raises:
        FabricTypeError: Neither.
        FabricValueError: It says what is said elsewhere, or the file holds no JSON object.
    """
    if config is None:
        return {}
    if isinstance(config, (str, os.PathLike)):
        try:
            found = json.loads(Path(config).read_text())
        except (OSError, ValueError) as error:
            raise FabricValueError(
                "DeepSpeed's configuration could not be read.", given=f"config={str(config)!r}: {error}"
            ) from error
    else:
        found = copy.deepcopy(config)
    if not isinstance(found, Mapping):
        raise FabricTypeError(
            "DeepSpeed's configuration is a dict, or the path of a JSON file that holds one.",
            given=f"config={config!r:.80}",
            fix='config={"zero_optimization": {"reduce_bucket_size": 50_000_000}}',
        )
    for key, elsewhere in _SAID_ELSEWHERE.items():
        if key in found:
            raise FabricValueError(
                f"{key!r} has no place in DeepSpeed's configuration: the script says it.",
                given=f"config with {key!r}",
                fix=elsewhere,
            )
    if found.get("gradient_accumulation_steps", 1) != 1:
        raise FabricValueError(
            "Windows of accumulation are the loop's, not DeepSpeed's.",
            given=f"config with gradient_accumulation_steps={found['gradient_accumulation_steps']!r}",
            fix="fabric.no_backward_sync(model), and a step at the end of each window",
        )
    return dict(found)


def engine_config(
    own: Mapping[str, Any], *, stage: int, offload_optimizer: bool, offload_parameters: bool, precision: Precision
) -> dict[str, Any]:
    """Return the whole configuration of an engine.

    Args:
        own: The user's, which wins in everything that the strategy's options do not say.
        stage: Of ZeRO.
        offload_optimizer: Whether optimizer state, and the step, are on the CPU.
        offload_parameters: Whether the parts of parameters are in the host's memory.
        precision: Of the run; half precisions but bfloat16 are refused before.
    """
    # Else DeepSpeed would exchange torch.nn.functional.linear, for every module of the process.
    zero = {"overlap_comm": False, "memory_efficient_linear": False, **own.get("zero_optimization", {}), "stage": stage}
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", **zero.get("offload_optimizer", {})}
    elif stage < 3:
        # The norm is the business of clip_gradients(); at each step it would cost a collective.
        zero["compute_grad_norm"] = False
    if offload_parameters:
        zero["offload_param"] = {"device": "cpu", **zero.get("offload_param", {})}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # of DeepSpeed's own counters; loaders know the batches
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "log_level": "warning",
        **own,
        "gradient_clipping": 0.0,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": zero,
    }
    if torch.bfloat16 in (precision.param_dtype, precision.compute_dtype):
        config["bf16"] = {"enabled": True}
        # Stage 1 with accumulators in float32 would be another optimizer of DeepSpeed's, without these parts.
        wide = stage > 1 and precision.reduce_dtype != torch.bfloat16
        config["data_types"] = {"grad_accum_dtype": "fp32" if wide else "bf16", **own.get("data_types", {})}
        if precision.reduce_dtype == torch.float32:
            config.setdefault("communication_data_type", "fp32")
    return config
