"""A rank: the Ray actor that becomes it. Imported by Ray's workers; it needs no torch until it serves or runs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import signal
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from fabric_lite.errors import LaunchError
from fabric_lite.launch.environment import rank_environment
from fabric_lite.launch.function_answers import pickled_error, pickled_value
from fabric_lite.launch.rank import ScriptCall, become_rank, load_main, run_to_end
from fabric_lite.listening import listen_on, serve_store
from fabric_lite.run_config import RunConfig

__all__ = ["Place", "Rank", "Whereabouts", "device_index", "run_script"]

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


@dataclasses.dataclass(frozen=True)
class Whereabouts:
    """Where Ray has put an actor.

    Args:
        node: The node's id.
        address: The node's address.
        pid: The actor's process.
        device: The index, among the devices that processes of the node see, of the one it was given; None: it has none.
    """

    node: str
    address: str
    pid: int
    device: int | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """What an actor is told of its place: the arguments of :func:`rank_environment`."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    num_nodes: int
    main_address: str
    main_port: int
    run_id: str
    restart_count: int
    max_restarts: int


class Rank:
    """The actor's class; its process runs one rank, once. The methods are called in this order, from outside."""

    def __init__(self) -> None:
        self._store: Any = None

    def locate(self) -> Whereabouts:
        """Return where this actor is."""
        import ray

        context = ray.get_runtime_context()
        device = device_index(ray.get_gpu_ids(), os.environ)
        return Whereabouts(context.get_node_id(), ray.util.get_node_ip_address(), os.getpid(), device)

    def serve(self, address: str) -> int:
        """On rank 0: serve the ranks' store on this address, as long as this process lives, and return its port."""
        listener = listen_on(address)
        port = int(listener.getsockname()[1])
        self._store = serve_store(listener)
        return port

    def run(self, place: Place, config: RunConfig, folder: str, program: bytes) -> bytes:
        """Become the rank, call what ``program`` holds, and return its :class:`Answer`, pickled.

        Args:
            place: Which rank this is.
            config: What it is told.
            folder: The driver's working directory, to work in where this node has it too.
            program: A function without arguments, pickled.
        """
        import ray

        dumps: Callable[[Any], bytes] = ray.cloudpickle.dumps
        environment = rank_environment(**dataclasses.asdict(place), error_file="")
        # Exceptions come back as themselves, not by a file.
        del environment["TORCHELASTIC_ERROR_FILE"]
        become_rank(environment, config)
        _take_back_signals()
        with contextlib.suppress(OSError):
            os.chdir(folder)
        try:
            value = run_to_end(lambda: pickle.loads(program)())
            return pickled_value(value if place.rank == 0 else None, dumps)
        except BaseException as error:
            error.__traceback__ = _users_part(error.__traceback__)
            return pickled_error(error, dumps)

    def leave(self) -> None:
        """End the process as Python does: exit handlers run, what waits to be written is written."""
        import ray

        ray.actor.exit_actor()


def run_script(script: ScriptCall) -> None:
    """Run the script as ``__main__`` of this process."""
    if not script.is_module and not os.path.isfile(script.target):
        raise LaunchError(
            "The script is not on this node.",
            given=f"{script.target}, looked for in {os.getcwd()} on {os.uname().nodename}",
            fix="a folder that all nodes share, or ray job submit --working-dir .",
        )
    main_module, code = load_main(script)
    exec(code, main_module.__dict__)


def device_index(given: list[Any], environ: Mapping[str, str]) -> int | None:
    """Return the index at which this process sees the device that Ray gave it; None without one.

    Args:
        given: Ray's ids: numbers on the node or, where the node's own variable names devices, those names.
        environ: The environment, in which that variable may leave out devices of the node.
    """
    if not given:
        return None
    name = str(given[0])
    visible = [part.strip() for part in environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return visible.index(name) if name in visible else int(name)


def _take_back_signals() -> None:
    """Let SIGTERM and SIGUSR1 do what they do in any process: Ray's handler would exit before a Fabric could save."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """Drop the frames of this package above the user's first line; the whole where there is no such line."""
    start = trace
    while start is not None and os.path.abspath(start.tb_frame.f_code.co_filename).startswith(_PACKAGE):
        start = start.tb_next
    return start or trace
