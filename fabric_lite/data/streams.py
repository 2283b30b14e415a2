"""The state that an ``IterableDataset`` keeps of itself, used instead of reading again what was read."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

__all__ = ["Stream", "stream_of"]


class Stream:
    """Where the place in an ``IterableDataset`` is kept, beside the number of batches that were read.

    Without workers that is the dataset's own ``state_dict``. A worker has a copy of the dataset, whose state torch's
    loader cannot fetch; torchdata's ``StatefulDataLoader`` can, so with workers it is that loader's.

    Args:
        get: Returns the state; called between two batches.
        set: Sets it; called before an iterator is made.
        workers: How many worker processes the loader has.
        has_none_between_epochs: Whether nothing is left of an epoch that has ended, since its workers are gone.
    """

    def __init__(
        self,
        get: Callable[[], Any],
        set: Callable[[Any], Any],
        workers: int,
        has_none_between_epochs: bool = False,
    ) -> None:
        self.get = get
        self.set = set
        self.workers = workers
        self.has_none_between_epochs = has_none_between_epochs


def stream_of(loader: DataLoader) -> Stream | None:
    """Where ``loader``, not set up yet, keeps the place in its data; None where only reading again leads there."""
    dataset: Any = loader.dataset
    if not issubclass(type(dataset), IterableDataset) or not _keeps_state(dataset):
        return None
    if loader.num_workers == 0:
        return Stream(dataset.state_dict, dataset.load_state_dict, 0)
    if not _keeps_state(loader):
        return None
    # Weak, or a loader would hold itself, and its workers, until the garbage collector comes.
    kind: Any = type(loader)
    reference: Any = weakref.ref(loader)
    return Stream(
        lambda: kind.state_dict(reference()),
        lambda state: kind.load_state_dict(reference(), state),
        loader.num_workers,
        not loader.persistent_workers,
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
    return not any(
        parameter.kind in needed and parameter.default is inspect.Parameter.empty
        for parameter in inspect.signature(get).parameters.values()
    )
