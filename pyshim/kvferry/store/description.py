"""What a tier knows of a block or a checkpoint that it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["block", "checkpoint", "layout", "pin", "layouts", "ends"]
"""The kind of a part. A "layout" is a note on the disk that something is kept for a cache: its key
is the root, its parent stands for the model, and its bytes are a value of BlocksAllowed. A "pin"
has no bytes: the parts of its key, and all parts before them, are not evicted from the disk.
"layouts" and "ends" are notes of the remote tier, which cannot list the parts that have a
parent."""


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
