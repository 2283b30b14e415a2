"""What a Trainer can be asked for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from fabric_lite import Fabric, FabricValueError
from fabric_lite.errors import unknown_arguments

__all__ = ["CLIPS", "check_options"]

CLIPS = {"norm": "max_norm", "value": "clip_val"}  # what fabric.clip_gradients calls them
_LEAST = {
    "max_epochs": -1,
    "max_steps": -1,
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 1,
    "fast_dev_run": 0,
}
# What Lightning's Trainer has, or had.
_INSTEAD = {
    "gpus": 'accelerator="gpu", devices=',
    "loggers": "logger",
    "resume_from_checkpoint": "fit(ckpt_path=)",
    "deterministic": "fabric_lite.seed_everything(seed, deterministic=True)",
    "benchmark": "torch.backends.cudnn.benchmark",
    "profiler": "fabric_lite.profile(trainer.fabric)",
    "num_sanity_val_steps": "leave it out, there are none",
    "enable_model_summary": "leave it out, there is none",
    "min_epochs": "a larger patience of EarlyStopping",
    "min_steps": "a larger patience of EarlyStopping",
    "max_time": "a callback that sets trainer.should_stop, on all ranks alike",
    "overfit_batches": "limit_train_batches=, and a loader that does not shuffle",
    "reload_dataloaders_every_n_epochs": "one loader whose sampler or data has set_epoch",
    "inference_mode": "leave it out, evaluation is under torch.no_grad()",
    "detect_anomaly": "torch.autograd.set_detect_anomaly(True)",
    "sync_batchnorm": "torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)",
}
_SWITCHES = ("enable_checkpointing", "enable_progress_bar", "use_distributed_sampler")
_LIMITS = tuple(f"limit_{stage}_batches" for stage in ("train", "val", "test", "predict"))


def check_options(given: Mapping[str, Any], fabric_options: Mapping[str, Any]) -> None:
    """Raise for arguments of a Trainer that mean nothing.

    Args:
        given: Its own, by name.
        fabric_options: Those that it hands on.

    Raises:
        FabricTypeError: It has no argument of this name, or a value has the wrong type.
        FabricValueError: A value is not allowed.
    """
    known = inspect.signature(Fabric).parameters
    unknown = [name for name in fabric_options if name not in known or name in ("callbacks", "loggers")]
    if unknown:
        raise unknown_arguments("Trainer", unknown, [*given, *known], _INSTEAD)
    wrong = {
        name: f"a whole number, at least {least}" for name, least in _LEAST.items() if _is_wrong(given[name], least)
    }
    parts = "a whole number of batches, or a part from 0.0 to 1.0"
    wrong |= {name: parts for name in (*_LIMITS, "val_check_interval") if _is_wrong(given[name], 0, most=1.0)}
    wrong |= {name: "True or False" for name in _SWITCHES if type(given[name]) is not bool}
    if given["val_check_interval"] == 0:
        wrong["val_check_interval"] = "a number above 0"
    if not isinstance(given["gradient_clip_val"] or 0, (int, float)) or (given["gradient_clip_val"] or 0) < 0:
        wrong["gradient_clip_val"] = "a number, at least 0"
    if given["gradient_clip_algorithm"] not in list(CLIPS):
        wrong["gradient_clip_algorithm"] = " or ".join(f'"{name}"' for name in CLIPS)
    if wrong:
        raise FabricValueError(
            "A Trainer can't do this.",
            given=", ".join(f"{name}={given[name]!r}" for name in wrong),
            fix="; ".join(f"{name}: {fix}" for name, fix in wrong.items()),
        )


def _is_wrong(value: Any, least: int, most: float | None = None) -> bool:
    """Whether it is no whole number from ``least`` on, nor, where there is a ``most``, a float up to that."""
    if most is not None and type(value) is float:
        return not least <= value <= most
    return type(value) is not int or value < least
