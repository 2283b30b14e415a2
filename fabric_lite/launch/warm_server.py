"""The supervisor's handle on its one server process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fabric_lite.errors import LaunchError
from fabric_lite.launch.messages import Channel
from fabric_lite.launch.process_tree import descendants, end_descendants, wait_for_exit
from fabric_lite.launch.rank import ScriptCall

__all__ = ["WarmServer"]

_EXIT_TIMEOUT_SECONDS = 10.0

# Python puts the working folder first on sys.path here; a script's random.py would be imported instead of Python's.
_SERVER_CODE = """\
import sys
if sys.path[0] == "": del sys.path[0]
root = sys.argv.pop(1)
if root not in sys.path: sys.path.append(root)
from fabric_lite.launch.server import main
main()
"""


class WarmServer:
    """One server process, started when this object is made.

    Args:
        script: What its ranks will run.
        environment: Its environment, which the ranks inherit.
        pass_descriptors: The descriptors that requests will name.
    """

    def __init__(
        self, script: ScriptCall, *, environment: Mapping[str, str], pass_descriptors: Sequence[int] = ()
    ) -> None:
        self._others = descendants(os.getpid())
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).parents[2])
        arguments = [root, str(theirs.fileno()), str(os.getpid()), "-m" if script.is_module else "-f", script.target]
        # Ranks get Ctrl-C from the supervisor alone, and only once, because they live in a session of their own.
        self.process = subprocess.Popen(
            [sys.executable, *_interpreter_flags(), "-c", _SERVER_CODE, *arguments, *script.arguments],
            env=dict(environment),
            pass_fds=(theirs.fileno(), *pass_descriptors),
            start_new_session=True,
        )
        theirs.close()
        self.channel = Channel(ours)

    def send(self, message: Any) -> None:
        """Ask the server for something; its answers come by :meth:`receive`."""
        self.channel.send(message)

    def receive(self) -> list[Any]:
        """Wait for what the server has to say.

        Raises:
            LaunchError: The server has ended.
        """
        messages = self.channel.receive()
        if not messages and self.channel.is_closed:
            raise LaunchError(
                "The process that starts the ranks has ended.",
                given=f"exit code {self.process.wait()}",
                fix="see the lines above; `python -c 'import torch'` must work",
            )
        return messages

    def kill(self) -> None:
        """Kill the server and all its processes now."""
        self.process.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """End the server and whatever still lives below it."""
        self.channel.close()
        if self.process.returncode is None:
            status = wait_for_exit(self.process.pid, timeout_seconds=_EXIT_TIMEOUT_SECONDS)
            if status is None:
                self.process.kill()
                status = self.process.wait()
            # Popen warns about a process that it has not seen end.
            self.process.returncode = status
        # Only a server that was killed leaves anything; what was here before it is none of ours.
        end_descendants(os.getpid(), keep=self._others, grace_seconds=0)


def _interpreter_flags() -> list[str]:
    # The function that multiprocessing uses for the same purpose (-W, -X, -O, ...); it has no public name.
    return subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
