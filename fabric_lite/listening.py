"""Listening, and serving a store, on one address alone; a TCPStore left to itself listens on every interface."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from datetime import timedelta
from typing import Any

from fabric_lite.topology.variables import is_loopback

__all__ = ["listen_for_nodes", "listen_on", "serve_store"]

# Between two tries to find the address of a name.
_LOOK_SECONDS = 0.5


def listen_on(address: str, port: int = 0) -> socket.socket:
    """Return a socket that listens on ``address`` alone.

    Raises:
        OSError: It cannot, or nobody knows the address; OverflowError: no port has this number.
    """
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(2048)
    except BaseException:
        listener.close()
        raise
    return listener


def listen_for_nodes(address: str, port: int, timeout_seconds: float) -> socket.socket:
    """The same where other machines are to come to ``address``.

    A name that nobody knows yet is waited for, with a word: Kubernetes makes it a moment after the pod has started. One
    that means loopback here, and another address elsewhere, as Debian writes it into ``/etc/hosts`` (``127.0.1.1
    HOST``), is listened for on every interface, since which of them the others know is not known here; or at its other
    address, where it has one here too.

    Raises:
        OSError: It cannot, or nobody knows the address in time; OverflowError: no port has this number.
    """
    found = _await_addresses(address, port, timeout_seconds)
    # Who writes a number, or localhost, means loopback.
    if is_loopback(address):
        return listen_on(address, port)
    others = [each for each in found if not is_loopback(each)]
    if others:
        return listen_on(others[0], port)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=2048, dualstack_ipv6=dual)


def _await_addresses(name: str, port: int, timeout_seconds: float) -> list[str]:
    deadline = time.monotonic() + timeout_seconds
    has_said = False
    while True:
        with contextlib.suppress(socket.gaierror):
            return _addresses(name, port)
        if time.monotonic() >= deadline:
            return _addresses(name, port)
        if not has_said:
            has_said = True
            line = (
                f"fabric_lite: waiting up to {timeout_seconds:g} s for an address of {name!r}, which nobody knows yet"
            )
            print(line, file=sys.stderr, flush=True)
        time.sleep(_LOOK_SECONDS)


def _addresses(name: str, port: int) -> list[str]:
    return [str(each[4][0]) for each in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)]


def serve_store(listener: socket.socket, address: str | None = None, timeout_seconds: float = 300.0) -> Any:
    """Return a TCPStore that serves on ``listener``, which it takes over, for as long as it is referred to.

    Args:
        listener: Where.
        address: How this process reaches it; by default the address on which it listens.
        timeout_seconds: How long this process waits in the store.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined] # documented, not in torch's __all__

    host, port = listener.getsockname()[:2]
    timeout = timedelta(seconds=timeout_seconds)
    descriptor = listener.detach()
    return TCPStore(
        address or host, port, None, True, timeout=timeout, wait_for_workers=False, master_listen_fd=descriptor
    )
