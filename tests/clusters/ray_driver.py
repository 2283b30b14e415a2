"""A driver on the tests' Ray cluster, run inside its namespace: calls what it is sent, and answers.

python -m tests.clusters.ray_driver ADDRESS        # pickled calls on stdin, pickled answers on stdout
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import ray

from fabric_lite.ray import launch
from tests.clusters import ray_programs


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what Ray prints is no answer
    ray.init(address=sys.argv[1])
    while True:
        try:
            program, args, options, signalled = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        pickle.dump(_call(program, args, options, signalled), answers)
        answers.flush()
    ray.shutdown()


def _call(program: str, args: list[Any], options: dict[str, Any], signalled: tuple[str, int] | None) -> dict[str, Any]:
    """What ``launch`` has returned or raised, and printed; with ``signalled``, this driver gets a signal meanwhile."""
    answer: dict[str, Any] = {}
    pids: list[int] = []
    sender = threading.Thread(target=_signal_when_told, args=(*(signalled or ("", 0)), pids))
    if signalled is not None:
        sender.start()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            answer["value"] = launch(getattr(ray_programs, program), *args, **options)
    except BaseException as error:
        answer |= {"error": error, "trace": traceback.format_exc()}
    if signalled is not None:
        with contextlib.suppress(OSError):  # nobody waits any more; else the ranks never wrote
            os.close(os.open(signalled[0], os.O_WRONLY | os.O_NONBLOCK))
        sender.join()
    return answer | {"printed": printed.getvalue(), "pids": pids, "groups": _groups()}


def _signal_when_told(fifo: str, number: int, pids: list[int]) -> None:
    pids += map(int, Path(fifo).read_text().split())
    if pids:
        os.kill(os.getpid(), number)


def _groups() -> set[str]:
    """The states of all placement groups that there ever were."""
    return {group["state"] for group in ray.util.placement_group_table().values()}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process may have been told to ignore it
    main()
