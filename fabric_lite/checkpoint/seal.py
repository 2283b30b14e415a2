"""A checksum of all that stands around the records of a checkpoint file: their headers, the padding, the directory.

The manifest has a checksum of each record and the directory one of the manifest. The seal, the zip's comment, covers
the other bytes, so that there is none in the file that could change without being noticed.
"""

from __future__ import annotations

import functools
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from typing import BinaryIO

__all__ = ["UNSEALED", "begin_of_data", "bytes_in", "checksum_around", "is_seal", "seal", "sealed_checksum"]

_MARK = b"fabric_lite: CRC-32 of all bytes around the records "
_DIGITS = 8
# The comment before the checksum is known.
UNSEALED = _MARK + b"0" * _DIGITS
_LOCAL_HEADER = 30  # bytes of a zip record's fixed header; its last four are the lengths of name and extra field

Read = Callable[[int, int], bytes]


def seal(file: BinaryIO) -> None:
    """Put the checksum into a complete zip whose comment is ``UNSEALED``; the file is open for reading and writing."""
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()

    def crc32(begin: int, end: int, before: int) -> int:
        return zlib.crc32(bytes_in(file, begin, end - begin), before)

    checksum = checksum_around(records, size, functools.partial(bytes_in, file), crc32)
    file.seek(size - _DIGITS)
    file.write(b"%0*x" % (_DIGITS, checksum))


def bytes_in(file: BinaryIO, begin: int, count: int) -> bytes:
    """``count`` bytes of a file from ``begin`` on."""
    file.seek(begin)
    return file.read(count)


def is_seal(comment: bytes) -> bool:
    """Whether this comment of a zip begins as a seal does."""
    return comment.startswith(_MARK)


def sealed_checksum(comment: bytes) -> bytes:
    """The checksum that a seal holds, as it is written."""
    return comment[len(_MARK) :]


def checksum_around(
    records: Iterable[zipfile.ZipInfo], size: int, read: Read, crc32: Callable[[int, int, int], int]
) -> int:
    """The CRC-32 of all bytes of a file but its records' data and the digits of the seal at its end.

    Args:
        records: Of the zip's directory; stored, not compressed.
        size: The file's, in bytes.
        read: Returns bytes of the file, from the first on, so many.
        crc32: Goes on with a checksum over the bytes of the file from the first to the last.

    Raises:
        ValueError: Two records overlap, or one reaches beyond the file.
    """
    position = checksum = 0
    for record in sorted(records, key=lambda record: record.header_offset):
        begin = begin_of_data(record, read)
        if begin < position:
            raise ValueError(f"the record {record.filename} begins within another")
        checksum = crc32(position, begin, checksum)
        position = begin + record.file_size
    if position > size - _DIGITS:
        raise ValueError("a record reaches beyond the end")
    return crc32(position, size - _DIGITS, checksum)


def begin_of_data(record: zipfile.ZipInfo, read: Read) -> int:
    """Where a record's data begins in the file."""
    header = read(record.header_offset, _LOCAL_HEADER)
    return record.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", header[-4:]))
