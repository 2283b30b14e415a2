"""What a disk may hold after a power cut, worked out from a record of file operations.

The rules are those that POSIX leaves to a program, at their worst: the bytes of a file are safe when that file has been
synced, a name in a folder when that folder has been synced; everything else may be there or not, each change on its
own. A rename, and an exchange of two names, is one change.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.faults.operations import Operation

__all__ = ["Disk", "written_out"]

# A state of the disk: the content of each file by its path; None for a folder.
State = dict[str, bytes | None]


@dataclasses.dataclass(eq=False)
class _File:
    live: bytes = b""
    safe: bytes = b""


@dataclasses.dataclass(eq=False)
class _Folder:
    live: dict[str, _File | _Folder] = dataclasses.field(default_factory=dict)
    safe: dict[str, _File | _Folder] = dataclasses.field(default_factory=dict)
    # Changes since it was last synced: what each name in it then stands for.
    pending: list[dict[str, _File | _Folder | None]] = dataclasses.field(default_factory=list)

    def change(self, names: dict[str, _File | _Folder | None]) -> None:
        self.pending.append(names)
        _apply(self.live, names)


class Disk:
    """A folder on a disk.

    Args:
        folder: Its content now is safe.
    """

    def __init__(self, folder: Path) -> None:
        self._top = str(folder)
        self._root = _read(folder)

    def do(self, operation: Operation) -> None:
        """Follow one operation; one that the system refused changes nothing."""
        folder, name = self._parent(operation.path)
        if operation.kind == "sync":
            self._sync(operation.path)
        elif folder is None:
            return  # a folder whose parent is made only then
        elif operation.kind in ("mkdir", "create"):
            if name not in folder.live:
                folder.change({name: _Folder() if operation.kind == "mkdir" else _File()})
        elif operation.kind in ("unlink", "rmdir"):
            folder.change({name: None})
        elif operation.kind in ("rename", "exchange"):
            other, new = self._parent(operation.other)
            assert other is folder, "only names within one folder change places"
            old = folder.live[new] if operation.kind == "exchange" else None
            folder.change({name: old, new: folder.live[name]})
        else:
            self._write(folder.live[name], operation)

    def states(self, limit: int = 256) -> Iterator[State]:
        """Each state in which a power cut now may leave the disk; of more than ``limit``, a sample."""
        folders = list(_folders(self._root))
        changes = [(folder, number) for folder in folders for number in range(len(folder.pending))]
        for kept in _subsets(len(changes), limit):
            chosen = {changes[index] for index in kept}
            for content in ("safe", "live", "torn"):
                yield dict(_content(self._root, "", chosen, content))

    def _parent(self, path: str) -> tuple[_Folder | None, str]:
        *above, name = self._parts(path)
        folder: _File | _Folder | None = self._root
        for part in above:
            folder = folder.live.get(part) if isinstance(folder, _Folder) else None
        return (folder if isinstance(folder, _Folder) else None), name

    def _parts(self, path: str) -> list[str]:
        return path[len(self._top) :].strip("/").split("/")

    def _sync(self, path: str) -> None:
        node: _File | _Folder = self._root
        for part in [part for part in self._parts(path) if part]:
            assert isinstance(node, _Folder)
            node = node.live[part]
        if isinstance(node, _File):
            node.safe = node.live
        else:
            node.safe, node.pending = dict(node.live), []

    def _write(self, file: _File | _Folder, operation: Operation) -> None:
        assert isinstance(file, _File)
        if operation.kind == "truncate":
            file.live = file.live[: operation.begin].ljust(operation.begin, b"\0")
        else:
            assert operation.kind == "write", operation
            before = file.live[: operation.begin].ljust(operation.begin, b"\0")
            file.live = before + operation.data + file.live[operation.begin + len(operation.data) :]


def written_out(state: State, folder: Path) -> None:
    """Make the files and folders of a state in an empty folder."""
    for path, content in sorted(state.items()):
        place = folder / path
        if content is None:
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)


def _read(path: Path) -> _Folder:
    folder = _Folder()
    for entry in sorted(path.iterdir()):
        node = _read(entry) if entry.is_dir() else _File(entry.read_bytes(), entry.read_bytes())
        folder.live[entry.name] = folder.safe[entry.name] = node
    return folder


def _apply(names: dict[str, _File | _Folder], change: dict[str, _File | _Folder | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def _folders(folder: _Folder) -> Iterator[_Folder]:
    """All folders that any state can hold, once each."""
    seen: set[_Folder] = set()
    waiting = [folder]
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            yield one
            nodes: Iterable[_File | _Folder | None] = itertools.chain(
                one.safe.values(), *(change.values() for change in one.pending)
            )
            waiting += [node for node in nodes if isinstance(node, _Folder)]


def _subsets(count: int, limit: int) -> Iterator[tuple[int, ...]]:
    if 2**count <= limit:
        for size in range(count + 1):
            yield from itertools.combinations(range(count), size)
        return
    yield ()
    yield tuple(range(count))
    # Those that a journal leaves, and any others.
    yield from (tuple(range(size)) for size in range(1, count))
    chance = random.Random(0)
    for _ in range(limit - count):
        yield tuple(index for index in range(count) if chance.random() < 0.5)


def _content(
    folder: _Folder, prefix: str, chosen: set[tuple[_Folder, int]], content: str
) -> Iterator[tuple[str, bytes | None]]:
    names = dict(folder.safe)
    for number, change in enumerate(folder.pending):
        if (folder, number) in chosen:
            _apply(names, change)
    for name, node in names.items():
        if isinstance(node, _Folder):
            yield f"{prefix}{name}", None
            yield from _content(node, f"{prefix}{name}/", chosen, content)
        elif content == "torn":
            yield f"{prefix}{name}", node.safe if node.safe == node.live else node.live[: len(node.live) // 2]
        else:
            yield f"{prefix}{name}", getattr(node, content)
