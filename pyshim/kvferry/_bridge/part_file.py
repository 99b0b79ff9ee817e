"""Files of Blocks and Checkpoints. Reading verifies every byte."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import xxhash

from . import described_file
from .described_file import Bytes, Header, Kind, count, damaged
from .llama_cpp_object import LlmState

BLOCK = Kind("block", 1, header_checksum=True)
CHECKPOINT = Kind("checkpoint", 1, header_checksum=True)


class Content(NamedTuple):
    """The content of a file."""

    data: Bytes
    positions: dict[str, int]
    """``begin`` and ``end`` of a block, ``position`` of a checkpoint."""
    keys: dict[str, bytes | None]
    fingerprint: str | None
    checksum: int
    """XXH64 of the data."""
    llm: LlmState | None


def write(path: Path, kind: Kind, content: Content) -> None:
    """Replaces the file, if there is one. Raises OSError."""
    header: Header = {
        "fingerprint": content.fingerprint,
        "positions": content.positions,
        "keys": {name: None if key is None else key.hex() for name, key in content.keys.items()},
        "xxh64": content.checksum,
    }
    described_file.write(path, kind, header, content.data, content.llm)


def read(path: Path, kind: Kind) -> Content:
    """Raises StateDamaged for a file that is none of this kind, truncated, damaged, or of an
    unknown version."""
    known, data, llm = described_file.read(path, kind, _understand)
    if xxhash.xxh64_intdigest(data) != known.checksum:
        raise damaged("the checksum is wrong")
    return known._replace(data=data, llm=llm)


def _understand(header: Header) -> Content:
    return Content(
        data=bytearray(),
        positions={name: count(value) for name, value in header["positions"].items()},
        keys={
            name: None if key is None else bytes.fromhex(key)
            for name, key in header["keys"].items()
        },
        fingerprint=described_file.text_or_none(header["fingerprint"]),
        checksum=count(header["xxh64"]),
        llm=None,
    )
