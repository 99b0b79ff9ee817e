"""Keys: chained hashes of tokens, and the root that stands for everything else.

BLAKE2b with 32 bytes is used: it is cryptographic, so that nobody can make two prefixes of one key;
it is in Python's own library; and its keyed mode chains without a construction of our own.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
from numpy.typing import ArrayLike, NDArray

from .._bridge.arguments import invalid

Tokens = NDArray[numpy.int32]

KEY_BYTES = 32
_SCHEME = b"1"  # another number for another way of making keys
_PERSON = b"kvferry.store"


def checked_tokens(tokens: ArrayLike) -> Tokens:
    """Returns tokens as little-endian int32. Raises TypeError, InvalidArgument."""
    given = _as_array(tokens)
    if given.ndim != 1:
        raise invalid(f"tokens have {given.ndim} dimensions")
    if given.size == 0:
        return numpy.empty(0, "<i4")
    if given.dtype.kind not in "iu":
        raise TypeError(f"tokens are integers, not {given.dtype}")
    if given.min() < 0 or given.max() > numpy.iinfo(numpy.int32).max:
        raise invalid("a token is negative, or does not fit into 32 bits")
    return given.astype("<i4")


def _as_array(tokens: ArrayLike) -> NDArray[Any]:
    if isinstance(tokens, list) and tokens and type(tokens[0]) is int:
        # Takes two thirds of the time that numpy takes. Where this fails, numpy finds out why.
        with contextlib.suppress(TypeError, OverflowError):
            return numpy.frombuffer(array.array("q", tokens), numpy.int64)
    return numpy.asarray(tokens)


def root_key(parts: Sequence[bytes]) -> bytes:
    """Returns the key that stands for these parts, whose lengths are hashed too."""
    hashed = hashlib.blake2b(_SCHEME, digest_size=KEY_BYTES, person=_PERSON)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.digest()


def next_key(parent: bytes, tokens: Tokens) -> bytes:
    """Returns the key of the block of ``tokens`` that follows ``parent``."""
    return _next_key(parent, tokens.tobytes())


def _next_key(parent: bytes, data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=KEY_BYTES, key=parent, person=_PERSON).digest()


class Link(NamedTuple):
    """A run of tokens in the chain of a conversation."""

    begin: int
    end: int
    key: bytes
    parent: bytes


def chain(root: bytes, tokens: Tokens, block_tokens: int) -> list[Link]:
    """Returns the blocks of a conversation; the last one may be shorter."""
    links, parent = [], root
    data, each = memoryview(tokens.tobytes()), tokens.itemsize
    for begin in range(0, len(tokens), block_tokens):
        end = min(begin + block_tokens, len(tokens))
        key = _next_key(parent, data[each * begin : each * end])
        links.append(Link(begin, end, key, parent))
        parent = key
    return links
