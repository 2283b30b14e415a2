"""DeepSpeed's configuration: what the strategy says, around what the user's own says."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from fabric_lite.errors import FabricTypeError, FabricValueError
from fabric_lite.precision import Precision

__all__ = ["check_offloading", "engine_config", "is_offloaded", "read_config"]

_ZERO = "zero_optimization"
# The options of the strategy, and DeepSpeed's names for them.
_OFFLOADING = {"offload_optimizer": "offload_optimizer", "offload_parameters": "offload_param"}
# DeepSpeed's names from before those.
_FORMER = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}

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
        FabricTypeError: Neither, or a part of it is no dict.
        FabricValueError: It says what is said elsewhere, or the file cannot be read.
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
    # With it a configuration for Transformers' Trainer leaves a value to the script; in its parts DeepSpeed drops it.
    found = {key: value for key, value in found.items() if value != "auto"}
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
    found = _without_nulls(found, (_ZERO, "data_types"))
    zero = _without_nulls(_part(found, _ZERO), _OFFLOADING.values())
    for key in _OFFLOADING.values():
        _part(zero, key)
    for former, key in _FORMER.items():
        if former in zero:
            raise FabricValueError(
                f"{former!r} is what DeepSpeed called {key!r} once.",
                given=f"config with {former}={zero[former]!r}",
                fix=f'config={{"{_ZERO}": {{"{key}": {{"device": "cpu"}}}}}}',
            )
    return {**found, _ZERO: zero} if _ZERO in found else found


def _without_nulls(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """What is null under these keys is not there, as for DeepSpeed."""
    return {key: value for key, value in config.items() if value is not None or key not in keys}


def _part(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The dict under ``key``; an empty one where there is none."""
    found = config.get(key, {})
    if not isinstance(found, Mapping):
        raise FabricTypeError(
            f"{key!r} in DeepSpeed's configuration is a dict.",
            given=f"{key!r}: {found!r:.80}",
            fix="what DeepSpeed's documentation of its configuration shows",
        )
    return dict(found)


def is_offloaded(config: Mapping[str, Any], key: str) -> bool:
    """Whether ``offload_optimizer`` or ``offload_param`` is to a device; DeepSpeed's own default is none."""
    return _part(_part(config, _ZERO), key).get("device", "none") != "none"


def check_offloading(own: Mapping[str, Any], *, stage: int, offload_optimizer: bool, offload_parameters: bool) -> None:
    """Raise FabricValueError unless options and configuration agree on what is offloaded, and it can be.

    Args:
        own: The user's configuration.
        stage: Of ZeRO.
        offload_optimizer: The strategy's option.
        offload_parameters: The strategy's option.
    """
    options = {"offload_optimizer": offload_optimizer, "offload_parameters": offload_parameters}
    for option, key in _OFFLOADING.items():
        device = _part(_part(own, _ZERO), key).get("device")
        if device not in (None, "none", "cpu"):
            raise FabricValueError(
                "What is offloaded goes into the host's memory; its way onto disks is not in the checkpoints.",
                given=f"{key}={{'device': {device!r}}} in the configuration",
                fix=f"{option}=True, or device: 'cpu'",
            )
        if options[option] and device == "none":
            raise FabricValueError(
                "One says that it is offloaded, the other that it is not.",
                given=f"{option}=True, and {key}={{'device': 'none'}} in the configuration",
                fix="one of the two",
            )
    if stage != 3 and (offload_parameters or is_offloaded(own, "offload_param")):
        told = "offload_parameters=True" if offload_parameters else f"offload_param={own[_ZERO]['offload_param']!r}"
        raise FabricValueError(
            "Parameters are in parts under stage 3 alone, so only there can the parts be offloaded.",
            given=f"stage={stage}, {told}",
            fix="stage=3, or offload_optimizer=True",
        )


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
    zero = {"overlap_comm": False, "memory_efficient_linear": False, **_part(own, _ZERO), "stage": stage}
    for key, is_wanted in (("offload_optimizer", offload_optimizer), ("offload_param", offload_parameters)):
        if is_wanted:
            zero[key] = {"device": "cpu", **_part(zero, key)}
    if stage < 3 and not is_offloaded({_ZERO: zero}, "offload_optimizer"):
        # The norm is the business of clip_gradients(); at each step it would cost a collective.
        zero.setdefault("compute_grad_norm", False)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # of DeepSpeed's own counters; loaders know the batches
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "log_level": "warning",
        **own,
        "gradient_clipping": 0.0,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        _ZERO: zero,
    }
    if torch.bfloat16 in (precision.param_dtype, precision.compute_dtype):
        config["bf16"] = {"enabled": True}
        # Stage 1 with accumulators in float32 would be another optimizer of DeepSpeed's, without these parts.
        wide = stage > 1 and precision.reduce_dtype != torch.bfloat16
        config["data_types"] = {"grad_accum_dtype": "fp32" if wide else "bf16", **_part(own, "data_types")}
        if precision.reduce_dtype == torch.float32:
            config.setdefault("communication_data_type", "fp32")
    return config
