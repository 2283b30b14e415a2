"""How much memory there is, by control groups of both versions that the test writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fabric_lite.machine import available_memory

# All limits are far below what a machine that runs this has free.
MIB = 2**20
VERSION_2 = ("", "memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")

versions = pytest.mark.parametrize("version", [VERSION_2, VERSION_1], ids=["version 2", "version 1"])


def write_group(groups: Path, version: tuple[str, str, str, str], limit: str, used: int, cache: int | None) -> None:
    """A group with these figures in bytes; without ``cache`` it has no ``memory.stat``."""
    folder, limit_name, used_name, cache_name = version
    group = groups / folder
    group.mkdir(exist_ok=True)
    (group / limit_name).write_text(f"{limit}\n")
    (group / used_name).write_text(f"{used}\n")
    if cache is not None:
        lines = ["inactive_anon 1", f"{cache_name} {cache}", "active_file 2", "total_active_file 3"]
        (group / "memory.stat").write_text("\n".join(lines) + "\n")


@versions
def test_files_in_the_cache_take_no_room_in_a_container(version: tuple[str, str, str, str], tmp_path: Path) -> None:
    write_group(tmp_path, version, str(32 * MIB), 30 * MIB, 20 * MIB)
    assert available_memory(tmp_path) == 22 * MIB


@versions
@pytest.mark.parametrize(
    ("used", "cache", "room"),
    [
        (10 * MIB, 0, 22 * MIB),
        (10 * MIB, None, 22 * MIB),
        (10 * MIB, 11 * MIB, 32 * MIB),  # what is in the cache was read later and is more than all
        (33 * MIB, 0, 0),  # the limit was lowered
    ],
)
def test_room_is_neither_less_than_nothing_nor_more_than_the_limit(
    version: tuple[str, str, str, str], used: int, cache: int | None, room: int, tmp_path: Path
) -> None:
    write_group(tmp_path, version, str(32 * MIB), used, cache)
    assert available_memory(tmp_path) == room


@pytest.mark.parametrize(
    ("version", "limit"), [(None, ""), (VERSION_2, "max"), (VERSION_1, "9223372036854771712")], ids=str
)
def test_without_a_limit_it_is_what_the_machine_has(
    version: tuple[str, str, str, str] | None, limit: str, tmp_path: Path
) -> None:
    if version is not None:
        write_group(tmp_path, version, limit, 30 * MIB, 20 * MIB)
    assert available_memory(tmp_path) > 32 * MIB
