"""Where rank 0, or node 0, listens, and what it says when it cannot."""

from __future__ import annotations

import contextlib
import socket

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined] # documented, not in torch's __all__

from fabric_lite.errors import LaunchError
from fabric_lite.launch.plan import Rendezvous
from fabric_lite.launch.rendezvous import rendezvous_handler
from fabric_lite.listening import listen_for_nodes, listen_on, serve_store
from fabric_lite.mesh import connect
from fabric_lite.topology import Topology

LOOPBACKS = ["127.0.0.1"]
with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
    LOOPBACKS.append("::1")


def rank_0(address: str, port: int, num_nodes: int = 1) -> Topology:
    return Topology(0, 2, 0, 2 // num_nodes, 0, num_nodes, address, port, source="a launcher")


@pytest.mark.parametrize("address", LOOPBACKS)
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_rank_0_serves_by_either_version_of_the_protocol(address: str, num_nodes: int) -> None:
    with listen_on(address) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(LaunchError, match="Rank 1 of 2 has not come within"):  # and not: cannot listen
        connect(rank_0(address, port, num_nodes), timeout_seconds=0.2)


@pytest.mark.parametrize("address", LOOPBACKS)
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_a_port_that_is_taken_is_an_error_that_names_it(address: str, num_nodes: int) -> None:
    with listen_on(address) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"Rank 0 cannot listen.*\n.*{address}:{port}.*\n.*MASTER_PORT="):
            connect(rank_0(address, port, num_nodes), timeout_seconds=0.2)


def test_a_port_that_there_is_none_of_is_an_error_that_names_it() -> None:
    with pytest.raises(LaunchError, match=r"Rank 0 cannot listen.*\n.*127.0.0.1:99999"):
        connect(rank_0("127.0.0.1", 99999), timeout_seconds=0.2)


def test_node_0_waits_for_its_own_name_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    node_0 = Rendezvous(2, "static", 0, "nobody.invalid:29500", "job", timeout_seconds=1.2)
    with pytest.raises(LaunchError, match=r"Node 0 cannot listen.*\n.*nobody.invalid") as raised:
        rendezvous_handler(node_0).next_rendezvous()
    assert isinstance(raised.value.__cause__, socket.gaierror)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fabric_lite: waiting up to 1.2 s for an address of 'nobody.invalid'")


def is_loopback_by_name() -> bool:
    try:
        found = {str(each[4][0]) for each in socket.getaddrinfo(socket.gethostname(), 0)}
    except OSError:
        return False
    return all(address.startswith("127.") or address == "::1" for address in found)


@pytest.mark.skipif(not is_loopback_by_name(), reason="the name of this machine is not that of loopback")
def test_a_name_that_means_loopback_here_alone_is_listened_for_on_every_interface() -> None:
    name = socket.gethostname()
    with listen_for_nodes(name, 0, 1.0) as listener:
        assert listener.getsockname()[0] in ("0.0.0.0", "::")
        port = listener.getsockname()[1]
        store = serve_store(listener, name)
    other = TCPStore("127.0.0.1", port, None, False)
    other.set("key", "value")
    assert store.get("key") == b"value"


@pytest.mark.parametrize("address", [*LOOPBACKS, "localhost"])
def test_loopback_that_is_written_out_stays_loopback(address: str) -> None:
    with listen_for_nodes(address, 0, 1.0) as listener:
        assert listener.getsockname()[0] in LOOPBACKS
