"""The state that an ``IterableDataset`` keeps of itself, used instead of reading again what was read."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from fabric_lite.data.randomness import Apart
from fabric_lite.data.samplers import Pass
from fabric_lite.data.workers import Reads

__all__ = ["Stream", "stream_of"]


class Stream:
    """Where the place in an ``IterableDataset`` is kept, beside the number of batches that were read.

    Without workers that is the dataset's own ``state_dict``. A worker has a copy of the dataset, whose state torch's
    loader cannot fetch; torchdata's ``StatefulDataLoader`` can, so with workers it is that loader's.

    Args:
        get: Returns the state; called between two batches.
        put: Sets it; called before an iterator is made.
        workers: How many worker processes the loader has.
        dataset: Whose state it is, in this process; None with workers.
        loader: Returns the loader that keeps the state; None without workers.
    """

    def __init__(
        self,
        get: Callable[[], Any],
        put: Callable[[Any], Any],
        workers: int,
        dataset: IterableDataset | None = None,
        loader: Callable[[], Any] = lambda: None,
    ) -> None:
        self._get = get
        self._put = put
        self.workers = workers
        self._dataset = dataset
        self._loader = loader

    def state(self, current: Pass | None) -> dict[str, Any] | None:
        """The state after the latest batch of ``current``; None where there is none yet, or its workers are gone."""
        has_ended = current is not None and (current.is_finished or current.has_ended_early)
        if self.workers and (current is None or current.is_finished):
            return None
        state = {"state": self._get(), "has_ended": has_ended}
        if current is not None and current.reads is not None:
            # The loader keeps the place of some steps ago and reads again from there.
            state["reads"] = current.reads.state(_get(state["state"], "_steps_since_snapshot", 0))
        return state

    def reads(self, state: dict[str, Any] | None) -> Reads | None:
        """Counts the batches of each worker, from the beginning or from what :meth:`state` returned."""
        if self.workers == 0:
            return None
        kept = getattr(self._loader(), "snapshot_every_n_steps", 1)
        return Reads(self.workers, kept, (state or {}).get("reads"))

    def worker_of_latest_batch(self) -> int | None:
        """Of torchdata's loader; None where it is not told."""
        return getattr(getattr(self._loader(), "_iterator", None), "_last_yielded_worker_id", None)

    def restore(self, state: dict[str, Any]) -> None:
        """Set what :meth:`state` returned, before the next iterator is made.

        After its end a dataset is at its beginning, or it stays at its end until it is iterated once more.
        """
        self._put(state["state"])
        if state["has_ended"] and self._dataset is not None:
            with Apart(lambda: None):
                is_at_its_beginning = next(iter(self._dataset), self) is not self
            if is_at_its_beginning:
                self._put(state["state"])


def stream_of(loader: DataLoader) -> Stream | None:
    """Where ``loader``, not set up yet, keeps the place in its data; None where only reading again leads there."""
    dataset: Any = loader.dataset
    if not issubclass(type(dataset), IterableDataset) or not _keeps_state(dataset):
        return None
    if loader.num_workers == 0:
        return Stream(dataset.state_dict, dataset.load_state_dict, 0, dataset)
    if not _keeps_state(loader):
        return None
    # Weak, or a loader would hold itself, and its workers, until the garbage collector comes.
    kind: Any = type(loader)
    reference: Any = weakref.ref(loader)
    return Stream(
        lambda: kind.state_dict(reference()),
        lambda state: kind.load_state_dict(reference(), state),
        loader.num_workers,
        loader=reference,
    )


def _keeps_state(owner: Any) -> bool:
    """Whether ``owner`` has a ``state_dict`` that needs no arguments, and can load it."""
    get = getattr(owner, "state_dict", None)
    if not callable(get) or not callable(getattr(owner, "load_state_dict", None)):
        return False
    needed = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    try:
        parameters = inspect.signature(get).parameters.values()
    except ValueError:  # a function in C that does not tell
        return True
    return not any(
        parameter.kind in needed and parameter.default is inspect.Parameter.empty for parameter in parameters
    )


def _get(state: Any, name: str, default: int) -> int:
    return int(state.get(name, default)) if isinstance(state, dict) else default
