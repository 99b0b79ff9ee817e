"""The format of a part's file: 4,096 bytes that describe the part, then the part's bytes.

The header is a page of fixed size, and not the JSON of ``_bridge.described_file``. So a hostile
header has no length that a reader must trust, and the bytes begin at a page and are read straight
into the caller's memory.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from typing import cast

import xxhash

from .description import Description, Kind
from .system import System

MAGIC = b"kvfstore"
VERSION = 1
HEADER_BYTES = 4096
PIECE_BYTES = 1 << 20
"""How much is read or written at once. It is hashed while the processor's cache still holds it."""

_FIELDS = struct.Struct("<8sI4x16s32s32s32sQQQQ")
_CHECKSUM = struct.Struct("<Q")
_COVERED = HEADER_BYTES - _CHECKSUM.size
_KIND = re.compile(r"[a-z]{1,15}")
_NAME = re.compile(r"([0-9a-f]{64})\.([a-z]{1,15})")


class Damaged(Exception):
    """The file is not what its name, or its description, says."""


class Newer(Exception):
    """A newer version of kvferry wrote the file."""


def name_of(kind: str, key: bytes) -> str:
    return f"{key.hex()}.{kind}"


def parse_name(name: str) -> tuple[str, bytes] | None:
    """Returns the kind and the key, or None for a name that no part has."""
    found = _NAME.fullmatch(name)
    return found and (found[2], bytes.fromhex(found[1]))


def is_id(kind: str, key: bytes) -> bool:
    """Whether a part may have this kind and key."""
    return len(key) == 32 and _KIND.fullmatch(kind) is not None


def check(description: Description) -> None:
    """Raises ValueError for a description that no file can hold."""
    d = description
    if not (is_id(d.kind, d.key) and len(d.parent) == len(d.root) == 32):
        raise ValueError("a kind is of 1 to 15 small letters; key, parent and root are of 32 bytes")
    if not (0 <= d.begin <= d.end < 1 << 63 and 0 <= d.nbytes < 1 << 62):
        raise ValueError("positions or nbytes out of range")
    if not 0 <= d.checksum < 1 << 64:
        raise ValueError("a checksum has 64 bits")


def header_of(description: Description) -> bytes:
    d = description
    fields = _FIELDS.pack(
        MAGIC,
        VERSION,
        d.kind.encode(),
        d.key,
        d.parent,
        d.root,
        d.begin,
        d.end,
        d.nbytes,
        d.checksum,
    )
    covered = fields.ljust(_COVERED, b"\0")
    return covered + _CHECKSUM.pack(xxhash.xxh64_intdigest(covered))


def parse_header(header: bytes | bytearray) -> Description:
    """Raises Damaged, or Newer."""
    if _CHECKSUM.unpack_from(header, _COVERED)[0] != xxhash.xxh64_intdigest(header[:_COVERED]):
        raise Damaged("the checksum of the header is wrong")
    magic, version, kind, key, parent, root, begin, end, nbytes, checksum = _FIELDS.unpack_from(
        header
    )
    if magic != MAGIC:
        raise Damaged("no part of a store")
    if version > VERSION:
        raise Newer(f"format {version}")
    try:
        name = kind.rstrip(b"\0").decode("ascii")
        found = Description(
            cast("Kind", name),
            key,
            parent,
            begin,
            end,
            root,
            nbytes,
            checksum,
        )
        check(found)
    except ValueError as error:
        raise Damaged(f"the header: {error}") from None
    if header_of(found) != bytes(header):
        raise Damaged("the header is of another form")
    return found


def open_part(system: System, path: str) -> int:
    """Returns a descriptor. Raises OSError, and Damaged for anything but a regular file."""
    descriptor = system.open(path, os.O_RDONLY)
    try:
        if not stat.S_ISREG(system.fstat(descriptor).st_mode):
            raise Damaged("no regular file")
    except BaseException:
        system.close(descriptor)
        raise
    return descriptor


def read_header(system: System, descriptor: int) -> Description:
    """Returns what the header says. Raises OSError, Damaged, Newer. Allocates only the header."""
    header = bytearray(HEADER_BYTES)
    _read_all(system, descriptor, memoryview(header), 0)
    found = parse_header(header)
    if system.fstat(descriptor).st_size != HEADER_BYTES + found.nbytes:
        raise Damaged("the file has another length than its header says")
    return found


def read_data(system: System, descriptor: int, memory: memoryview, checksum: int) -> None:
    """Fills ``memory``. Raises OSError, and Damaged if the bytes have another checksum."""
    digest = xxhash.xxh64()
    for begin in range(0, len(memory), PIECE_BYTES):
        piece = memory[begin : begin + PIECE_BYTES]
        _read_all(system, descriptor, piece, HEADER_BYTES + begin)
        digest.update(piece)
    if digest.intdigest() != checksum:
        raise Damaged("the checksum is wrong")


def check_data(system: System, descriptor: int, description: Description) -> None:
    """Reads the bytes only to verify them. Raises OSError, Damaged."""
    digest, piece = xxhash.xxh64(), memoryview(bytearray(PIECE_BYTES))
    for begin in range(0, description.nbytes, PIECE_BYTES):
        part = piece[: min(PIECE_BYTES, description.nbytes - begin)]
        _read_all(system, descriptor, part, HEADER_BYTES + begin)
        digest.update(part)
    if digest.intdigest() != description.checksum:
        raise Damaged("the checksum is wrong")


def write_part(system: System, descriptor: int, header: bytes, data: memoryview) -> None:
    """Writes a part and syncs it. Raises OSError."""
    _write_all(system, descriptor, memoryview(header), 0)
    for begin in range(0, len(data), PIECE_BYTES):
        piece = data[begin : begin + PIECE_BYTES]
        _write_all(system, descriptor, piece, HEADER_BYTES + begin)
    system.sync(descriptor)


def _read_all(system: System, descriptor: int, memory: memoryview, offset: int) -> None:
    while memory:
        count = system.read(descriptor, memory, offset)
        if count == 0:
            raise Damaged("the file is truncated")
        memory, offset = memory[count:], offset + count


def _write_all(system: System, descriptor: int, memory: memoryview, offset: int) -> None:
    while memory:
        count = system.write(descriptor, [memory], offset)
        memory, offset = memory[count:], offset + count
