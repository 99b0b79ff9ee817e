"""Parts for the tests of the disk tier, and what their folder occupies."""

from __future__ import annotations

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
    """As du counts."""
    total = folder.lstat().st_blocks
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_blocks
        except FileNotFoundError:
            continue
    return total * 512


def leftovers(folder: Path) -> list[str]:
    return os.listdir(folder / "aside")
