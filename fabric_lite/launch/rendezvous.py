"""How the supervisors of several nodes meet: by number at node 0, or by a backend of torchelastic."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined] # not in torch's __all__
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from fabric_lite.errors import LaunchError
from fabric_lite.launch.plan import Rendezvous
from fabric_lite.listening import listen_for_nodes, serve_store
from fabric_lite.meeting import meet
from fabric_lite.topology.variables import resolves

__all__ = ["LOST_SECONDS", "rendezvous_handler"]

# How long a number of nodes that suffices waits for more; and how often a node says that it is there, and how many of
# these words may be missing.
_LAST_CALL_SECONDS = 3
_KEEP_ALIVE_SECONDS, _KEEP_ALIVE_MISSING = 1, 5
# After so long without a sign a node is lost, or the store is.
LOST_SECONDS = _KEEP_ALIVE_SECONDS * _KEEP_ALIVE_MISSING


def rendezvous_handler(rendezvous: Rendezvous) -> RendezvousHandler:
    """Return what torchelastic's agent meets the other nodes by."""
    return _StaticRendezvous(rendezvous) if rendezvous.backend == "static" else _torch_handler(rendezvous)


class _StaticRendezvous(RendezvousHandler):
    """All nodes are known by number; node 0 serves the store in which they meet, on the main address alone."""

    def __init__(self, rendezvous: Rendezvous) -> None:
        assert rendezvous.node_rank is not None
        self._node_rank = rendezvous.node_rank
        self._rendezvous = rendezvous
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        return "static"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        host, port = _split(self._rendezvous.endpoint)
        if self._store is None:
            self._store = self._serve(host, port) if self._node_rank == 0 else self._connect(host, port)
            begins = PrefixStore(f"{self._rendezvous.run_id} begins", self._store)
            count, timeout = self._rendezvous.num_nodes, self._rendezvous.timeout_seconds
            meet(begins, "node", self._node_rank, count, timeout, may_come_again=True)
        return RendezvousInfo(
            PrefixStore(self._rendezvous.run_id, self._store),
            self._node_rank,
            self._rendezvous.num_nodes,
            RendezvousStoreInfo(host, port),
        )

    def _connect(self, host: str, port: int) -> TCPStore:
        timeout = timedelta(seconds=self._rendezvous.timeout_seconds)
        try:
            return TCPStore(host, port, None, False, timeout=timeout, wait_for_workers=False)
        except DistError as error:
            raise LaunchError(
                f"Node {self._node_rank} does not reach node 0.",
                given=f"--main-address {host} --main-port {port}: {error}",
                fix="see whether fabric-run runs on node 0, and that its address and port can be reached from here",
            ) from error

    def _serve(self, host: str, port: int) -> TCPStore:
        timeout = self._rendezvous.timeout_seconds
        try:
            listener = listen_for_nodes(host, port, timeout)
        except (OSError, OverflowError) as error:
            raise LaunchError(
                "Node 0 cannot listen on the main address.",
                given=f"--main-address {host} --main-port {port}: {error}",
                fix="an address of node 0 that the others reach, and a free port",
            ) from error
        store: TCPStore = serve_store(listener, host, timeout)
        return store

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._rendezvous.run_id

    def shutdown(self) -> bool:
        return True


def _torch_handler(rendezvous: Rendezvous) -> RendezvousHandler:
    own, options = _own_address(rendezvous.endpoint), {}
    if rendezvous.backend == "c10d" and own is not None and own == _address(rendezvous.endpoint):
        # torch compares the endpoint with the address of the machine's name, and may find nobody to serve the store.
        options["is_host"] = True
    elif rendezvous.backend == "c10d" and own is not None and not resolves(socket.gethostname()):
        options["is_host"] = False  # torch would raise, looking for the address of a name that nobody knows
    try:
        return _handler_of(rendezvous, own, options)
    except RendezvousConnectionError:
        if not options.get("is_host"):
            raise
        return _handler_of(rendezvous, own, {"is_host": False})  # another of this machine's serves it


def _handler_of(rendezvous: Rendezvous, own_address: str | None, options: dict[str, bool]) -> RendezvousHandler:
    parameters = RendezvousParameters(
        backend=rendezvous.backend,
        endpoint=rendezvous.endpoint,
        run_id=rendezvous.run_id,
        min_nodes=rendezvous.min_nodes or rendezvous.num_nodes,
        max_nodes=rendezvous.num_nodes,
        timeout=rendezvous.timeout_seconds,
        last_call_timeout=_LAST_CALL_SECONDS,
        keep_alive_interval=_KEEP_ALIVE_SECONDS,
        keep_alive_max_attempt=_KEEP_ALIVE_MISSING,
        local_addr=own_address,
        **options,
    )
    return get_rendezvous_handler(parameters)


def _address(endpoint: str) -> str:
    return str(socket.getaddrinfo(*_split(endpoint), type=socket.SOCK_DGRAM)[0][4][0])


def _own_address(endpoint: str) -> str | None:
    """The address from which this machine reaches the endpoint, for the others to reach it by.

    torchelastic left to itself tells the address of the machine's name, which is often that of loopback.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(*_split(endpoint), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as way:
            way.connect(address)  # of datagrams: nothing is sent
            return str(way.getsockname()[0])
    except (OSError, ValueError):  # a name that nobody knows, yet; an endpoint without a port
        return None


def _split(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    return host, int(port)
