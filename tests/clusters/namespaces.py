"""Two hosts on this machine: network namespaces with a cable between them, and no way to anywhere else."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Hosts", "missing", "two_hosts"]


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Two hosts; both are 0 or 1 in the methods.

    Args:
        names: Of the namespaces.
    """

    names: tuple[str, str]

    def address(self, host: int) -> str:
        return f"10.213.0.{host + 1}"

    def on(self, host: int, *command: object) -> list[str]:
        """The command, on one of them, with gloo on the cable."""
        variables = [f"GLOO_SOCKET_IFNAME={self._interface(host)}"]
        return ["ip", "netns", "exec", self.names[host], "env", *variables, *(str(word) for word in command)]

    def name(self, host: int, *lines: str) -> None:
        """Give the host an /etc/hosts of its own, with these lines in it too: an address and a name."""
        folder = Path("/etc/netns") / self.names[host]
        folder.mkdir(parents=True)
        (folder / "hosts").write_text("\n".join([Path("/etc/hosts").read_text(), *lines, ""]))

    def on_named(self, host: int, *command: object) -> list[str]:
        """The same; the host also has a name of its own, ``host0`` or ``host1``, of which nobody knows the address."""
        named = ["unshare", "--uts", "sh", "-c", f'echo host{host} > /proc/sys/kernel/hostname; exec "$@"', "sh"]
        return self.on(host, *named, *command)

    def pull_plug(self, host: int) -> None:
        """From now on nothing comes through, and nobody is told."""
        ip("-n", self.names[host], "link", "set", self._interface(host), "down")

    def drop(self, host: int, chain: str) -> None:
        """From now on a packet filter drops what comes to a host (``INPUT``) or leaves it (``OUTPUT``) by the cable."""
        way = {"INPUT": "-i", "OUTPUT": "-o"}[chain]
        filtered = ["iptables", "--wait", "--append", chain, way, self._interface(host), "--jump", "DROP"]
        words = ["ip", "netns", "exec", self.names[host], *filtered]
        subprocess.run(words, check=True, capture_output=True, timeout=10)

    def slow_down(self, host: int, rate: str) -> None:
        """Let no more than ``rate`` out of a host."""
        limits = ["tbf", "rate", rate, "burst", "32kbit", "latency", "400ms"]
        words = ["tc", "-n", self.names[host], "qdisc", "add", "dev", self._interface(host), "root", *limits]
        subprocess.run(words, check=True, capture_output=True, timeout=10)

    def _interface(self, host: int) -> str:
        return f"cable{host}"


def missing() -> str | None:
    """Why there can be no namespaces here, or None."""
    if shutil.which("ip") is None:
        return "ip not found: apt-get install iproute2"
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    probe = f"fabric-lite-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False, timeout=10)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False, timeout=10)
    return None if made.returncode == 0 else f"no network namespaces here: {made.stderr.strip()}"


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make the two; nothing of them is left on leaving."""
    hosts = Hosts((f"fabric-lite-{os.getpid()}-a", f"fabric-lite-{os.getpid()}-b"))
    with contextlib.ExitStack() as stack:
        for name in hosts.names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            stack.callback(shutil.rmtree, Path("/etc/netns") / name, ignore_errors=True)
        first, second = hosts.names
        ends = ["cable0", "netns", first, "type", "veth", "peer", "name", "cable1", "netns", second]
        ip("link", "add", *ends)
        for host, name in enumerate(hosts.names):
            ip("-n", name, "address", "add", f"{hosts.address(host)}/24", "dev", f"cable{host}")
            for interface in ("lo", f"cable{host}"):
                ip("-n", name, "link", "set", interface, "up")
        yield hosts


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)
