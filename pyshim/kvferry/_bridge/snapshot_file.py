"""Files of Snapshots: the state, the model's fingerprint, a checksum. Version 1 had no ``llm``."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from . import described_file
from .described_file import Bytes, Header, Kind
from .llama_cpp_object import LlmState

_KIND = Kind("snapshot", 2, header_checksum=False)


class Content(NamedTuple):
    """The content of a file."""

    state: Bytes
    fingerprint: str | None
    checksum: int
    """CRC-32 of the state when it was written. Reading does not verify it."""
    llm: LlmState | None


def write(path: Path, content: Content) -> None:
    """Replaces the file, if there is one. Raises OSError."""
    header = {"fingerprint": content.fingerprint, "crc32": content.checksum}
    described_file.write(path, _KIND, header, content.state, content.llm)


def read(path: Path) -> Content:
    """Raises StateDamaged for a file that is no snapshot, truncated, or of an unknown version."""
    (fingerprint, checksum), state, llm = described_file.read(path, _KIND, _understand)
    return Content(state, fingerprint, checksum, llm)


def _understand(header: Header) -> tuple[str | None, int]:
    return described_file.text_or_none(header["fingerprint"]), int(header["crc32"])
