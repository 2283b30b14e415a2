"""What the first steps of a script compute, recorded, so that another run can be held against it.

Dropout is off in these steps and they begin with the same weights in every run. The one run that is the reference is a
single process, which is fed the batches that the ranks of another run were fed, put together.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_lite import checkpoint
from fabric_lite.bench.files import record_file
from fabric_lite.parameters import mesh_of
from fabric_lite.trees import leaves, map_leaves

__all__ = ["Witness"]


class Witness:
    """Records the first steps of a rank; every rank has one.

    Args:
        folder: Where the record goes.
        steps: How many there are.
        initial_weights: A checkpoint that the models begin with; made of this run's models where there is none yet.
        feed: The folder of the records whose batches these steps get instead of their own; None: their own.
    """

    def __init__(self, folder: Path, steps: int, initial_weights: str | None, feed: str | None) -> None:
        self._folder, self._steps, self._initial, self._feed = folder, steps, initial_weights, feed
        self._fabric: Any = None
        self._modules: list[nn.Module] = []
        self._dropout: list[tuple[nn.Module, str, float]] = []
        self._is_recording = True
        self._random: list[torch.Tensor] | None = None
        self._fed: dict[int, Iterator[list[torch.Tensor]]] = {}
        self._before: dict[str, torch.Tensor] = {}
        self._losses: list[list[float]] = [[]]
        self._gradients: list[dict[str, torch.Tensor]] = []
        self._batches: dict[int, list[list[Any]]] = {}
        self._reasons: list[str] = []

    def begin(self, fabric: Any) -> None:
        """Called when the Fabric sets the first object up."""
        self._fabric = fabric

    def module_set_up(self, module: nn.Module) -> None:
        """Give the module the weights of the run that came first, and turn its dropout off. Communicates."""
        number = len(self._modules)
        self._modules.append(module)
        if self._initial is not None:
            path = f"{self._initial}.{number}"
            with torch.no_grad():
                if os.path.exists(path):
                    checkpoint.load(path, {"module": module})
                else:
                    checkpoint.save(path, {"module": module})
        self._turn_dropout_off(module)
        several = self._fabric.world_size > 1
        if several and any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
            self._reasons.append("batch normalization sees each rank's batch alone")
        self._before |= self._kept({f"{number}.{name}": value for name, value in module.named_parameters()})

    def seeing_losses(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """``fabric.backward`` that notes the loss first, and whether the steps have drawn random numbers."""

        def noting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._is_recording:
                self._losses[-1].append(float(tensor.detach().float().mean()))
                if self._draws():
                    self._note("the steps draw random numbers")
            return backward(tensor, *args, **kwargs)

        return noting

    def seeing_batches(self, fabric: Any, number: int, advance: Callable[[], Any]) -> Callable[[], Any]:
        """What returns the next batch of loader ``number``, noting it or replacing what is in it."""
        if self._feed is not None and number not in self._fed:  # one for all iterators over the loader
            self._fed[number] = _put_together(Path(self._feed), number)

        def noting() -> Any:
            batch = advance()
            if not self._is_recording:
                return batch
            if self._feed is not None:
                batch = _replaced(batch, next(self._fed[number]), fabric.device)
            else:
                kept = [leaf.detach().cpu().clone() for leaf in leaves(batch) if isinstance(leaf, torch.Tensor)]
                self._batches.setdefault(number, []).append(kept)
            self._random = _random_states(fabric.device)
            return batch

        return noting

    def before_step(self, optimizer: Optimizer) -> None:
        """Note the gradients that the step will use, whole. Communicates where they are sharded."""
        if not self._is_recording:
            return
        mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        gradients = {
            name: parameter.grad
            for name, parameter in self._named_parameters()
            if id(parameter) in mine and parameter.grad is not None
        }
        if not gradients:
            self._note(
                "a step had no gradients when it began: the loss scaler skipped it, a closure computes them, or only "
                "an engine sees them"
            )
        self._gradients.append(self._kept(gradients))

    def after_step(self, done: int) -> None:
        """A step has ended, the ``done``-th; the last one writes the record."""
        if not self._is_recording:
            return
        if done < self._steps:
            self._losses.append([])
            return
        self._is_recording = False
        sums: dict[str, float] = {}
        after = self._kept(dict(self._named_parameters()), sums)
        if not self._batches and self._feed is None:
            self._note("no batch came from a loader that went through setup_dataloaders()")
        record = {
            "data_rank": self._fabric._placement.data_rank,
            "batches": {str(number): batches for number, batches in self._batches.items()},
            "losses": self._losses,
            "gradients": self._gradients,
            "changes": {name: after[name] - self._before[name] for name in after},
            "sums": sums,
            "fed": _digest(self._batches),
            "reasons": self._reasons,
        }
        torch.save(record, record_file(self._folder, self._fabric.global_rank))
        self._gradients, self._before, self._batches = [], {}, {}
        for module, name, probability in self._dropout:
            setattr(module, name, probability)

    def _kept(
        self, tensors: Mapping[str, torch.Tensor], sums: dict[str, float] | None = None
    ) -> dict[str, torch.Tensor]:
        """Copies on the CPU, in full, on rank 0 alone; ``sums`` gets what all ranks can be compared by.

        Every rank that holds a part calls. One after the other, so that no rank holds all of a sharded model.
        """
        kept = {}
        for name, tensor in tensors.items():
            whole = _whole(tensor)
            if sums is not None:
                sums[name] = float(whole.double().sum())
            if self._fabric.global_rank == 0:
                kept[name] = whole.cpu().clone()
        return kept

    def _draws(self) -> bool:
        """Whether random numbers were drawn since the batch came."""
        before, now = self._random, _random_states(self._fabric.device)
        return before is not None and not all(map(torch.equal, before, now))

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for number, module in enumerate(self._modules):
            for name, parameter in module.named_parameters():
                yield f"{number}.{name}", parameter

    def _turn_dropout_off(self, module: nn.Module) -> None:
        for part in module.modules():
            kinds = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase)
            name = "p" if isinstance(part, nn.modules.dropout._DropoutNd) else "dropout"
            if isinstance(part, kinds) and getattr(part, name):
                self._dropout.append((part, name, getattr(part, name)))
                setattr(part, name, 0.0)

    def _note(self, reason: str) -> None:
        if reason not in self._reasons:
            self._reasons.append(reason)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in full; every rank that holds a part calls."""
    whole: Any = tensor.detach() if mesh_of(tensor) is None else tensor.detach().full_tensor()  # type: ignore[attr-defined]
    full: torch.Tensor = whole
    return full


def _random_states(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type != "cuda" else [*states, torch.cuda.get_rng_state(device)]


def _digest(batches: Mapping[int, list[list[torch.Tensor]]]) -> str:
    """Of what a rank was fed: runs that draw their data by chance were fed something else."""
    digest = hashlib.sha256()
    for number in sorted(batches):
        for tensor in (tensor for batch in batches[number] for tensor in batch):
            digest.update(f"{number} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _put_together(folder: Path, number: int) -> Iterator[list[torch.Tensor]]:
    """The batches of loader ``number``, by their tensors, each of all ranks that had different ones."""
    records = [torch.load(path, weights_only=True) for path in sorted(folder.glob("record_*.pt"))]
    shares = {record["data_rank"]: record["batches"].get(str(number), []) for record in records}
    for of_ranks in zip(*(shares[rank] for rank in sorted(shares)), strict=True):
        yield [torch.cat(parts) if parts[0].dim() else parts[0] for parts in zip(*of_ranks, strict=True)]


def _replaced(batch: Any, tensors: list[torch.Tensor], device: torch.device) -> Any:
    rest = iter(tensors)
    return map_leaves(lambda leaf: next(rest).to(device) if isinstance(leaf, torch.Tensor) else leaf, batch)
