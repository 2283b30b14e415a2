"""The process in which a simulated rank runs: ``python -m fabric_lite.bench.simulated_rank ORDER ANSWER``.

It runs the user's script as it is, in a world of which this rank alone exists, and writes down what was seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fabric_lite import run_config
from fabric_lite.activation_checkpointing import checkpoint_activations
from fabric_lite.bench.faking import Faking
from fabric_lite.bench.torch_private import join_fake_group
from fabric_lite.bench.tracking import Tracker
from fabric_lite.checkpointing import Checkpointing
from fabric_lite.checkpoints import Checkpoints
from fabric_lite.errors import FabricError, FabricValueError
from fabric_lite.fabric import Fabric
from fabric_lite.launch.failure import describe_exception
from fabric_lite.launch.process_tree import die_with_parent
from fabric_lite.strategies.blocks import choose_blocks

__all__ = ["main"]


class _Enough(BaseException):
    """Ends the script after its last step; no Exception, so that the script does not catch it."""


def main(order_path: str, answer_path: str, parent: str) -> None:
    """Run what the order says, and write the answer; both are JSON. It ends with the process of that number."""
    die_with_parent(int(parent))
    order = json.loads(Path(order_path).read_text(encoding="utf-8"))
    answer = _simulate(order)
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


def _simulate(order: dict[str, Any]) -> dict[str, Any]:
    run_config.install(
        run_config.RunConfig(accelerator="cpu", strategy=order["strategy"], precision=order["precision"])
    )
    if order["world_size"] > 1:
        join_fake_group(0, order["world_size"])
    faking = Faking()
    tracker = Tracker(faking.fake_mode, order["counts_host"], order["world_size"] // order["nodes"])
    notices: list[str] = []
    offloading: list[bool] = []
    with (
        _nothing_written(),
        _loaders_of_any_size(order["batch_size"], notices),
        _models_set_up(tracker, order["checkpoints_activations"], offloading),
        faking,
        tracker,
        _steps_ended(tracker, order["steps"]),
    ):
        failure = _run(order["script"], order["arguments"])
    if faking.first_read is not None:
        notices.append(
            f"the script reads numbers of tensors, first at {faking.first_read}: all of them are 1 here, so where it "
            "branches on them a real run may do something else"
        )
    return {
        "failure": failure,
        "notices": notices,
        "offloads": any(offloading),
        "peak": tracker.peak,
        "parts": tracker.peak_parts(),
        "steps": [dataclasses.asdict(step) for step in tracker.steps],
    }


def _run(script: str, arguments: list[str]) -> dict[str, str | None] | None:
    """Run the script as ``python script`` would; what went wrong in one line, and what its error says to try."""
    # Torch and Fabric ask whether two tensors are one, which the addresses of fake ones answer too.
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    sys.argv[:] = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except _Enough:
        return None
    except SystemExit as end:
        return {"cause": f"the script ended with {end.code!r}, {_place_of(end)}", "fix": None} if end.code else None
    except BaseException as error:
        traceback.print_exc()
        message, _, fix = str(error).partition("\n  Try: ") if isinstance(error, FabricError) else (str(error), "", "")
        cause = ": ".join(filter(None, [type(error).__name__, " ".join(message.split())]))
        return {"cause": f"{cause}, {_place_of(error)}", "fix": fix or None}
    return None


def _place_of(error: BaseException) -> str:
    """The user's line, as rows of a benchmark name it."""
    location = describe_exception(error)["message"]["extraInfo"]["location"]
    return f"at {os.path.basename(location['file'])}:{location['line']}"


@contextlib.contextmanager
def _steps_ended(tracker: Tracker, steps: int) -> Iterator[None]:
    """Count the steps of the first optimizer that makes one, as Fabric does, and end the script after the last."""
    first: list[torch.optim.Optimizer] = []

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        first.extend([] if first else [optimizer])
        if optimizer is first[0]:
            tracker.end_step()
            if len(tracker.steps) == steps:
                raise _Enough

    hook = register_optimizer_step_post_hook(after_step)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _nothing_written() -> Iterator[None]:
    """Saves and logs do nothing: there are no numbers to write, and the paths are those of the user's real runs."""

    save = torch.save

    def nothing(*_: Any, **__: Any) -> None:
        pass

    def save_in_memory(obj: Any, f: Any, *args: Any, **options: Any) -> None:
        if isinstance(f, io.BytesIO):  # how tensors are pickled, to go to other ranks or processes
            save(obj, f, *args, **options)

    with (
        mock.patch.object(Checkpointing, "save", nothing),
        mock.patch.object(Fabric, "log_dict", nothing),
        mock.patch.object(Fabric, "log_hyperparams", nothing),
        mock.patch.object(Checkpoints, "_write_record", nothing),
        mock.patch.object(torch, "save", save_in_memory),
    ):
        yield


@contextlib.contextmanager
def _loaders_of_any_size(batch_size: int | None, notices: list[str]) -> Iterator[None]:
    """Loaders have this batch size; one whose data is too little for so many ranks repeats it, and a notice says so."""
    set_up = Fabric.setup_dataloaders

    def setup_dataloaders(fabric: Fabric, *loaders: Any, **options: Any) -> Any:
        for loader in loaders:
            if batch_size is not None:
                _set_batch_size(loader, batch_size)
        try:
            return set_up(fabric, *loaders, **options)
        except FabricValueError as error:
            if options.get("pad") is not False:
                raise
            notices.append(f"the script itself would fail: {' '.join(str(error).split())}")
            return set_up(fabric, *loaders, **{**options, "pad": None})

    with mock.patch.object(Fabric, "setup_dataloaders", setup_dataloaders):
        yield


@contextlib.contextmanager
def _models_set_up(tracker: Tracker, checkpoints_activations: bool, offloading: list[bool]) -> Iterator[None]:
    """Models arrive on the device when they are set up; if asked, their repeated layers keep no activations.

    ``offloading`` gets for each whether its strategy would leave the parameters to the host.
    """
    set_up = Fabric.setup_module

    def setup_module(fabric: Fabric, module: nn.Module, *args: Any, **options: Any) -> Any:
        if checkpoints_activations:
            blocks = set(choose_blocks(module, None))
            checkpoint_activations(module, lambda child: child in blocks)
        module = set_up(fabric, module, *args, **options)
        tracker.arrive()
        tracker.label([*module.parameters(), *module.buffers()], "parameters")  # copies and conversions of them too
        offloading.append(bool(getattr(fabric.strategy, "cpu_offload", False)))
        return module

    with mock.patch.object(Fabric, "setup_module", setup_module):
        yield


def _set_batch_size(loader: Any, batch_size: int) -> None:
    """Change the size of a loader's batches, which torch forbids by assignment."""
    sampler = getattr(loader, "batch_sampler", None)
    if getattr(loader, "batch_size", None) is not None and sampler is not None:
        loader.__dict__["batch_size"] = sampler.batch_size = batch_size


if __name__ == "__main__":
    main(*sys.argv[1:])
