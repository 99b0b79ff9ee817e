"""Parts for the tests of the disk tier, and what their folder occupies."""

from __future__ import annotations

import fcntl
import os
import random
from pathlib import Path

import xxhash
from kvferry.store.description import Description

ROOT = bytes(32)
GENEROUS = 64 << 20


def make_part(
    number: int, nbytes: int = 1000, parent: bytes = ROOT, seed: int = 0
) -> tuple[Description, bytes]:
    data = random.Random(f"{seed} {number}").randbytes(nbytes)
    key = xxhash.xxh128_digest(b"%d %d" % (seed, number)) * 2
    begin = 256 * number
    return (
        Description(
            "block", key, parent, begin, begin + 256, ROOT, nbytes, xxhash.xxh64_intdigest(data)
        ),
        data,
    )


def file_of(folder: Path, description: Description) -> Path:
    return folder / "parts" / f"{description.key.hex()}.{description.kind}"


def occupied(folder: Path) -> int:
    """As du counts: a file of two names once."""
    blocks = {}
    for path in [folder, *folder.rglob("*")]:
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        blocks[status.st_ino] = status.st_blocks
    return sum(blocks.values()) * 512


def occupied_at_once(folder: Path) -> int:
    """As ``occupied``, while nobody reserves room, evicts or publishes: so no file is counted that
    has gone before another one came."""
    with (folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return occupied(folder)


def leftovers(folder: Path) -> list[str]:
    return os.listdir(folder / "aside")
