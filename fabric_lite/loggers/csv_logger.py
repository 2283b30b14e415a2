"""Metrics in a CSV file, a line a step, which has all that was logged when ``log`` returns."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fabric_lite.errors import FabricValueError
from fabric_lite.loggers.versions import FolderLogger
from fabric_lite.whole_file import write_whole

__all__ = ["CSVLogger"]


class CSVLogger(FolderLogger):
    """Metrics in ``root_dir/name/version_0/metrics.csv``, a line a step; parameters in ``hparams.json`` beside it.

    Columns are ``step`` and the names of the metrics in the order in which they first came; a new name is a new column,
    for which the file is written anew. What is logged of the same step as the last line is added to that line. A run
    that is killed leaves whole lines, and one that goes on from a checkpoint has the lines again that it had then, and
    no others.

    Args:
        root_dir: Where it writes.
        name: A folder in it; may be empty.
        version: Of the run: a number n is ``version_n``, text is the folder's own name. None: the first number that is
            free. A version that is there already is gone on with.
        prefix: Before every metric's name, with a ``/`` between.
        flush_logs_every_n_steps: After how many calls lines are forced onto the disk, where a power cut leaves them.

    Raises:
        FabricValueError: ``flush_logs_every_n_steps`` is less than 1.
    """

    handles = ("_file",)
    _file: io.FileIO | None = None

    def __init__(
        self,
        root_dir: str | os.PathLike[str],
        name: str = "fabric_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 1,
    ) -> None:
        super().__init__(root_dir, name, version, prefix)
        if flush_logs_every_n_steps < 1:
            raise FabricValueError(
                "Lines are forced onto the disk after one call at least.",
                given=f"flush_logs_every_n_steps={flush_logs_every_n_steps}",
                fix="flush_logs_every_n_steps=1",
            )
        self._every = flush_logs_every_n_steps
        self._columns: list[str] = []
        self._kept: tuple[int, dict[str, str]] | None = None  # of a run that goes on: how many lines, and the last one
        self._lines = 0  # of metrics in the file
        self._row: dict[str, str] = {}  # the last of them
        self._waiting = 0  # calls since the last flush

    @property
    def experiment(self) -> CSVLogger:
        """The logger itself: there is no other object behind a file."""
        return self

    def write_metrics(self, metrics: dict[str, float], step: int) -> None:
        if "step" in metrics:
            raise FabricValueError(
                "The column of steps has this name already.", given='a metric "step"', fix="another name, or a prefix"
            )
        self._open()
        fresh = [name for name in metrics if name not in self._columns]
        if fresh:
            self._rewrite(self._rows(), [*self._columns, *fresh])
        row = {"step": str(step), **{name: str(value) for name, value in metrics.items()}}
        if row["step"] == self._row.get("step"):
            row = {**self._row, **row}
            line, old = self._line(row), self._line(self._row)
            if len(line) < len(old):  # else a kill at the wrong moment would leave the end of the old one
                self._rewrite([*self._rows()[:-1], row], self._columns)
            else:
                self._write(line, len(old))
        else:
            self._write(self._line(row))
            self._lines += 1
        self._row = row
        self._waiting += 1
        if self._waiting >= self._every:
            self.flush()

    def write_params(self, params: dict[str, Any]) -> None:
        folder = Path(self.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "hparams.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        write_whole(path, json.dumps({**known, **params}, indent=2, default=str).encode() + b"\n")

    def flush(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
        self._waiting = 0

    def close(self, status: str) -> None:
        self.flush()
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """Which run this is, the last step, how many lines there are and the last of them; those of rank 0 count."""
        return {**super().state_dict(), "lines": self._lines, "row": self._row}

    def go_on(self, state: Mapping[str, Any]) -> None:
        self._kept = int(state["lines"]), dict(state["row"])
        self._lines, self._row = self._kept

    @property
    def _path(self) -> Path:
        return Path(self.log_dir) / "metrics.csv"

    def _open(self) -> None:
        """Open the file at its end; in a run that goes on, without the lines that it did not have yet."""
        if self._file is not None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows = self._rows()
        columns = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
        if self._kept is not None:
            count, last = self._kept
            rows = [*rows[: count - 1], last] if 0 < count <= len(rows) else rows[:count]
        self._rewrite(rows, columns)
        self._lines, self._row, self._kept = len(rows), rows[-1] if rows else {}, None

    def _rows(self) -> list[dict[str, str]]:
        """The whole lines of the file."""
        if not self._path.exists():
            return []
        text = self._path.read_bytes().decode()
        return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))

    def __del__(self) -> None:
        self._close()

    def _write(self, line: bytes, over: int = 0) -> None:
        """Write the whole line, over so many bytes at the end, or nothing of it: half would be part of the next."""
        assert self._file is not None
        start = self._file.seek(-over, os.SEEK_END)
        old = self._file.read(over)
        try:
            self._write_at(start, line)
        except OSError:
            self._write_at(start, old)
            self._file.truncate()
            raise

    def _write_at(self, start: int, line: bytes) -> None:
        assert self._file is not None
        self._file.seek(start)
        while line:
            line = line[self._file.write(line) or 0 :]

    def _line(self, row: Mapping[str, str]) -> bytes:
        return _line([row.get(name, "") for name in ("step", *self._columns)])

    def _rewrite(self, rows: Sequence[dict[str, str]], columns: list[str]) -> None:
        """Let these be all lines, and stay open at their end."""
        names = ["step", *columns]
        write_whole(self._path, b"".join(map(_line, [names, *([row.get(name, "") for name in names] for row in rows)])))
        self._columns = columns
        self._close()
        # Without a buffer: a line is the system's, which outlives the process, as soon as it is written.
        self._file = open(self._path, "r+b", buffering=0)  # noqa: SIM115 - it stays open

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(cells: Sequence[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
