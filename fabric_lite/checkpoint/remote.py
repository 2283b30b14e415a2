"""Checkpoints in a store that fsspec reaches: ``s3://bucket/run/last``, ``gs://``, ``sftp://``, ``memory://``.

    NAME                      a file; or, of a folder, a pointer: one line of JSON with the name of the folder
    NAME.fabric-0123abcd/     the parts and the manifest of a folder

Few stores can rename a folder. So a save writes everything under a new name first, and what NAME is changes last, in
the one step that the store has for a single object: a copy within S3 or GCS, a rename over SFTP. Only then the old data
is deleted. A save that ends in between leaves the old checkpoint as it was, and what it wrote is deleted by the next
save of this name: one job at a time saves under it.

A rank uploads what it writes from a file of its own; to load, each rank fetches the checkpoint into a temporary folder,
where it is checked as any other. Who may read and write the store is between fsspec and the environment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from fabric_lite.checkpoint.archive import CheckpointNotFoundError
from fabric_lite.errors import CheckpointError, FabricError, FabricValueError
from fabric_lite.movement import busy

__all__ = ["Folder", "RemoteFolder", "RemotePath", "Target", "fetched", "uploaded_file", "uploaded_folder"]

_POINTER = b'{"fabric_lite pointer to": '
_MARK = ".fabric-"
_LARGEST_POINTER = 4096  # bytes


@dataclasses.dataclass(frozen=True)
class RemotePath:
    """The name of a checkpoint in a store, as fsspec writes it."""

    url: str

    def __str__(self) -> str:
        return self.url


@dataclasses.dataclass(frozen=True)
class RemoteFolder:
    """A folder that is being written in a store; all ranks see it."""

    url: str

    def __truediv__(self, name: str) -> RemotePart:
        return RemotePart(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def is_dir(self) -> bool:
        """Whether one can write into it: there are no folders in most stores, only names."""
        return True


@dataclasses.dataclass(frozen=True)
class RemotePart:
    """One file of it."""

    url: str

    @contextlib.contextmanager
    def open(self, mode: str) -> Iterator[BinaryIO]:
        """Yield an empty local file that is uploaded when the block ends well. Raises CheckpointError."""
        assert mode == "xb"
        with tempfile.NamedTemporaryFile(prefix="fabric_lite_") as file:
            yield cast(BinaryIO, file)
            file.flush()
            with _explained(self.url) as (store, path):
                _make_parent(store, path)
                _upload(store, file.name, path)


Target = Path | RemotePath
Folder = Path | RemoteFolder


@contextlib.contextmanager
def uploaded_file(target: RemotePath) -> Iterator[BinaryIO]:
    """Open a new local file that becomes the object ``target`` when the block ends well; one rank calls it.

    Raises:
        CheckpointError: ``target`` is a folder, or the store failed; what was there before is as it was.
    """
    _check_free(target)
    with tempfile.NamedTemporaryFile(prefix="fabric_lite_") as file:
        yield cast(BinaryIO, file)
        file.flush()
        with _explained(target.url) as (store, path):
            _put_in_place(store, Path(file.name), path, _new_name(path))


@contextlib.contextmanager
def uploaded_folder(target: RemotePath) -> Iterator[RemoteFolder]:
    """Name a new folder of the store that ``target`` stands for when the block ends well; one rank calls it.

    Raises what :func:`uploaded_file` raises.
    """
    _check_free(target)
    new = _new_name(target.url)
    try:
        yield RemoteFolder(new)
        with _explained(target.url) as (store, path), tempfile.NamedTemporaryFile(prefix="fabric_lite_") as file:
            name = new.rsplit("/", 1)[-1]
            file.write(_POINTER + json.dumps(name).encode() + b"}\n")
            file.flush()
            _put_in_place(store, Path(file.name), path, _new_name(path), keep=name)
    except BaseException:
        with contextlib.suppress(Exception):  # the error is being raised; the next save tries again
            store, path = _store_of(new)
            store.rm(path, recursive=True)
        raise


def fetched(target: RemotePath, folder: Path) -> Path:
    """Copy a checkpoint of a store into an empty local folder; return where it is there.

    Raises:
        CheckpointNotFoundError: There is nothing of this name.
        CheckpointError: The store failed.
    """
    local = folder / (target.url.rstrip("/").rsplit("/", 1)[-1] or "checkpoint")
    tries = 3
    with _explained(target.url) as (store, path):
        for number in range(tries):
            store.invalidate_cache()
            name = _pointed_at(store, path)
            if name is None:
                with busy():
                    store.get_file(path, str(local))
                return local
            try:
                _fetch_folder(store, f"{path.rsplit('/', 1)[0]}/{name}", local)
                return local
            except FileNotFoundError:
                # A new one has taken its place, and the old one is being deleted.
                if number == tries - 1 or _pointed_at(store, path) == name:
                    raise CheckpointError(
                        "A file of this checkpoint is missing.", given=target.url, fix="an earlier checkpoint"
                    ) from None
    return local


def _fetch_folder(store: Any, path: str, local: Path) -> None:
    files = [entry["name"] for entry in store.ls(path, detail=True) if entry["type"] == "file"]
    if not files:
        raise FileNotFoundError(path)
    local.mkdir(exist_ok=True)
    for name in files:
        with busy():
            store.get_file(name, str(local / name.rsplit("/", 1)[-1]))


def _pointed_at(store: Any, path: str) -> str | None:
    """The name of the folder that an object points at; None if it is a checkpoint itself. Raises FileNotFoundError."""
    size = store.info(path)["size"]
    data = store.cat_file(path, 0, min(size, _LARGEST_POINTER)) if size else b""
    if not data.startswith(_POINTER):
        return None
    try:
        name = next(iter(json.loads(data).values()))
    except ValueError:
        name = None
    own = path.rsplit("/", 1)[-1]
    if not isinstance(name, str) or re.fullmatch(re.escape(own + _MARK) + "[0-9a-f]{16}", name) is None:
        raise CheckpointError(
            "This checkpoint is damaged.", given=f"{path}: a pointer to nothing", fix="an earlier checkpoint"
        )
    return name


def _put_in_place(store: Any, file: Path, path: str, temporary: str, keep: str = "") -> None:
    """Let the object ``path`` have a file's content in one step; delete what it stood for, and what others left."""
    _make_parent(store, path)
    try:
        _upload(store, str(file), temporary)
        _rename(store, temporary, path)
    except BaseException:
        with contextlib.suppress(Exception):
            store.rm(temporary)
        raise
    with contextlib.suppress(Exception):  # the new one is in place; what stays is in nobody's way
        _sweep(store, path, keep)


def _rename(store: Any, temporary: str, path: str) -> None:
    from fsspec import AbstractFileSystem  # type: ignore[import-untyped]

    if type(store).mv is not AbstractFileSystem.mv:  # the store knows how to rename
        with busy():
            store.mv(temporary, path)
        return
    with busy():
        store.cp_file(temporary, path)
    with contextlib.suppress(Exception):  # the new one is in place; what stays is swept by the next save
        store.rm(temporary)


def _sweep(store: Any, path: str, keep: str) -> None:
    parent, own = path.rsplit("/", 1)
    store.invalidate_cache()
    for found in store.ls(parent, detail=False):
        name = found.rstrip("/").rsplit("/", 1)[-1]
        if name != keep and re.fullmatch(re.escape(own + _MARK) + "[0-9a-f]{16}", name):
            store.rm(found, recursive=True)


def _upload(store: Any, local: str, path: str) -> None:
    with busy():
        store.put_file(local, path)
    store.invalidate_cache()
    size, there = Path(local).stat().st_size, store.info(path)["size"]
    if size != there:
        raise OSError(f"{there} bytes of {size} have arrived")


def _make_parent(store: Any, path: str) -> None:
    parent = path.rsplit("/", 1)[0] if "/" in path else ""
    if parent and not store.exists(parent):
        store.makedirs(parent, exist_ok=True)


def _check_free(target: RemotePath) -> None:
    with _explained(target.url) as (store, path):
        store.invalidate_cache()
        if store.isdir(path):
            raise CheckpointError(
                "This name is taken by a folder of the store, which is never replaced.",
                given=target.url,
                fix="another name for the checkpoint",
            )


def _new_name(path: str) -> str:
    return f"{path}{_MARK}{secrets.token_hex(8)}"


@contextlib.contextmanager
def _explained(url: str) -> Iterator[tuple[Any, str]]:
    """The store of a URL and the path in it; what the store raises comes as a CheckpointError."""
    try:
        yield _store_of(url)
    except FabricError:
        raise
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(
            "There is no checkpoint of this name.", given=url, fix="the path that was given to fabric.save()"
        ) from error
    except Exception as error:  # each store has errors of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CheckpointError(
            "The store of this checkpoint failed; what was there before is as it was.",
            given=f"{url}: {type(error).__name__}: {reason:.300}",
            fix="the name of a bucket or folder that this account may read and write",
        ) from error


def _store_of(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        store, path = url_to_fs(url.rstrip("/"))
    except (ImportError, ValueError) as error:
        raise FabricValueError(
            "This kind of store can't be reached.",
            given=f"{url}: {error}",
            fix='pip install "fabric-lite[remote]" and the package of the store (s3fs for s3://, gcsfs for gs://)',
        ) from error
    return store, str(path)
