"""Reading what launchers write: numbers, short forms of lists, names of hosts."""

from __future__ import annotations

import re
import socket
import zlib
from collections.abc import Iterator, Mapping

from fabric_lite.errors import LaunchError

__all__ = ["expand_counts", "expand_hosts", "is_loopback", "number", "port_of", "resolves"]


def number(environ: Mapping[str, str], name: str, default: int | None = None, *, least: int | None = None) -> int:
    """Return the variable ``name`` as a number; ``default`` where it is not set, or empty.

    Raises:
        LaunchError: It is no number, or less than ``least``, or it is not there and has no default.
    """
    text = environ.get(name)
    if text is None or text == "":
        if default is None:
            raise LaunchError(f"The environment variable {name} is missing.", fix="start the script with fabric-run")
        return default
    try:
        value = int(text)
    except ValueError:
        raise LaunchError(
            f"The environment variable {name} is not a number.",
            given=f"{name}={text!r}",
            fix="unset it, or start the script with fabric-run",
        ) from None
    if least is not None and value < least:
        raise LaunchError(
            f"The environment variable {name} must be at least {least}.",
            given=f"{name}={text!r}",
            fix="unset it, or start the script with fabric-run",
        )
    return value


def port_of(*parts: str | None) -> int:
    """A port that all ranks of one job compute alike and two jobs on one host rarely share: 20000 to 29999."""
    return 20000 + zlib.crc32("/".join(part or "" for part in parts).encode()) % 10000


def expand_counts(text: str) -> list[int]:
    """``"2(x2),1"`` is 2, 2, 1: Slurm's short form of the tasks on each node."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise LaunchError("Slurm's list of tasks per node could not be read.", given=text)
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def expand_hosts(text: str) -> list[str]:
    """``"n[01-03,7]-ib,login"`` is n01-ib, n02-ib, n03-ib, n7-ib, login: as ``scontrol show hostnames`` says it."""
    # A comma in brackets separates numbers, one outside of them hosts.
    part = r"(?:[^,\[\]]|\[[^\[\]]*\])+"
    if text and re.fullmatch(f"{part}(?:,{part})*", text) is None:
        raise _bad_list(text)
    return [host for found in re.findall(part, text) for host in _expand_host(found.strip())]


def _expand_host(text: str) -> Iterator[str]:
    before, opening, rest = text.partition("[")
    if not opening:
        yield text
        return
    ranges, _, after = rest.partition("]")
    endings = list(_expand_host(after))
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise _bad_list(text)
        # Leading zeros are of the name: 08, 09, 10.
        for index in range(int(first), int(last or first) + 1):
            yield from (f"{before}{index:0{len(first)}d}{ending}" for ending in endings)


def _bad_list(text: str) -> LaunchError:
    return LaunchError(
        "Slurm's list of nodes could not be read.",
        given=f"{text!r} in SLURM_STEP_NODELIST or SLURM_JOB_NODELIST",
        fix="a list as Slurm writes it, n[01-03,7],login, or MASTER_ADDR=<address of rank 0's host>",
    )


def resolves(host: str) -> bool:
    """Whether this machine knows the address of a host of this name."""
    try:
        return bool(socket.getaddrinfo(host, None))
    except (OSError, UnicodeError):  # no such host; no name at all
        return False


def is_loopback(address: str) -> bool:
    """Whether it is an address by which a machine reaches nobody but itself."""
    return address.startswith("127.") or address in ("::1", "localhost")
