"""Writing small files that are the old one or the new one, never something in between."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, content: bytes, *, survives_power_cut: bool = True) -> None:
    """Let the file have this content, or be as it was before.

    Args:
        path: Where.
        content: All of it.
        survives_power_cut: Whether to wait until it is on the disk, some milliseconds; a process that is killed leaves
            it whole in any case.

    Raises:
        OSError: It could not be written.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            if survives_power_cut:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if not survives_power_cut:
        return
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # else a power cut may take the new name back
    finally:
        os.close(descriptor)
