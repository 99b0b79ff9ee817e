"""Files that describe their own content.

A file has, in this order: a line with its kind and the version of the kind's format; a line with
the length of the header in bytes, in decimal, and, in some kinds, with the XXH64 of the header; the
header, in JSON; the bytes. The header may have an entry ``llm``: then the tokens (int32) and the
scores (float32, one row for each token) of a ``llama_cpp.Llama`` follow the bytes, both
little-endian. Lengths in the header are compared with the size of the file before any memory is
allocated.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy
import xxhash

from .._native import lib
from ..errors import error
from .files import replacement
from .llama_cpp_object import LlmState

_MAX_HEADER = 65536

Bytes = bytearray | memoryview
Header = dict[str, Any]
T = TypeVar("T")


class Kind(NamedTuple):
    """A kind of file."""

    name: str
    version: int
    """The newest version of the format, which is written. All older versions are read."""
    header_checksum: bool
    """Whether the XXH64 of the header is in the file."""

    def first_line(self, version: int | None = None) -> bytes:
        return b"kvferry %s %d\n" % (self.name.encode(), version or self.version)

    def second_line(self, header: bytes) -> bytes:
        checksum = b" %016x" % xxhash.xxh64_intdigest(header) if self.header_checksum else b""
        return b"%d%s\n" % (len(header), checksum)


def write(path: Path, kind: Kind, header: Header, content: Bytes, llm: LlmState | None) -> None:
    """Replaces the file, if there is one. Raises OSError.

    ``header`` has the kind's own entries; ``bytes`` and ``llm`` are added.
    """
    header = {**header, "bytes": len(content)}
    more = []
    if llm is not None:
        tokens, scores = llm.tokens, llm.scores
        more = [tokens.astype("<i4").tobytes()]
        if scores is not None:
            more.append(scores.astype("<f4").tobytes())
        header["llm"] = {
            "tokens": len(tokens),
            "columns": None if scores is None else scores.shape[1],
            "seed": llm.seed,
            "crc32": zlib.crc32(b"".join(more)),
        }
    text = json.dumps(header).encode() + b"\n"
    with replacement(path) as file:
        file.write(kind.first_line() + kind.second_line(text) + text)
        file.write(content)
        file.writelines(more)


def read(
    path: Path, kind: Kind, understand: Callable[[Header], T]
) -> tuple[T, bytearray, LlmState | None]:
    """Returns the header as ``understand`` returns it, the bytes, and what follows them.

    ``understand`` raises ValueError, TypeError or KeyError for a header of another form. Raises
    StateDamaged for a file that is none of this kind, truncated, or of an unknown version.
    """
    with path.open("rb") as file:
        first = file.readline(len(kind.first_line()) + 8)
        if first not in [kind.first_line(version + 1) for version in range(kind.version)]:
            newer = first.startswith(kind.first_line().rstrip(b"0123456789\n"))
            raise damaged(f"{path} is no {kind.name}{' that this version knows' if newer else ''}")
        try:
            second = file.readline(40)
            length = int(second.split()[0])
            if not 0 < length <= _MAX_HEADER:
                raise ValueError("length of the header")
            text = file.read(length)
            if kind.header_checksum and second != kind.second_line(text):
                raise ValueError("checksum of the header")
            header = json.loads(text)
            understood, nbytes = understand(header), count(header["bytes"])
            llm = header.get("llm")
            rest = 0
            if llm is not None:
                columns = 0 if llm["columns"] is None else count(llm["columns"])
                rest = 4 * count(llm["tokens"]) * (1 + columns)
                count(llm["crc32"])
                if not (llm["seed"] is None or isinstance(llm["seed"], int)):
                    raise TypeError("seed")
        except (ValueError, TypeError, LookupError, AttributeError):
            raise damaged(f"the header of {path}") from None
        if os.fstat(file.fileno()).st_size - file.tell() != nbytes + rest:
            raise damaged(f"{path} is truncated")
        content = _read_exactly(file, nbytes)
        return understood, content, llm and _read_llm(file, llm, rest)


def _read_llm(file: BinaryIO, header: Header, nbytes: int) -> LlmState:
    data = _read_exactly(file, nbytes)
    if zlib.crc32(data) != header["crc32"]:
        raise damaged("the checksum of its tokens is wrong")
    tokens_count, columns = header["tokens"], header["columns"]
    tokens = numpy.frombuffer(data, "<i4", tokens_count)
    scores = None
    if columns is not None:
        scores = numpy.frombuffer(data, "<f4", offset=4 * tokens_count)
        scores = scores.reshape(tokens_count, columns)
    return LlmState(tokens, scores, header["seed"])


def _read_exactly(file: BinaryIO, nbytes: int) -> bytearray:
    data = bytearray(nbytes)
    if file.readinto(data) != nbytes:  # type: ignore[attr-defined]
        raise damaged(f"{file.name} is truncated")
    return data


def count(value: object) -> int:
    """Returns a number of the header. Raises ValueError for anything but a number of 0 or more."""
    if not isinstance(value, int) or value < 0:
        raise ValueError("a count")
    return value


def text_or_none(value: object) -> str | None:
    """Returns a text of the header, or None. Raises TypeError for anything else."""
    if not (value is None or isinstance(value, str)):
        raise TypeError("a text")
    return value


def damaged(detail: str) -> Exception:
    """Returns a StateDamaged to raise."""
    return error(lib.KVF_ERR_STATE_DAMAGED, detail)
