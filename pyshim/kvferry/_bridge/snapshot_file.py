"""The format of snapshot files.

A file has, in this order: a line with the version of the format; a line with the length of the
header in bytes, in decimal; the header, in JSON; the state. Since version 2 the header may have an
entry ``llm``: then the tokens (int32) and the scores (float32, one row for each token) of a
``llama_cpp.Llama`` follow the state, both little-endian. Lengths in the header are compared with
the size of the file before any memory is allocated.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy

from .._native import lib
from ..errors import error
from .files import replacement
from .llama_cpp_object import LlmState

_MAGIC = b"kvferry snapshot %d\n"
_VERSION = 2
_MAX_HEADER = 65536


class Content(NamedTuple):
    """The content of a file."""

    state: bytearray | memoryview
    fingerprint: str | None
    checksum: int
    """CRC-32 of the state when it was written. Reading does not verify it."""
    llm: LlmState | None


def write(path: Path, content: Content) -> None:
    """Replaces the file, if there is one. Raises OSError."""
    header: dict[str, Any] = {
        "fingerprint": content.fingerprint,
        "crc32": content.checksum,
        "bytes": len(content.state),
    }
    more = []
    if content.llm is not None:
        tokens, scores = content.llm.tokens, content.llm.scores
        more = [tokens.astype("<i4").tobytes()]
        if scores is not None:
            more.append(scores.astype("<f4").tobytes())
        header["llm"] = {
            "tokens": len(tokens),
            "columns": None if scores is None else scores.shape[1],
            "seed": content.llm.seed,
            "crc32": zlib.crc32(b"".join(more)),
        }
    text = json.dumps(header).encode() + b"\n"
    with replacement(path) as file:
        file.write(_MAGIC % _VERSION + b"%d\n" % len(text) + text)
        file.write(content.state)
        file.writelines(more)


def read(path: Path) -> Content:
    """Raises StateDamaged for a file that is no snapshot, truncated, or of an unknown version."""
    with path.open("rb") as file:
        magic = file.readline(len(_MAGIC) + 8)
        if magic not in (_MAGIC % 1, _MAGIC % _VERSION):
            newer = magic.startswith(_MAGIC.split(b"%")[0])
            raise _damaged(f"{path} is no snapshot{' that this version knows' if newer else ''}")
        try:
            length = int(file.readline(16))
            if not 0 < length <= _MAX_HEADER:
                raise ValueError("length of the header")
            header = json.loads(file.read(length))
            nbytes, checksum = _count(header["bytes"]), int(header["crc32"])
            fingerprint = header["fingerprint"]
            if not (fingerprint is None or isinstance(fingerprint, str)):
                raise TypeError("fingerprint")
            llm = header.get("llm")
            rest = 0
            if llm is not None:
                columns = 0 if llm["columns"] is None else _count(llm["columns"])
                rest = 4 * _count(llm["tokens"]) * (1 + columns)
                if not (llm["seed"] is None or isinstance(llm["seed"], int)):
                    raise TypeError("seed")
        except (ValueError, TypeError, KeyError, AttributeError):
            raise _damaged(f"the header of {path}") from None
        if os.fstat(file.fileno()).st_size - file.tell() != nbytes + rest:
            raise _damaged(f"{path} is truncated")
        state = _read_exactly(file, nbytes)
        return Content(state, fingerprint, checksum, llm and _read_llm(file, llm, rest))


def _read_llm(file: BinaryIO, header: dict[str, Any], nbytes: int) -> LlmState:
    data = _read_exactly(file, nbytes)
    if zlib.crc32(data) != header["crc32"]:
        raise _damaged("the checksum of its tokens is wrong")
    count, columns = header["tokens"], header["columns"]
    tokens = numpy.frombuffer(data, "<i4", count)
    scores = None
    if columns is not None:
        scores = numpy.frombuffer(data, "<f4", offset=4 * count).reshape(count, columns)
    return LlmState(tokens, scores, header["seed"])


def _read_exactly(file: BinaryIO, nbytes: int) -> bytearray:
    data = bytearray(nbytes)
    if file.readinto(data) != nbytes:  # type: ignore[attr-defined]
        raise _damaged(f"{file.name} is truncated")
    return data


def _count(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError("a count")
    return value


def _damaged(detail: str) -> Exception:
    return error(lib.KVF_ERR_STATE_DAMAGED, detail)
