"""A saved sequence."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from ._bridge import snapshot_file
from ._bridge.arguments import HostMemory
from ._bridge.claims import claim_for_snapshot
from ._bridge.completion import Completion
from ._bridge.llm import LlmState
from ._bridge.snapshot_file import Content
from ._native import ffi, lib
from .buffer import Buffer, borrow
from .errors import error

if TYPE_CHECKING:
    from ._native import CData


class Snapshot(Buffer):
    """The state of one sequence, as ``llama_state_seq_get_data`` would write it, bit for bit.

    Read-only. It knows which model it came from (``fingerprint``), and once it has been sealed, its
    checksum.
    """

    _writable = False

    def __init__(
        self,
        memory: CData,
        nbytes: int,
        *,
        fingerprint: str | None = None,
        checksum: int | None = None,
        completion: Completion | None = None,
        llm: LlmState | None = None,
    ) -> None:
        super().__init__(memory, nbytes)
        self._claim: object = claim_for_snapshot(memory, nbytes)
        self.fingerprint = fingerprint
        """``Llama.fingerprint`` of where it came from, which says what that covers. None: unknown,
        and not checked when it is loaded."""
        self.sealed = checksum
        """CRC-32 as of ``seal()``, or as it came with a file; None if it has not been sealed."""
        self.completion = completion
        """How the save went; None for a state that came from elsewhere."""
        self.llm = llm
        """What the ``llama_cpp.Llama`` knew that it was saved from; None if it was no such object.

        A load into an attachment to such an object makes it know that again."""

    @classmethod
    def from_bytes(
        cls,
        state: HostMemory,
        *,
        fingerprint: str | None = None,
        llm: LlmState | None = None,
    ) -> Snapshot:
        """Wraps a state that comes from elsewhere. Borrows the memory, without a copy."""
        borrowed = borrow(state, "state")
        return cls(borrowed.memory, borrowed.nbytes, fingerprint=fingerprint, llm=llm)

    def close(self) -> None:
        super().close()
        self._claim = None

    def _condition(self) -> str:
        tokens = "" if self.llm is None else f", {len(self.llm.tokens)} tokens"
        sealed = "" if self.sealed is None else ", sealed"
        return tokens + sealed + super()._condition()

    def checksum(self) -> int:
        """The CRC-32 of the bytes as they are now. Takes about a second for each 1 to 3 GiB."""
        return zlib.crc32(self.view)

    async def seal(self) -> int:
        """Computes the checksum, on a thread, and keeps it for ``verify``, files and loads."""
        return await anyio.to_thread.run_sync(self.seal_sync)

    def seal_sync(self) -> int:
        """As ``seal``, on this thread."""
        self.sealed = self.checksum()
        return self.sealed

    async def verify(self) -> None:
        """Compares the bytes with the checksum, on a thread.

        Raises StateDamaged if they differ, ValueError if the snapshot was never sealed.
        """
        await anyio.to_thread.run_sync(self.verify_sync)

    def verify_sync(self) -> None:
        """As ``verify``, on this thread."""
        if self.sealed is None:
            raise ValueError("this Snapshot has no checksum: seal() it first")
        if self.checksum() != self.sealed:
            raise error(lib.KVF_ERR_STATE_DAMAGED, "the checksum is wrong")

    async def to_file(self, path: str | os.PathLike[str]) -> None:
        """Writes state, fingerprint, checksum (seals it if need be) and ``llm``, on a thread.

        A file that is there already is replaced once the new one is whole on the disk, so that a
        process or machine that ends meanwhile leaves the one or the other (and maybe, beside it, a
        ``.partial`` file). Raises OSError; then the old file is as it was.
        """
        await anyio.to_thread.run_sync(self.to_file_sync, path)

    def to_file_sync(self, path: str | os.PathLike[str]) -> None:
        """As ``to_file``, on this thread."""
        checksum = self.seal_sync() if self.sealed is None else self.sealed
        content = Content(self.view, self.fingerprint, checksum, self.llm)
        snapshot_file.write(Path(path), content)

    @classmethod
    async def from_file(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Reads what ``to_file`` wrote, on a thread, into ordinary memory.

        Raises StateDamaged if it is no such file or is truncated. The state's checksum is read, not
        compared: that is what ``verify()`` and ``load(verify=True)`` are for.
        """
        return await anyio.to_thread.run_sync(cls.from_file_sync, path)

    @classmethod
    def from_file_sync(cls, path: str | os.PathLike[str]) -> Snapshot:
        """As ``from_file``, on this thread."""
        content = snapshot_file.read(Path(path))
        return cls(
            ffi.from_buffer("uint8_t[]", content.state),
            len(content.state),
            fingerprint=content.fingerprint,
            checksum=content.checksum,
            llm=content.llm,
        )
