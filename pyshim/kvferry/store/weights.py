"""A hash that tells the weights of two models apart, without reading all of them."""

from __future__ import annotations

import functools
import hashlib
import os

_MIB = 1 << 20
_PIECES = 16  # of 64 KiB each, between the first MiB and the last
_PIECE_BYTES = 1 << 16


def weights_hash(path: str) -> bytes:
    """Returns a hash of a file's size, its first and last MiB, and pieces in between. Raises
    OSError.

    Reads 3 MiB at most, once for each state of the file. Fine-tuned weights differ nearly
    everywhere; a file of which a few bytes were changed elsewhere has the same hash.
    """
    status = os.stat(path)
    return _hash(os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=64)
def _hash(path: str, nbytes: int, _modified: int, _inode: int) -> bytes:
    hashed = hashlib.blake2b(nbytes.to_bytes(8, "little"), digest_size=32)
    step = max(1, nbytes // (_PIECES + 1))
    places = [(0, _MIB), *((step * index, _PIECE_BYTES) for index in range(1, _PIECES + 1))]
    with open(path, "rb") as file:
        for begin, count in [*places, (max(0, nbytes - _MIB), _MIB)]:
            file.seek(begin)
            hashed.update(file.read(count))
    return hashed.digest()
