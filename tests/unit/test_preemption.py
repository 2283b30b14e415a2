"""Steps are counted, requests to stop are taken, and the ranks agree on a step."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import random
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import HashStore, PrefixStore

from fabric_lite import Fabric
from fabric_lite.preemption import agree
from fabric_lite.steps import Steps


class Owner:
    """Stands for a Fabric."""


class Doubling(torch.optim.SGD):
    """An optimizer whose step fires the hooks of its base class as well."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Failing(torch.optim.SGD):
    """An optimizer whose step raises when it is told to."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        if self.fails:
            raise ValueError("this step fails")


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    fabric = Fabric(accelerator="cpu", devices=1)
    yield fabric
    fabric.close()


def model_and(kind: type[torch.optim.SGD] = torch.optim.SGD) -> tuple[nn.Module, torch.optim.SGD]:
    model = nn.Linear(2, 1)
    return model, kind(model.parameters(), lr=0.1)


# Steps


def test_steps_are_those_of_the_first_optimizer(fabric: Fabric) -> None:
    _, first_optimizer = fabric.setup(*model_and())
    _, second_optimizer = fabric.setup(*model_and())
    for _ in range(3):
        first_optimizer.step()
    second_optimizer.step()
    assert fabric.steps == 3
    fabric.release(first_optimizer)
    first_optimizer.step()
    assert fabric.steps == 3, "it is not set up any more"
    _, third_optimizer = fabric.setup(*model_and())
    third_optimizer.step()
    second_optimizer.step()
    assert fabric.steps == 4, "the run goes on with the next optimizer that is set up"


def test_a_step_that_calls_the_step_of_its_base_class_is_one(fabric: Fabric) -> None:
    model_and()  # whose class now has a step with hooks of its own
    _, optimizer = fabric.setup(*model_and(Doubling))
    _, failing = model_and(Failing)
    for _ in range(3):
        optimizer.step()
    assert fabric.steps == 3
    fabric.release(optimizer)
    fabric.setup_optimizers(failing)
    failing.fails = True
    with pytest.raises(ValueError, match="this step fails"):
        failing.step()
    failing.fails = False
    failing.step()
    assert fabric.steps == 4, "a step that raised was not completed, and does not stand in the next one's way"


def test_a_step_that_the_loss_scaler_skips_counts() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="16-mixed")
    model, optimizer = fabric.setup(*model_and())
    before = model.weight.clone()
    fabric.backward(model(torch.ones(1, 2)).sum() * torch.inf)
    optimizer.step()
    assert torch.equal(model.weight, before)
    assert fabric.steps == 1
    fabric.close()


def test_a_callback_after_a_step_sees_it_counted() -> None:
    seen = []

    class Callback:
        def on_after_optimizer_step(self, optimizer: Any) -> None:
            seen.append(fabric.steps)

    fabric = Fabric(accelerator="cpu", devices=1, callbacks=Callback())
    _, optimizer = fabric.setup(*model_and())
    optimizer.step()
    optimizer.step()
    assert seen == [1, 2]
    fabric.close()


def test_steps_are_part_of_a_checkpoint(fabric: Fabric, tmp_path: Path) -> None:
    _, optimizer = fabric.setup(*model_and())
    for _ in range(5):
        optimizer.step()
    fabric.save(tmp_path / "a.ckpt", {"fabric": fabric})
    other = Fabric(accelerator="cpu", devices=1)
    other.load(tmp_path / "a.ckpt", {"fabric": other})
    assert other.steps == 5
    _, optimizer = other.setup(*model_and())
    optimizer.step()
    assert other.steps == 6
    old = {key: value for key, value in other.state_dict().items() if key != "steps"}
    other.load_state_dict(old)  # of a version that did not count
    assert other.steps == 6
    other.close()


# The agreement


class Rank(threading.Thread):
    """A rank: a loop that steps, and reads whether to stop after each step.

    Args:
        lockstep: Waits for the loops of all other ranks, as a collective does.
        asks: After how many steps of this rank the request starts, if it is the one that is asked.
    """

    def __init__(self, number: int, store: Any, ranks: int, lockstep: Callable[[], Any], pause: Any) -> None:
        super().__init__(daemon=True)
        self.number, self.store, self.ranks, self.lockstep, self.pause = number, store, ranks, lockstep, pause
        self.owner = Owner()
        self.steps = Steps(self.owner)
        self.count = self.steps.follow(model_and()[1])
        self.target: int | None = None
        self.stopped_at: int | None = None

    def answer(self) -> None:
        """What the thread beside the loop does."""
        clock = threading.Event()

        def wait(seconds: float) -> bool:
            clock.wait(seconds / 20)
            return True

        self.target = agree(PrefixStore("p", self.store), self.steps, self.number, self.ranks, wait)
        self.steps.let_go()

    def run(self) -> None:
        assert self.count is not None
        for _ in range(10_000):
            self.pause(self.number)
            self.lockstep()
            self.count()
            if self.target is not None and self.steps.completed >= self.target:
                self.stopped_at = self.steps.completed
                return


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("seed", range(6))
def test_ranks_that_answer_at_any_moment_stop_at_one_step(ranks: int, seed: int) -> None:
    store, moments = HashStore(), random.Random(seed)
    barrier = threading.Barrier(ranks)
    left = threading.Event()
    delays = [moments.randrange(3) * 1e-4 for _ in range(ranks)]
    threads = [
        Rank(number, store, ranks, lambda: barrier.wait(30), lambda number: left.wait(delays[number]))
        for number in range(ranks)
    ]
    for thread in threads:
        thread.start()
    answers = [threading.Thread(target=thread.answer) for thread in threads]
    moments.shuffle(answers)
    for answer in answers:
        # The others' loops go on meanwhile, until they are held at their own limit.
        left.wait(moments.random() * 2e-3)
        answer.start()
    for thread in [*answers, *threads]:
        thread.join(30)
    targets = {thread.target for thread in threads}
    assert len(targets) == 1
    assert targets == {thread.stopped_at for thread in threads}


class Unblocked(Steps):
    """Steps that say that the loop waits, instead of waiting."""

    is_held = False

    def _wait(self) -> None:
        self.is_held = True

    def let_go(self) -> None:
        super().let_go()
        self.is_held = False


MOVES = list(itertools.product(("step", "answer", "learn"), (0, 1)))


@pytest.mark.parametrize("length", [5, pytest.param(7, marks=pytest.mark.full)])
def test_the_agreement_holds_for_every_order_of_steps_and_answers(length: int) -> None:
    """Two loops, at most one step apart as a collective keeps them, and their threads: every order of their moves."""
    known = [play(order) for order in itertools.product(MOVES, repeat=length)]
    assert {1, 2} <= {target for targets in known for target in targets if target is not None}


def play(order: tuple[tuple[str, int], ...]) -> list[int | None]:
    """Make the moves that can be made, finish the run, and compare what both ranks read after each step."""
    owner, store = Owner(), HashStore()
    both = [Unblocked(owner), Unblocked(owner)]
    counts = [steps.follow(model_optimizer) for steps in both]
    targets: list[int | None] = [None, None]
    answered: set[int] = set()
    read: list[dict[int, set[bool]]] = [{0: {False}}, {0: {False}}]

    def move(kind: str, rank: int) -> None:
        steps, count = both[rank], counts[rank]
        assert count is not None
        if kind == "step" and not steps.is_held and steps.completed <= both[1 - rank].completed:
            count()
        elif kind == "answer" and rank not in answered:
            answered.add(rank)
            agree(store, steps, rank, 2, lambda _: False)
        elif kind == "learn" and rank in answered and store.check(["target"]):
            targets[rank] = int(store.get("target"))
            steps.let_go()
        for number in (0, 1):
            if not both[number].is_held:  # a loop that waits reads nothing
                completed, target = both[number].completed, targets[number]
                read[number].setdefault(completed, set()).add(target is not None and completed >= target)

    for kind, rank in [*order, *MOVES[2:], *MOVES[4:], *(MOVES[:2] * 6)]:
        move(kind, rank)
    assert targets[0] == targets[1] is not None, order
    for step in read[0].keys() & read[1].keys():
        assert read[0][step] == read[1][step] == {step >= targets[0]}, order  # type: ignore[operator]
    return targets


model_optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)


# Signals


SCRIPT = """
import os, signal, sys
import torch
from torch import nn
from fabric_lite import EXIT_PREEMPTED, Fabric

fabric = Fabric(accelerator="cpu", devices=1)
model = nn.Linear(2, 1)
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))

def told(*, times=1, number=signal.SIGTERM):
    for _ in range(times):
        os.kill(os.getpid(), number)
"""


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a script ended, and what it printed."""

    returncode: int | None
    stdout: str
    stderr: str


def execute(source: str, folder: Path) -> None:
    with (folder / "stdout").open("w") as sys.stdout, (folder / "stderr").open("w") as sys.stderr:
        exec(source, {"__name__": "__main__"})


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str], Finished]:
    """``run(source)``: run a script in a process of its own that has torch already."""

    def run(source: str) -> Finished:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch._dynamo", "fabric_lite.testing"])
        process = context.Process(target=execute, args=(SCRIPT + textwrap.dedent(source), tmp_path))
        process.start()
        process.join(60)
        return Finished(process.exitcode, *((tmp_path / name).read_text() for name in ("stdout", "stderr")))

    return run


Run = Callable[[str], Finished]


def test_a_script_that_never_asks_dies_of_a_signal(run: Run) -> None:
    assert run("optimizer.step(); told()").returncode == -signal.SIGTERM


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_process_stops_after_the_step_that_it_is_in(run: Run, name: str) -> None:
    finished = run(f"""
    print(fabric.should_stop)
    optimizer.step()
    told(number=signal.{name}, times=2)
    print(fabric.should_stop)
    optimizer.step()
    print(fabric.should_stop, fabric.should_stop, fabric.steps)
    raise SystemExit(EXIT_PREEMPTED)
    """)
    assert finished.returncode == 75
    assert finished.stdout.split("\n") == ["False", "False", "True True 2", ""]
    assert finished.stderr == f"fabric_lite: asked to stop by {name}: stopping after step 2\n"


def test_the_users_own_handler_is_called_too_and_put_back(run: Run) -> None:
    finished = run("""
    mine = lambda number, frame: print("mine", number)
    signal.signal(signal.SIGTERM, mine)
    assert not fabric.should_stop
    assert signal.getsignal(signal.SIGTERM) is not mine
    told()
    optimizer.step()
    print(fabric.should_stop)
    fabric.close()
    assert signal.getsignal(signal.SIGTERM) is mine
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1
    """)
    assert (finished.returncode, finished.stdout) == (0, "mine 15\nTrue\n"), finished.stderr


def test_the_same_signal_again_later_ends_the_process(run: Run) -> None:
    finished = run("""
    from fabric_lite import signals
    assert not fabric.should_stop
    told(times=3)
    optimizer.step()
    assert fabric.should_stop
    told(number=signal.SIGUSR1)
    print("still here", flush=True)
    signals.REPEAT_SECONDS = 0.0
    told()
    print("not reached")
    """)
    assert finished.returncode == -signal.SIGTERM
    assert finished.stdout == "still here\n"


def test_children_of_a_process_die_of_a_signal_of_their_own(run: Run) -> None:
    finished = run("""
    assert not fabric.should_stop
    child = os.fork()
    if not child:
        told()
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
    optimizer.step()
    print(fabric.should_stop)
    """)
    assert finished.stdout == "15\nFalse\n", finished.stderr


def test_workers_of_a_loader_live_on_when_all_processes_get_the_signal(run: Run) -> None:
    finished = run("""
    from torch.utils.data import DataLoader
    assert not fabric.should_stop
    data = torch.arange(40.0).reshape(20, 2)
    loader = DataLoader(data, num_workers=2, batch_size=1, multiprocessing_context="fork")
    batches = iter(fabric.setup_dataloaders(loader))
    read = [next(batches), next(batches)]  # each worker has begun
    for worker in batches._workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGUSR1)
    told()
    read += batches
    optimizer.step()
    print(len(read), fabric.should_stop)
    """)
    assert (finished.returncode, finished.stdout) == (0, "20 True\n"), finished.stderr


def test_without_steps_a_signal_keeps_its_meaning(run: Run) -> None:
    finished = run("""
    plain = Fabric(accelerator="cpu", devices=1)
    print(plain.should_stop, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
    """)
    assert finished.stdout == "False True\n", finished.stderr


def test_a_fabric_that_nobody_holds_any_more_takes_no_signal(run: Run) -> None:
    finished = run("""
    import gc
    assert not fabric.should_stop
    del fabric, model, optimizer
    gc.collect()
    told()
    """)
    assert finished.returncode == -signal.SIGTERM, finished.stderr


def test_two_fabrics_of_a_process_stop_alike(run: Run) -> None:
    finished = run("""
    other = Fabric(accelerator="cpu", devices=1)
    second = nn.Linear(2, 1)
    second, its_optimizer = other.setup(second, torch.optim.SGD(second.parameters(), lr=0.1))
    print(fabric.should_stop, other.should_stop)
    fabric.close()
    told()
    its_optimizer.step()
    print(other.should_stop)
    other.close()
    print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
    """)
    assert finished.stdout == "False False\nTrue\nTrue\n", finished.stderr
