"""Running ``fabric-run`` in tests as a user does, and looking for what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

LIMIT_SECONDS = 60.0
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
# Unbuffered, the lines of two ranks mix: print() writes a line and its end apart.
ENVIRONMENT.pop("PYTHONUNBUFFERED", None)
FABRIC_RUN = [sys.executable, "-m", "fabric_lite"]


def write(folder: Path, source: str, name: str = "script.py") -> Path:
    """Write a script and return its path."""
    path = folder / name
    path.write_text(textwrap.dedent(source))
    return path


def run(
    command: Sequence[object], *, cwd: Path | None = None, limit_seconds: float = LIMIT_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=limit_seconds,
        env=ENVIRONMENT,
        cwd=cwd,
        check=False,
    )


def fabric_run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``fabric-run`` with these words, on the CPU."""
    return run([*FABRIC_RUN, "--accelerator", "cpu", *words], cwd=cwd)


@contextlib.contextmanager
def started(*command: object, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Start a command, in a session of its own; kill what is left of it at the end."""
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=cwd,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def wait_until(condition: Callable[[], bool], what: str, *, limit_seconds: float = LIMIT_SECONDS) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + limit_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_seconds} s: {what}"
        time.sleep(0.01)


def processes_in(folder: Path) -> dict[int, str]:
    """Return the living processes whose working folder is ``folder``: what a test's command has started."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if Path(os.readlink(entry / "cwd")) == folder.resolve():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[-80:]
        except OSError:
            continue  # it has ended since the listing, or is a zombie
    return found


def assert_nothing_left(folder: Path) -> None:
    """Every process that was started in ``folder`` has ended, at once or nearly so."""
    wait_until(lambda: not processes_in(folder), f"{processes_in(folder)} end", limit_seconds=10.0)


def kill(pid: int) -> None:
    """Kill -9."""
    os.kill(pid, signal.SIGKILL)
