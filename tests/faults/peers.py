"""Kill saves of fabric_lite, Lightning Fabric and Accelerate at random moments, and count what is left.

python -m tests.faults.peers                        60 kills of each
python -m tests.faults.peers --trials 20 accelerate  fewer, of those whose name has this word
python -m tests.faults.peers --figures docs/faults.json

Ranks save over an existing checkpoint again and again and are killed, all at once. Then new ranks load what is under
the name: "intact" is one state, whichever; "mixed" has values of two; "lost" can't be loaded. After each kill of which
something is lost or mixed, the next trial starts from nothing. A rank that ends in another way than by the kill, or a
reader that does, is no outcome and ends the run. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.util
import io
import itertools
import random
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.faults.nursery import End, Nursery
from tests.faults.record import merge

WIDTH, LAYERS = 256, 4


class Contender:
    """One way of saving; made anew in each rank."""

    ranks = 1
    needs = "fabric_lite"

    def start(self) -> None:
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def save(self, path: Path) -> None:
        raise AssertionError(path)

    def load(self, path: Path) -> None:
        raise AssertionError(path)

    def fill(self, number: int) -> None:
        """Put one number into everything."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(number)
                momentum = self.optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                momentum.fill_(number)

    def numbers(self, optimizer: bool = True) -> set[float]:
        """The numbers that are in it, on this rank."""
        tensors = [parameter.detach() for parameter in self.model.parameters()]
        if optimizer:
            tensors += [state["momentum_buffer"] for state in self.optimizer.state.values()]
        local = [getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in tensors]
        return {value for tensor in local for value in tensor.unique().tolist()}

    def shard(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (self.ranks,))
        for layer in self.model:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)


class OurFile(Contender):
    name, kind = "fabric_lite: file", "full"

    def start(self) -> None:
        super().start()
        if self.ranks > 1:
            self.shard()

    def save(self, path: Path) -> None:
        from fabric_lite import checkpoint

        checkpoint.save(path, {"model": self.model, "optimizer": self.optimizer}, state_dict_type=self.kind)

    def load(self, path: Path) -> None:
        from fabric_lite import checkpoint

        checkpoint.load(path, {"model": self.model, "optimizer": self.optimizer})


class OurFolder(OurFile):
    name, kind, ranks = "fabric_lite: sharded, 2 ranks", "sharded", 2


class LightningFile(Contender):
    name, needs = "Lightning Fabric: file", "lightning_fabric"

    def start(self) -> None:
        super().start()
        from lightning_fabric import Fabric

        self.fabric = Fabric(accelerator="cpu", devices=1)
        self.wrapped, self.optimizer = self.fabric.setup(self.model, self.optimizer)

    def save(self, path: Path) -> None:
        self.fabric.save(path, {"model": self.wrapped, "optimizer": self.optimizer})

    def load(self, path: Path) -> None:
        self.fabric.load(path, {"model": self.wrapped, "optimizer": self.optimizer})


class LightningFolder(LightningFile):
    name, ranks = "Lightning Fabric: sharded (FSDP2), 2 ranks", 2

    def start(self) -> None:
        Contender.start(self)
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import ModelParallelStrategy

        strategy = ModelParallelStrategy(_parallelized, data_parallel_size=2, tensor_parallel_size=1)
        self.fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        self.fabric.launch()
        self.wrapped = self.fabric.setup_module(self.model)
        self.optimizer = torch.optim.SGD(self.wrapped.parameters(), lr=0.1, momentum=0.9)
        self.optimizer = self.fabric.setup_optimizers(self.optimizer)


class AccelerateFolder(Contender):
    name, needs = "Accelerate: save_state, 1 rank", "accelerate"

    def start(self) -> None:
        super().start()
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=True)
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        # Its wrapper has no setdefault, the optimizer's own state has.
        self.optimizer = self.optimizer.optimizer

    def save(self, path: Path) -> None:
        self.accelerator.save_state(str(path))

    def load(self, path: Path) -> None:
        self.accelerator.load_state(str(path))


class AccelerateSharded(Contender):
    """What ``save_state`` calls for FSDP2; the Accelerator itself has no FSDP on CPU."""

    name, needs, ranks = "Accelerate: sharded (FSDP2), 2 ranks", "accelerate", 2

    def start(self) -> None:
        super().start()
        from accelerate import Accelerator, FullyShardedDataParallelPlugin

        self.accelerator = Accelerator(cpu=True)
        self.plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
        self.shard()

    def save(self, path: Path) -> None:
        from accelerate.utils import save_fsdp_model, save_fsdp_optimizer

        save_fsdp_model(self.plugin, self.accelerator, self.model, str(path))
        save_fsdp_optimizer(self.plugin, self.accelerator, self.optimizer, self.model, str(path))

    def load(self, path: Path) -> None:
        from accelerate.utils import load_fsdp_model, load_fsdp_optimizer

        load_fsdp_model(self.plugin, self.accelerator, self.model, str(path))
        load_fsdp_optimizer(self.plugin, self.accelerator, self.optimizer, self.model, str(path))


CONTENDERS: list[type[Any]] = [
    OurFile, OurFolder, LightningFile, LightningFolder, AccelerateFolder, AccelerateSharded
]  # fmt: skip


def _parallelized(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.children():
        fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def save_for_ever(kind: type[Any], path: Path, first: int, ready: Path, count: int | None = None) -> float:
    """Save one state after the other; the seconds of the last save, where there is a last one."""
    with _quiet():
        contender = kind()
        contender.start()
        for number in itertools.count(first):
            contender.fill(number)
            began = time.monotonic()
            contender.save(path)
            seconds = time.monotonic() - began
            ready.touch()
            if count is not None and number == first + count - 1:
                break
    return seconds


def numbers_in(kind: type[Any], path: Path) -> tuple[set[float] | None, str]:
    """The numbers that loading brings; None, and the error, if it fails."""
    with _quiet():
        contender = kind()
        contender.start()
        contender.fill(-1)
        try:
            contender.load(path)
        except BaseException as error:  # that of torch.distributed.checkpoint is no Exception
            return None, f"{type(error).__name__}: {error}"[:200]
        return contender.numbers(), ""


@contextlib.contextmanager
def _quiet() -> Any:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def outcome(found: list[Any]) -> str:
    """What a checkpoint is, by what each rank found in it."""
    if any(end.value is None or end.value[0] is None for end in found):
        return "lost"
    numbers = {number for end in found for number in end.value[0]}
    return "intact" if len(numbers) == 1 and numbers != {-1.0} else "mixed"


def check(ends: list[End], code: int) -> None:
    """Raise unless all ranks have ended with this code: an error of a save is no kill, and one of a reader no loss."""
    codes = [end.code for end in ends]
    if codes != [code] * len(ends):
        raise RuntimeError(f"the ranks ended with {codes}, not with {code}")


def killed(kind: type[Any], trials: int, nursery: Nursery) -> dict[str, int]:
    """How often the only checkpoint was intact, mixed or lost."""
    moments, counts = random.Random(0), collections.Counter[str](trials=0, intact=0, mixed=0, lost=0)
    with tempfile.TemporaryDirectory(prefix="fabric_lite_peers_") as folder:
        ready, path = Path(folder) / "ready", Path(folder) / "saves" / "a"
        path.parent.mkdir()
        # The third save of a rank: what is imported and allocated once is not a save's.
        ends = nursery.run(save_for_ever, kind, path, 1, ready, 3, ranks=kind.ranks)
        check(ends, 0)
        seconds = max(end.value for end in ends)
        for trial in range(trials):
            ready.unlink(missing_ok=True)
            delay = moments.uniform(0.0, 2 * seconds)
            first = 1000 * (trial + 1)
            check(nursery.run(save_for_ever, kind, path, first, ready, ranks=kind.ranks, kill=(ready, delay)), -9)
            assert ready.exists(), f"{kind.name} was killed before its first save had ended"
            found = nursery.run(numbers_in, kind, path, ranks=kind.ranks)
            check(found, 0)
            result = outcome(found)
            counts.update([result, "trials"])
            if result != "intact":
                print(f"  {result}: {[end.value for end in found]}", flush=True)
                shutil.rmtree(path.parent)
                path.parent.mkdir()
    return dict(counts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only those whose name has one of these")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--figures", type=Path, help="merge the counts into this JSON file")
    arguments = parser.parse_args(argv)
    words = arguments.words
    kinds = [kind for kind in CONTENDERS if not words or any(word in kind.name for word in words)]
    missing = {kind.needs for kind in kinds if importlib.util.find_spec(kind.needs) is None}
    for name in sorted(missing):
        print(f"{name} is not installed: left out")
    kinds = [kind for kind in kinds if kind.needs not in missing]
    modules = {"torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp"}
    preload = sorted(modules | {kind.needs for kind in kinds})
    rows = {}
    with Nursery(preload) as nursery:
        for kind in kinds:
            rows[f"random SIGKILL, only checkpoint: {kind.name}"] = counts = killed(kind, arguments.trials, nursery)
            print(f"{kind.name}: {', '.join(f'{key} {value}' for key, value in counts.items())}", flush=True)
    if arguments.figures is not None:
        merge(arguments.figures, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
