"""What somebody may put in place of a part's file, or of an object: damaged, swapped, or a lie."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import xxhash
from kvferry.store import folder
from kvferry.store.part_format import HEADER_BYTES

_COVERED = HEADER_BYTES - 8
_FIELDS = [
    (0, 8),
    (8, 4),
    (16, 16),
    (32, 32),
    (64, 32),
    (96, 32),
    *((at, 8) for at in range(128, 160, 8)),
]
_NBYTES, _CHECKSUM = 144, 152
_ENORMOUS = 1 << 40


def sealed(header: bytes | bytearray) -> bytes:
    """The header with the checksum that it should have."""
    covered = bytes(header[:_COVERED])
    return covered + xxhash.xxh64_intdigest(covered).to_bytes(8, "little")


def mutate(right: bytes, other: bytes, chance: random.Random) -> bytes:
    """Changes the content of a file. ``other`` is the content of another one."""
    data = bytearray(right)
    how = chance.randrange(11)
    if how == 0:
        del data[chance.randrange(len(data)) :]
    elif how == 1:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how == 2:  # a field of the header, enormous
        place = 8 * chance.randrange(30)
        data[place : place + 8] = b"\xff" * 8
    elif how == 3:
        begin, length = chance.randrange(len(data)), chance.randrange(1, 64)
        data[begin : begin + length] = chance.randbytes(length)
    elif how == 4:
        data += chance.randbytes(chance.randrange(1, 64))
    elif how in (5, 6):  # a field of the header, with the right checksum
        place, length = chance.choice(_FIELDS)
        values = [bytes(length), b"\xff" * length, chance.randbytes(length)]
        values.append((1 << chance.randrange(8 * length)).to_bytes(length, "little"))
        data[place : place + length] = chance.choice(values)
        data[:HEADER_BYTES] = sealed(data)
    elif how == 7:  # other data, and all checksums right
        data[HEADER_BYTES:] = chance.randbytes(len(data) - HEADER_BYTES)
        checksum = xxhash.xxh64_intdigest(data[HEADER_BYTES:])
        data[_CHECKSUM : _CHECKSUM + 8] = checksum.to_bytes(8, "little")
        data[:HEADER_BYTES] = sealed(data)
    elif how == 8:
        data[:] = other
    elif how == 9:
        data[HEADER_BYTES:] = other[HEADER_BYTES:]
    else:
        data[:] = bytes(len(data))
    return bytes(data)


def make_deep_folder(path: Path, depth: int) -> None:
    """Makes folders in one another; their path is longer than the system takes."""
    descriptor = os.open(path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d" * 9, dir_fd=descriptor)
        inner = os.open("d" * 9, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(descriptor)


def remove(path: Path) -> None:
    folder.remove_tree(str(path))


def plant(path: Path, right: bytes, other: bytes, outside: Path, chance: random.Random) -> bool:
    """Puts something in place of a file. ``outside`` is a right file that is not in the folder.

    Returns whether a program that followed no link might read a part from what stands there.
    """
    remove(path)
    how = chance.randrange(100)
    if how < 88:
        path.write_bytes(mutate(right, other, chance))
        return True
    if how < 91:
        path.mkdir()
        if chance.random() < 0.5:
            (path / path.name[:9]).write_bytes(right)
        elif chance.random() < 0.02:
            make_deep_folder(path, 2000)
    elif how < 95:
        path.symlink_to(
            chance.choice([outside, path, path.parent / "nothing", path.parent, "/dev/zero"])
        )
    elif how < 97:
        os.mkfifo(path)
    elif how < 98:
        descriptor = os.open(path.parent, os.O_PATH)  # a socket's path must be short
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(f"/proc/self/fd/{descriptor}/{path.name}")
        os.close(descriptor)
    else:  # a header that is right, and the length that it says, on no blocks
        header = bytearray(right[:HEADER_BYTES])
        header[_NBYTES : _NBYTES + 8] = _ENORMOUS.to_bytes(8, "little")
        path.write_bytes(sealed(header))
        os.truncate(path, HEADER_BYTES + _ENORMOUS)
        return True
    return False
