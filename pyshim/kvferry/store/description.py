"""What a tier knows of a block or a checkpoint that it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["block", "checkpoint", "layout", "pin", "layouts", "ends"]
"""A "layout" is a note that something is kept for a cache: its key is the root, its parent stands
for the model, and its bytes are a value of BlocksAllowed. A "pin" has no bytes: what has its key,
and all before, is not evicted from the disk. "layouts" and "ends" are notes of the remote tier,
which cannot list what has a parent."""


@dataclass(frozen=True)
class Description:
    """A block or a checkpoint, without its bytes."""

    kind: Kind
    key: bytes
    """32 bytes: stands for all tokens up to ``end``, and for everything that ``root`` covers."""
    parent: bytes
    """32 bytes: the key before it; of a first block the root. A checkpoint has the parent of the
    block that ends where it stands, also where the cache has no blocks."""
    begin: int
    """The first position. Of a checkpoint the same as ``end``."""
    end: int
    """The position after the last token."""
    root: bytes
    """32 bytes: the hash of everything that must be equal."""
    nbytes: int
    checksum: int
    """The XXH64 of the bytes."""
